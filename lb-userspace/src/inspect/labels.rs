//! Names for the numbers that the maps have: whose a flow, a counter or a backend is, as users say it.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{self, OwnerName};

use super::owner_name;
use super::select::NameFilter;
use crate::entries::{FrontendKey, FrontendKind, Protocol, Snapshot};
use crate::owner;

/// A Service, or a Pod with host ports.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Label {
    /// `Service` or `Pod`.
    pub owner: &'static str,
    pub namespace: String,
    /// Beyond 63 bytes without its middle.
    pub name: String,
}

impl From<&OwnerName> for Label {
    fn from(name: &OwnerName) -> Self {
        Self {
            owner: owner_name(name.kind),
            namespace: owner::text(&name.namespace),
            name: owner::text(&name.name),
        }
    }
}

/// What the numbers of Services stand for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Labels {
    owners: BTreeMap<u32, Label>,
    ports: ServicePorts,
    services: BTreeSet<u32>,
}

impl Labels {
    pub(super) fn new(
        names: impl IntoIterator<Item = (u32, OwnerName)>,
        frontends: &BTreeMap<FrontendKey, abi::Service>,
    ) -> Self {
        let owners = names.into_iter().map(|(service, name)| (service, Label::from(&name))).collect();
        let services = frontends.values().map(|service| service.id).collect();
        Self { owners, ports: ServicePorts::new(frontends), services }
    }

    /// Of everything that was read.
    pub fn of(snapshot: &Snapshot) -> Self {
        Self::new(snapshot.names.iter().map(|(service, name)| (*service, *name)), &snapshot.frontends)
    }

    /// Whose number this is; `None`: the map has no name for it.
    pub fn owner(&self, service: u32) -> Option<&Label> {
        self.owners.get(&service)
    }

    /// The `port` of the Service that a frontend of it with this port leads to; `None`: it has no such frontend now, or
    /// only on nodePorts.
    pub fn port(&self, service: u32, protocol: Protocol, frontend: u16) -> Option<u16> {
        self.ports.0.get(&(service, protocol, frontend)).copied()
    }

    /// `namespace/name:port` as far as it is known, else `number N`; 0 is nobody's.
    pub fn text(&self, service: u32, port: Option<u16>) -> String {
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        match (self.owner(service), service) {
            (Some(label), _) => format!("{}/{}{port}", label.namespace, label.name),
            (None, 0) => "-".into(),
            (None, number) => format!("number {number}{port}"),
        }
    }

    /// The numbers of those that a filter names.
    pub fn numbers(&self, filter: &NameFilter) -> BTreeSet<u32> {
        let owners = self.owners.iter().filter(|(_, label)| filter.matches(&label.namespace, &label.name));
        owners.map(|(service, _)| *service).collect()
    }

    /// Every number that a frontend has.
    pub fn services(&self) -> impl Iterator<Item = u32> {
        self.services.iter().copied()
    }
}

/// By number, protocol and port of a frontend: the `port` of the Service.
///
/// Frontends of one port share a number of the port in the map; all but nodePorts have the port itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct ServicePorts(BTreeMap<(u32, Protocol, u16), u16>);

impl ServicePorts {
    fn new(frontends: &BTreeMap<FrontendKey, abi::Service>) -> Self {
        let is_node_port =
            |service: &abi::Service| FrontendKind::from_number(service.kind) == Some(FrontendKind::NodePort);
        let known: BTreeMap<(u32, u32, Protocol), u16> = frontends
            .iter()
            .filter(|(_, service)| !is_node_port(service))
            .map(|(key, service)| ((service.id, service.port, key.protocol), key.port))
            .collect();
        let mut ports = BTreeMap::new();
        // A nodePort that is a `port` of the same Service, too, says less than that.
        let (node_ports, others): (Vec<_>, Vec<_>) =
            frontends.iter().partition(|(_, service)| is_node_port(service));
        for (key, service) in node_ports.into_iter().chain(others) {
            if let Some(port) = known.get(&(service.id, service.port, key.protocol)) {
                ports.insert((service.id, key.protocol, key.port), *port);
            }
        }
        Self(ports)
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::frontend_kind;

    use super::*;
    use crate::entries::ServiceName;
    use crate::owner::Owner;

    #[test]
    fn numbers_have_names_and_ports() {
        let key =
            |addr: &str, port| FrontendKey { addr: addr.parse().unwrap(), port, protocol: Protocol::Tcp };
        let entry = |id, kind, port| abi::Service { id, kind, port, ..abi::Service::default() };
        let frontends = [
            (key("10.96.0.1", 80), entry(9, frontend_kind::CLUSTER_IP, 1)),
            (key("10.96.0.1", 443), entry(9, frontend_kind::CLUSTER_IP, 2)),
            (key("0.0.0.0", 30080), entry(9, frontend_kind::NODE_PORT, 1)),
            (key("0.0.0.0", 30443), entry(9, frontend_kind::NODE_PORT, 2)),
            (key("0.0.0.0", 30000), entry(8, frontend_kind::NODE_PORT, 3)),
            (key("0.0.0.0", 8080), entry(7, frontend_kind::HOST_PORT, 4)),
        ];
        let owner = Owner::from(ServiceName { namespace: "shop".into(), name: "web".into() });
        let labels = Labels::new([(9, OwnerName::from(&owner))], &frontends.into());
        let port = |service, port| labels.port(service, Protocol::Tcp, port);
        assert_eq!([80, 443, 30080, 30443].map(|of| port(9, of)), [80, 443, 80, 443].map(Some));
        assert_eq!((port(9, 81), port(8, 30000), port(7, 8080)), (None, None, Some(8080)));
        assert_eq!(labels.port(9, Protocol::Udp, 80), None);
        assert!(labels.services().eq([7, 8, 9]));
        assert_eq!(labels.text(9, Some(80)), "shop/web:80");
        assert_eq!(labels.text(9, None), "shop/web");
        assert_eq!((labels.text(7, Some(8080)), labels.text(0, None)), ("number 7:8080".into(), "-".into()));
        let numbers = |text: &str| labels.numbers(&text.parse().unwrap());
        assert_eq!((numbers("shop/web").len(), numbers("web").len(), numbers("other/web").len()), (1, 1, 0));
    }
}
