//! All objects of a model at one moment, apart from it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Change, EndpointSlice, Model, Node, Pod, Service};

/// Everything that a [`Model`] knows.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Objects {
    pub services: Vec<Arc<Service>>,
    pub slices: Vec<Arc<EndpointSlice>>,
    /// Those of this node with host ports.
    pub pods: Vec<Arc<Pod>>,
    /// This node.
    pub node: Option<Node>,
    /// Names and addresses of the others, as far as anybody has asked for them.
    pub peers: BTreeMap<String, Vec<IpAddr>>,
    /// Names and networks; `None`: not known, which is not the same as that there are none.
    pub service_cidrs: Option<Vec<(String, Vec<IpNet>)>>,
}

impl Objects {
    /// What tells an empty model all of it.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        let services = self.services.iter().map(|service| Change::Service(Arc::clone(service)));
        let slices = self.slices.iter().map(|slice| Change::Slice(Arc::clone(slice)));
        let pods = self.pods.iter().map(|pod| Change::Pod(Arc::clone(pod)));
        let node = self.node.iter().map(|node| Change::Node(Box::new(node.clone())));
        let peer = |(name, addresses): (&String, &Vec<IpAddr>)| {
            Change::Node(Box::new(Node { addresses: addresses.clone(), ..Node::named(name) }))
        };
        let peers = self.peers.iter().map(peer);
        let cidrs = self.service_cidrs.iter().flatten();
        let cidrs = cidrs.map(|(name, nets)| Change::ServiceCidr(name.clone(), nets.clone()));
        services.chain(slices).chain(pods).chain(node).chain(peers).chain(cidrs)
    }
}

impl Model {
    /// Everything it knows; of ServiceCIDRs it cannot say itself whether they are known.
    pub fn objects(&self, service_cidrs_known: bool) -> Objects {
        let cidrs = || self.service_cidrs.iter().map(|(name, nets)| (name.clone(), nets.clone())).collect();
        Objects {
            services: self.services.values().cloned().collect(),
            slices: self.slices.values().flatten().cloned().collect(),
            pods: self.pods.values().cloned().collect(),
            node: self.node.clone(),
            peers: self.peers.clone(),
            service_cidrs: service_cidrs_known.then(cidrs),
        }
    }
}
