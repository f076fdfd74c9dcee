//! Counts for [`super::model`], from the pinned maps.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::model::{BackendFlows, Sample, ServiceSample};
use crate::inspect::{FlowPosition, InspectError, Inspector, NameFilter, monotonic_nanoseconds};

/// The maps of one datapath.
pub struct Reader {
    inspector: Inspector,
    only: NameFilter,
}

impl Reader {
    pub fn open(bpffs: &Path, only: NameFilter) -> Result<Self, InspectError> {
        Ok(Self { inspector: Inspector::open(bpffs)?, only })
    }

    /// Counts of everything that has frontends. Services beyond the number that is counted one by one are left out.
    pub fn sample(&self) -> Result<Sample, InspectError> {
        let labels = self.inspector.labels()?;
        let usages = self.inspector.usages(labels.services())?;
        let services = usages.into_iter().filter_map(|(service, usage)| {
            let label = labels.owner(service).cloned();
            let is_asked_for = self.only.is_any()
                || label.as_ref().is_some_and(|it| self.only.matches(&it.namespace, &it.name));
            is_asked_for.then_some((service, ServiceSample { label, usage }))
        });
        Ok(Sample { at: Duration::from_nanos(monotonic_nanoseconds()), services: services.collect() })
    }

    /// Flows of a Service by backend, from a walk over the flow tables.
    pub fn backends(&self, service: u32) -> Result<Vec<BackendFlows>, InspectError> {
        let mut flows: BTreeMap<SocketAddr, BackendFlows> = BTreeMap::new();
        let mut at = FlowPosition::default();
        while let Some(next) = self.inspector.flow_slice(at, &mut |flow| {
            if flow.service != service || flow.reply {
                return;
            }
            let backend = SocketAddr::new(flow.new_destination, flow.new_destination_port);
            let counts = flows.entry(backend).or_default();
            match flow.state {
                "pending" => counts.pending += 1,
                "closing" => counts.closing += 1,
                "closed" => counts.closed += 1,
                _ => counts.established += 1,
            }
        })? {
            at = next;
        }
        for view in self.inspector.used_backends()? {
            let address = SocketAddr::new(view.backend.address, view.backend.port);
            let is_used = view.backend.state != "unused";
            if is_used && view.services.iter().any(|user| user.service == service) {
                flows.entry(address).or_default().state = view.backend.state;
            } else if let Some(counts) =
                flows.get_mut(&address).filter(|counts| is_used && counts.state.is_empty())
            {
                counts.state = view.backend.state;
            }
        }
        Ok(flows
            .into_iter()
            .map(|(address, flows)| BackendFlows {
                address: address.to_string(),
                state: if flows.state.is_empty() { "none" } else { flows.state },
                ..flows
            })
            .collect())
    }
}
