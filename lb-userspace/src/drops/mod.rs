//! `fairlead drops`: which packets and sockets did not get what they asked for, why, of which Service; and one by one
//! as they come.
//!
//! The counts are always there. The programs tell of single packets only while somebody reads (`SAMPLING`).

mod follow;
mod sample;

use std::str::FromStr;

use anyhow::Result;
use aya::maps::{MapData, PerCpuHashMap};
use lb_common::Reason;
use lb_common::abi::RefusalKey;
use lb_common::reason::Action;
use serde::Serialize;

pub use self::follow::follow;
pub use self::sample::decode;
use crate::datapath::{MapError, typed};
use crate::inspect::{CounterView, InspectError, Inspector, NameFilter, action_name, owner_name};
use crate::owner;
use crate::show::To;
use crate::table::Table;
use crate::trace::meaning;

/// What is looked for; all of it if nothing is said.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    pub reason: Option<Lost>,
    /// Whose frontends.
    pub owner: NameFilter,
}

impl Filter {
    /// Whether something was lost for this reason at a frontend of this owner, if it is anybody's.
    fn shows(&self, reason: &str, namespace: Option<&str>, name: Option<&str>) -> bool {
        self.reason.is_none_or(|Lost(wanted)| wanted.name() == reason)
            && (self.owner.is_any()
                || namespace.zip(name).is_some_and(|(namespace, name)| self.owner.matches(namespace, name)))
    }
}

/// A [`Reason`] for which something is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lost(Reason);

impl Lost {
    /// Every such reason.
    pub fn all() -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(|reason| !matches!(reason.action(), Action::Pass | Action::Carry))
    }
}

impl FromStr for Lost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::all().find(|reason| reason.name() == text).map(Self).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Reason::name).collect();
            format!("nothing is lost for such a reason; one of {}", names.join(", "))
        })
    }
}

/// What was refused to clients of a Service, or of a Pod's host ports, for one reason.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct RefusalView {
    /// `null`: it has no name in the maps any more.
    pub namespace: Option<String>,
    /// `null`: it has no name in the maps any more. Beyond 63 bytes without its middle.
    pub name: Option<String>,
    /// `Service`, or `Pod` of a host port; `null`: it has no name in the maps any more.
    pub owner: Option<&'static str>,
    /// Number of the Service or Pod.
    pub service: u32,
    pub reason: &'static str,
    /// `drop`, `reject`, `expire` or `shrink`.
    pub action: &'static str,
    /// Packets, and calls of sockets.
    pub packets: u64,
}

impl RefusalView {
    fn new(key: RefusalKey, packets: u64, snapshot: &crate::entries::Snapshot) -> Option<Self> {
        let reason = Reason::ALL.get(usize::try_from(key.reason).ok()?)?;
        let name = snapshot.names.get(&key.service);
        Some(Self {
            namespace: name.map(|name| owner::text(&name.namespace)),
            name: name.map(|name| owner::text(&name.name)),
            owner: name.map(|name| owner_name(name.kind)),
            service: key.service,
            reason: reason.name(),
            action: action_name(reason.action()),
            packets,
        })
    }
}

/// `fairlead drops`. The names of the fields are part of the public interface.
#[derive(Debug, Serialize)]
struct Drops {
    /// By hook and reason, whatever they were for; without those that a Service's name was asked for.
    reasons: Vec<CounterView>,
    /// Those that were for a known Service and began nothing.
    services: Vec<RefusalView>,
}

/// What was lost since the maps were made.
pub fn show(to: &mut To<'_>, filter: &Filter) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let drops = Drops {
        reasons: if filter.owner.is_any() { reasons(&inspector, filter)? } else { vec![] },
        services: refusals(&inspector, filter)?,
    };
    if to.json {
        return to.json(&drops);
    }
    if drops.reasons.is_empty() && drops.services.is_empty() {
        return Ok(writeln!(to.out, "nothing was dropped or refused")?);
    }
    if !drops.reasons.is_empty() {
        let mut table = Table::new(["REASON", "HOOK", "ACTION", "PACKETS", "BYTES", "MEANING"]);
        for counter in &drops.reasons {
            let reason = Reason::ALL.into_iter().find(|reason| reason.name() == counter.reason);
            table.row([
                counter.reason.to_owned(),
                counter.hook.to_owned(),
                counter.action.to_owned(),
                counter.packets.to_string(),
                counter.bytes.to_string(),
                reason.map_or("", meaning).to_owned(),
            ]);
        }
        table.print(&mut to.out)?;
    }
    if !drops.services.is_empty() {
        let mut table = Table::new(["SERVICE", "REASON", "ACTION", "PACKETS"]);
        for refusal in &drops.services {
            table.row([
                label(refusal.namespace.as_deref(), refusal.name.as_deref(), refusal.service),
                refusal.reason.to_owned(),
                refusal.action.to_owned(),
                refusal.packets.to_string(),
            ]);
        }
        if !drops.reasons.is_empty() {
            writeln!(to.out)?;
        }
        table.print(&mut to.out)?;
    }
    Ok(())
}

/// How a Service is called: by its number, if it has no name any more.
fn label(namespace: Option<&str>, name: Option<&str>, number: u32) -> String {
    match (namespace, name) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        _ => format!("#{number}"),
    }
}

fn reasons(inspector: &Inspector, filter: &Filter) -> Result<Vec<CounterView>, InspectError> {
    let mut counters = inspector.counters()?;
    counters.retain(|counter| {
        Lost::all().any(|reason| reason.name() == counter.reason)
            && filter.reason.is_none_or(|Lost(reason)| reason.name() == counter.reason)
    });
    counters.sort_by_key(|counter| std::cmp::Reverse(counter.packets));
    Ok(counters)
}

fn refusals(inspector: &Inspector, filter: &Filter) -> Result<Vec<RefusalView>, InspectError> {
    let fail =
        |error: aya::maps::MapError| MapError::Failed { map: "REFUSALS".into(), reason: error.to_string() };
    let map: PerCpuHashMap<MapData, RefusalKey, u64> = typed("REFUSALS", |spec| inspector.map_data(spec))?;
    let snapshot = inspector.snapshot()?;
    let mut views = vec![];
    for entry in &map {
        let (key, counts) = entry.map_err(fail)?;
        let view = RefusalView::new(key, counts.iter().sum(), &snapshot);
        views.extend(
            view.filter(|view| filter.shows(view.reason, view.namespace.as_deref(), view.name.as_deref())),
        );
    }
    views.sort_by(|a, b| b.packets.cmp(&a.packets).then_with(|| a.cmp(b)));
    Ok(views)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reasons_that_lose_something_are_known() {
        assert_eq!("no_endpoints".parse(), Ok(Lost(Reason::NoEndpoints)));
        assert_eq!("no_local_endpoints".parse(), Ok(Lost(Reason::NoLocalEndpoints)));
        for carried in ["translated", "not_ours", "nonsense", ""] {
            let error = carried.parse::<Lost>().unwrap_err();
            assert!(error.contains("ports_exhausted") && !error.contains("translated"), "{error}");
        }
    }

    #[test]
    fn a_service_without_a_name_has_its_number() {
        assert_eq!(label(Some("shop"), Some("web"), 7), "shop/web");
        assert_eq!(label(None, None, 7), "#7");
    }
}
