//! What the maps of this node have, beside what the objects say.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::{Answer, Explanation, Finding, FrontendView, ProgrammedView, Severity};
use crate::inspect::{ScopeView, ServiceView};

/// Says of every frontend what `maps` have of it, and what differs.
pub fn compare(explanation: &mut Explanation, maps: &[ServiceView]) {
    for client in &mut explanation.clients {
        let entry = maps.iter().find(|entry| is_of(client, entry));
        let agrees = match entry {
            Some(entry) => {
                agrees(&client.inside, &entry.internal) && agrees(&client.outside, &entry.external)
            }
            None => false,
        };
        let count =
            |scope: fn(&ServiceView) -> &ScopeView| entry.map_or(0, |entry| scope(entry).backends.len());
        let view = ProgrammedView {
            present: entry.is_some(),
            inside: count(|entry| &entry.internal),
            outside: count(|entry| &entry.external),
            agrees,
        };
        if !agrees {
            explanation.findings.push(differs(client, &view));
        }
        client.programmed = Some(view);
    }
    explanation.findings.sort_by_key(|finding| finding.severity);
}

fn is_of(client: &FrontendView, entry: &ServiceView) -> bool {
    (client.address, client.family, client.port) == (entry.address, entry.family, entry.port)
        && client.protocol == entry.protocol
}

/// What another owner's backends are is not known here.
fn agrees(said: &Answer, scope: &ScopeView) -> bool {
    let said_backends: BTreeSet<SocketAddr> = said.backends.iter().copied().collect();
    let programmed =
        scope.backends.iter().map(|backend| Some(SocketAddr::new(backend.address?, backend.port)));
    let programmed: Option<BTreeSet<SocketAddr>> = programmed.collect();
    said.outcome == "other" || programmed == Some(said_backends)
}

fn differs(client: &FrontendView, view: &ProgrammedView) -> Finding {
    let key = client.key;
    let (code, text) = if view.present {
        let (inside, outside) = (client.inside.backends.len(), client.outside.backends.len());
        let text = format!(
            "{key}: the maps of this node have {} backends for clients inside and {} for those outside, and not the \
             {inside} and {outside} of the objects; see whether the agent runs and what it says (fairlead status)",
            view.inside, view.outside
        );
        ("programmed-differs", text)
    } else {
        let text = format!(
            "{key} is not in the maps of this node; see whether the agent runs and what it says (fairlead status)"
        );
        ("not-programmed", text)
    };
    Finding { severity: Severity::Error, code: code.into(), field: None, text }
}
