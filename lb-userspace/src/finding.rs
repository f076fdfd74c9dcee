//! What is wrong with one object: said once, of that object, while everything else goes on.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::entries::FrontendKey;
use crate::owner::Owner;

/// Something that keeps (a part of) a Service, or a host port of a Pod, from working as written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum Finding {
    /// Not an IP address.
    #[error("{field}: {value:?} is not an IP address; it is left out")]
    BadAddress { field: String, value: String },
    /// Not a network.
    #[error("{field}: {value:?} is not a network; it admits nobody")]
    BadNetwork { field: String, value: String },
    /// An address that cannot be an address of this kind.
    #[error("{field}: {value} cannot be one; it is left out")]
    UnusableAddress { field: String, value: String },
    /// A value the API does not define.
    #[error("{field}: unknown value {value:?}; taken as {taken}")]
    UnknownValue { field: String, value: String, taken: &'static str },
    /// A host port is asked for at an address of a family that the Pod has no address of.
    #[error("port {port}: hostIP {addr} is of a family in which the Pod has no address; it is left out")]
    NoPodAddress { port: String, addr: IpAddr },
    /// More than the API server of Kubernetes lets into an object, or than anybody can serve.
    #[error("{field}: {count} are too many; the first {most} are used")]
    TooMany { field: String, count: usize, most: usize },
    /// A port number outside 1 to 65535.
    #[error("{field}: {value} is no port number; it is left out")]
    BadPort { field: String, value: i64 },
    /// A time-out that is none.
    #[error("{field}: {value} is no time-out; {taken} is used")]
    BadTimeout { field: String, value: i64, taken: u32 },
    /// A protocol that is not translated.
    #[error("port {port}: protocol {protocol} is not supported; the port is left out")]
    UnsupportedProtocol { port: String, protocol: String },
    /// Two ports of one Service, or two of its addresses, make the same frontend.
    #[error("{key} appears twice; the first is used")]
    Duplicate { key: FrontendKey },
    /// Type NodePort or LoadBalancer without a number for this port.
    #[error("port {port}: no nodePort is given, and nobody here allocates one")]
    NoNodePort { port: String },
    /// A type that has a cluster IP, without one.
    #[error("no clusterIP is given, and nobody here allocates one")]
    NoClusterIp,
    /// A mode that needs tunnels between nodes, of which this one was not told.
    #[error(
        "annotation fairlead.io/mode: there are no tunnels between nodes here (--mode, --tunnel-port); taken as snat"
    )]
    NoTunnels,
    /// An older Service or Pod has this frontend.
    #[error("{key} belongs to {owner}; it is left out here")]
    Taken { key: FrontendKey, owner: Owner },
    /// Nobody can be answered on its `healthCheckNodePort`.
    #[error("healthCheckNodePort: cannot listen on {at} ({reason}); load balancers get no answer there")]
    HealthPort { at: SocketAddr, reason: String },
    /// No room in the maps.
    #[error(
        "does not fit: {need} more {what} needed, {free} of {limit} free ({flag} sets the limit); \
         it stays as it was"
    )]
    DoesNotFit { what: &'static str, need: u64, free: u64, limit: u64, flag: &'static str },
    /// No room in a map whose size is fixed.
    #[error("does not fit: {need} more {what} needed, {free} of {limit} free; it stays as it was")]
    NoRoomFor { what: &'static str, need: u64, free: u64, limit: u64 },
    /// No room in `ADDRESSES4/6`.
    #[error("no room for address {addr} beside {limit} others of its family; it is not marked as ours")]
    AddressDoesNotFit { addr: IpAddr, limit: u32 },
    /// No room in `NETWORKS4/6`.
    #[error("no room for network {net} beside {limit} others of its family; it is not known as what it is")]
    NetworkDoesNotFit { net: IpNet, limit: u32 },
    /// No room for a Maglev table, only for a plain list.
    #[error("no room for its Maglev tables (--max-backends sets the limit); backends are chosen at random")]
    ListInsteadOfTable,
}

impl Finding {
    /// What it is, in one word.
    pub fn kind(&self) -> String {
        let mut text = format!("{self:?}");
        let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
        text.truncate(end);
        text
    }

    /// It depends on other Services and the room in the maps, not on the object alone.
    pub fn is_of_maps(&self) -> bool {
        matches!(
            self,
            Self::Taken { .. }
                | Self::DoesNotFit { .. }
                | Self::NoRoomFor { .. }
                | Self::AddressDoesNotFit { .. }
                | Self::NetworkDoesNotFit { .. }
                | Self::ListInsteadOfTable
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_has_a_kind() {
        assert_eq!(Finding::NoClusterIp.kind(), "NoClusterIp");
        let finding = Finding::BadAddress { field: "spec.clusterIPs".into(), value: "x".into() };
        assert_eq!(finding.kind(), "BadAddress");
    }
}
