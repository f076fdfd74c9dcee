//! Read-outs of the pinned maps: `services`, `backends`, `flows`, and how other commands print what they found. Tables for
//! people; JSON with the names of [`crate::inspect`], which stay as they are (docs/cli.md).

mod flows;
mod follow;
mod services;
mod status;

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

pub use self::flows::{Extent, FlowEdge, FlowFilter, FlowState, Order, Part, flows};
pub use self::follow::follow;
pub use self::services::{BackendFilter, BackendState, ServiceFilter, backends, services};
pub use self::status::status;
use crate::check::Finding;
use crate::explain::{Explanation, render};
use crate::table::Table;

/// What is read, and how it is written where.
pub struct To<'a> {
    pub bpffs: &'a Path,
    pub json: bool,
    /// A table with all columns.
    pub wide: bool,
    pub out: &'a mut dyn Write,
}

impl To<'_> {
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)?;
        Ok(writeln!(self.out)?)
    }
}

/// `fairlead check`.
pub fn check(to: &mut To<'_>, findings: &[Finding]) -> Result<()> {
    if to.json {
        return to.json(&findings);
    }
    let mut table = Table::new(["STATE", "CHECK", "FOUND"]);
    for finding in findings {
        let fix = finding.fix.as_ref().map(|fix| format!("; {fix}")).unwrap_or_default();
        table.row([finding.state.to_string(), finding.check.to_owned(), format!("{}{fix}", finding.found)]);
    }
    Ok(table.print(&mut to.out)?)
}

/// `fairlead explain`.
pub fn explain(to: &mut To<'_>, explanation: &Explanation) -> Result<()> {
    if to.json {
        return to.json(explanation);
    }
    Ok(render::text(explanation, to.out)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use lb_common::abi::{self, OwnerName, frontend_kind};

    use crate::entries::{FrontendKey, Protocol, ServiceName};
    use crate::inspect::Labels;
    use crate::owner::Owner;

    /// docs/cli.md has every field of what is printed with `-o json`.
    pub(crate) fn assert_documented(printed: &serde_json::Value) {
        let docs = include_str!("../../../docs/cli.md");
        let known: BTreeSet<&str> = docs.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        match printed {
            serde_json::Value::Object(fields) => {
                for (field, value) in fields {
                    assert!(known.contains(field.as_str()), "{field} is not in docs/cli.md");
                    assert_documented(value);
                }
            }
            serde_json::Value::Array(items) => items.iter().for_each(assert_documented),
            _ => {}
        }
    }

    /// Service 9 is shop/web, port 80 and nodePort 30080.
    pub(super) fn labels() -> Labels {
        let mut snapshot = crate::entries::Snapshot::default();
        let owner = Owner::from(ServiceName { namespace: "shop".into(), name: "web".into() });
        snapshot.names.insert(9, OwnerName::from(&owner));
        for (addr, port, kind) in
            [("10.96.0.1", 80, frontend_kind::CLUSTER_IP), ("0.0.0.0", 30080, frontend_kind::NODE_PORT)]
        {
            let key = FrontendKey { addr: addr.parse().unwrap(), port, protocol: Protocol::Tcp };
            snapshot.frontends.insert(key, abi::Service { id: 9, kind, port: 1, ..abi::Service::default() });
        }
        Labels::of(&snapshot)
    }
}
