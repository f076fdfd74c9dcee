//! An explanation for people.

use std::io::{self, Write};
use std::net::SocketAddr;

use super::{Answer, EndpointView, Explanation, FrontendView, PortChain, ServiceChain};
use crate::table::Table;

/// Prints all of it.
pub fn text(explanation: &Explanation, mut out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{}, as node {} has it (from {})",
        explanation.asked, explanation.node, explanation.source
    )?;
    for note in &explanation.notes {
        writeln!(out, "{note}")?;
    }
    if !explanation.claimants.is_empty() {
        let mut table = Table::new(["OWNER", "FRONTEND", "HAS IT", "WHY"]);
        for claimant in &explanation.claimants {
            let owner = format!("{} {}/{}", claimant.kind, claimant.namespace, claimant.name);
            let wins = if claimant.wins { "yes" } else { "no" };
            table.row([owner, claimant.frontend.clone(), wins.into(), claimant.why.clone()]);
        }
        writeln!(out)?;
        table.print(&mut out)?;
    }
    if let Some(service) = &explanation.service {
        chain(service, out)?;
    }
    clients(&explanation.clients, out)?;
    writeln!(out)?;
    if explanation.findings.is_empty() {
        return writeln!(out, "nothing is wrong with it");
    }
    for finding in &explanation.findings {
        let field = finding.field.as_ref().map(|field| format!("  {field}")).unwrap_or_default();
        writeln!(out, "{:8} {}{field}", finding.severity, finding.code)?;
        writeln!(out, "         {}", finding.text)?;
    }
    Ok(())
}

fn chain(service: &ServiceChain, mut out: &mut dyn Write) -> io::Result<()> {
    let name = format!("{}/{}", service.namespace, service.name);
    writeln!(out)?;
    writeln!(out, "Service {name}, type {}", service.kind)?;
    let selector = service.selector.as_ref().map(|selector| {
        let labels: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        if labels.is_empty() { "none".to_owned() } else { labels.join(",") }
    });
    let pods = match (service.pods, service.pods_ready) {
        (Some(pods), Some(ready)) => format!(": {pods} Pods, {ready} ready"),
        _ => String::new(),
    };
    writeln!(out, "selector {}{pods}", selector.unwrap_or_else(|| "not known".into()))?;
    let mut steps = Table::new(["PORT", "STEP", "VALUE", "FITS", "WHY"]);
    for port in &service.ports {
        for step in &port.steps {
            let fits = match step.fits {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            };
            steps.row([label(port), step.step.into(), step.value.clone(), fits.into(), step.why.clone()]);
        }
    }
    writeln!(out)?;
    steps.print(&mut out)?;
    let mut endpoints = Table::new(["PORT", "ENDPOINT", "POD", "NODE", "STATE", "INSIDE", "OUTSIDE"]);
    for port in &service.ports {
        for endpoint in &port.endpoints {
            let used =
                |used: &super::Use| format!("{}: {}", if used.used { "used" } else { "not" }, used.why);
            endpoints.row([
                label(port),
                SocketAddr::new(endpoint.address, endpoint.port).to_string(),
                endpoint.pod.clone().unwrap_or_else(|| "-".into()),
                endpoint.node.clone().unwrap_or_else(|| "-".into()),
                state(endpoint).into(),
                used(&endpoint.inside),
                used(&endpoint.outside),
            ]);
        }
    }
    writeln!(out)?;
    if endpoints.is_empty() {
        return writeln!(out, "no endpoints");
    }
    endpoints.print(&mut out)
}

fn label(port: &PortChain) -> String {
    if port.name.is_empty() { port.port.to_string() } else { port.name.clone() }
}

const fn state(endpoint: &EndpointView) -> &'static str {
    match (endpoint.ready, endpoint.terminating, endpoint.serving) {
        (true, _, _) => "ready",
        (false, true, true) => "terminating, serving",
        (false, true, false) => "terminating",
        (false, false, _) => "not ready",
    }
}

fn clients(clients: &[FrontendView], mut out: &mut dyn Write) -> io::Result<()> {
    if clients.is_empty() {
        return Ok(());
    }
    let mut table =
        Table::new(["KIND", "FRONTEND", "WHO MAY ASK", "FROM INSIDE", "FROM OUTSIDE", "IN THE MAPS"]);
    for client in clients {
        let programmed = match &client.programmed {
            None => "-".to_owned(),
            Some(view) if !view.present => "no".into(),
            Some(view) if !view.agrees => {
                format!("differs: {} inside, {} outside", view.inside, view.outside)
            }
            Some(_) => "yes".into(),
        };
        let outside =
            if client.inside == client.outside { "the same".into() } else { answer(&client.outside) };
        let sources = match client.source_ranges.as_deref() {
            None => "all".into(),
            Some([]) => "nobody".into(),
            Some(nets) => nets.join(" "),
        };
        let key = client.key.to_string();
        table.row([client.kind.clone(), key, sources, answer(&client.inside), outside, programmed]);
    }
    writeln!(out)?;
    table.print(&mut out)
}

fn answer(answer: &Answer) -> String {
    format!("{}: {}", answer.outcome, answer.why)
}
