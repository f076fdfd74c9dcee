//! `fairlead explain`: the way of one Service from the outside in, who gets what from it now, and what is wrong with it;
//! or who has an address and a port.
//!
//! [`explain`] is pure: what it is told is all it knows. [`load`] finds the objects (API server, files, what the agent
//! kept), [`programmed`] compares with the maps, [`render`] prints. What clients get is decided by [`crate::compile`],
//! as the agent decides it.
//!
//! The names of all fields are part of the public interface (`-o json`).

mod chain;
mod claims;
pub mod load;
mod mistakes;
pub mod node_ports;
mod objects;
pub mod programmed;
pub mod render;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::Serialize;

use self::node_ports::NodePorts;
pub use self::objects::Objects;
use crate::compile::Facts;
use crate::entries::{Algorithm, Family, FrontendKey, Protocol, ServiceName};
use crate::model::Node;
use crate::owner::Owner;

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// `svc/NAME`, in the namespace that is given beside.
    Service(String),
    /// `ADDRESS:PORT`, or with `/PROTO` behind.
    Address(SocketAddr, Option<Protocol>),
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is neither svc/NAME nor ADDRESS:PORT[/PROTO] (IPv6 in brackets: [fd00::1]:80/TCP)"
            )
        };
        for kind in ["svc/", "service/", "services/"] {
            if let Some(name) = text.strip_prefix(kind) {
                let valid = !name.is_empty() && !name.contains('/');
                return valid.then(|| Self::Service(name.to_owned())).ok_or_else(wrong);
            }
        }
        let (at, protocol) = match text.split_once('/') {
            None => (text, None),
            Some((at, name)) => {
                let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter();
                let named = known.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(name));
                (at, Some(named.ok_or_else(wrong)?))
            }
        };
        let at: SocketAddr = at.parse().map_err(|_| wrong())?;
        if at.port() == 0 { Err(wrong()) } else { Ok(Self::Address(at, protocol)) }
    }
}

/// The node that the explanation is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    pub name: String,
    pub zone: Option<String>,
    /// Its own, as far as they are known.
    pub addresses: BTreeSet<IpAddr>,
    /// There is such a Node, or somebody says so; else nothing is said of what is missing on it.
    pub known: bool,
    pub node_ports: NodePorts,
}

impl NodeFacts {
    /// Of a Node object.
    pub fn of(node: &Node) -> Self {
        let addresses = node.addresses.iter().copied().collect();
        Self { zone: node.zone.clone(), addresses, known: true, ..Self::unknown(&node.name) }
    }

    /// Of a node of which nobody says anything.
    pub fn unknown(name: &str) -> Self {
        Self {
            name: name.into(),
            zone: None,
            addresses: BTreeSet::new(),
            known: false,
            node_ports: NodePorts::default(),
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            node_name: self.name.clone(),
            zone: self.zone.clone(),
            algorithm: Algorithm::Maglev,
            mode: None,
        }
    }

    fn has(&self, addr: IpAddr) -> bool {
        addr.is_loopback() || self.addresses.contains(&addr)
    }
}

/// There is nothing to explain.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no Service {name}{hint}")]
    NoService { name: ServiceName, hint: String },
    #[error("nobody has {at}: no ClusterIP, NodePort, load-balancer IP, external IP or host port{hint}")]
    NobodyHas { at: String, hint: String },
}

/// All there is to say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Explanation {
    /// As it was asked for.
    pub asked: String,
    /// The node whose view it is.
    pub node: String,
    /// Where the objects come from.
    pub source: String,
    /// What kept more from being said.
    pub notes: Vec<String>,
    /// Whoever wants the address and port that were asked for; the first has them.
    pub claimants: Vec<Claimant>,
    /// `null`: a host port was asked for.
    pub service: Option<ServiceChain>,
    /// What clients get, by frontend.
    pub clients: Vec<FrontendView>,
    pub findings: Vec<Finding>,
}

/// Somebody who wants a frontend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Claimant {
    /// `Service` or `Pod`.
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    pub frontend: String,
    /// Seconds since 1970; 0: the object does not say.
    pub created: i64,
    pub wins: bool,
    pub why: String,
}

/// A Service from the outside in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceChain {
    pub namespace: String,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `null`: not known.
    pub selector: Option<BTreeMap<String, String>>,
    /// Of the selected Pods; `null`: not known.
    pub pods: Option<usize>,
    pub pods_ready: Option<usize>,
    pub internal_policy: &'static str,
    pub external_policy: &'static str,
    pub ports: Vec<PortChain>,
}

/// One of its ports.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PortChain {
    pub name: String,
    pub port: i32,
    pub protocol: String,
    /// `nodePort`, `port`, `targetPort`, `containerPort` and `hostPort`, in this order, as far as there are any.
    pub steps: Vec<Step>,
    pub endpoints: Vec<EndpointView>,
}

/// A number on the way, and whether it fits the next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    pub step: &'static str,
    pub value: String,
    /// `null`: nobody knows, or nothing comes behind.
    pub fits: Option<bool>,
    pub why: String,
}

/// An endpoint of a port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EndpointView {
    pub address: IpAddr,
    pub port: u16,
    /// `namespace/name`; `null`: no Pod that is known has the address.
    pub pod: Option<String>,
    pub node: Option<String>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// For clients inside of the cluster at the ClusterIP.
    pub inside: Use,
    /// For clients outside of it at the other frontends.
    pub outside: Use,
}

/// Whether an endpoint is used, and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Use {
    pub used: bool,
    pub why: &'static str,
}

/// A frontend, and what clients get there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendView {
    #[serde(skip)]
    pub key: FrontendKey,
    pub kind: String,
    /// `null`: every address of the node that NodePorts, or host ports, answer on.
    pub address: Option<IpAddr>,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    pub port: u16,
    pub protocol: String,
    /// Networks that may ask; `null`: everybody may.
    pub source_ranges: Option<Vec<String>>,
    pub inside: Answer,
    pub outside: Answer,
    /// What the maps of this node have; `null`: there are none, or it is not this node.
    pub programmed: Option<ProgrammedView>,
}

/// What a client gets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Answer {
    /// `served`, `rejected`, `dropped`, or `other`: another owner answers.
    pub outcome: &'static str,
    pub backends: Vec<SocketAddr>,
    pub why: String,
}

/// A frontend in the maps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ProgrammedView {
    pub present: bool,
    /// Backends for clients inside.
    pub inside: usize,
    /// Backends for clients outside.
    pub outside: usize,
    /// It is what the objects say.
    pub agrees: bool,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Somebody is not served.
    Error,
    /// Somebody may not be served, or something has no effect.
    Warning,
    /// As it is meant to be; who looks for a reason may have found it.
    Note,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        })
    }
}

/// Something wrong, and where to change it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// A word that stays the same.
    pub code: String,
    /// The field to change, of the Service unless the text names another object; `null`: none in particular.
    pub field: Option<String>,
    pub text: String,
}

/// Explains `subject`, a Service of `namespace` if it is one, as `node` sees it.
pub fn explain(
    subject: &Subject,
    namespace: &str,
    objects: &Objects,
    node: &NodeFacts,
) -> Result<Explanation, Error> {
    let claims = claims::Claims::of(objects, node);
    let asked = match subject {
        Subject::Service(name) => format!("Service {namespace}/{name}"),
        Subject::Address(at, protocol) => {
            format!("{at}{}", protocol.map(|p| format!("/{p}")).unwrap_or_default())
        }
    };
    let mut explanation = Explanation {
        asked,
        node: node.name.clone(),
        source: String::new(),
        notes: vec![],
        claimants: vec![],
        service: None,
        clients: vec![],
        findings: vec![],
    };
    let owner = owner(subject, namespace, objects, node)?;
    if let Subject::Address(at, protocol) = subject {
        explanation.claimants = claims.claimants(*at, *protocol, node);
    }
    match &owner {
        Owner::Service(name) => {
            let service = &objects.services[name];
            let compiled = claims::compiled(&owner, objects, node);
            explanation.service = Some(chain::chain(service, objects, node));
            explanation.clients = claims.clients(&owner, &compiled.0);
            explanation.findings = mistakes::find(service, objects, node, &claims, &compiled);
        }
        Owner::Pod(_) => {
            let compiled = claims::compiled(&owner, objects, node);
            explanation.clients = claims.clients(&owner, &compiled.0);
            explanation.findings = mistakes::of_maps(&owner, &claims, &compiled);
        }
    }
    if let Subject::Address(at, protocol) = subject
        && explanation.claimants.is_empty()
    {
        let finding = match claims.withheld(*at, *protocol, node) {
            Some(key) => mistakes::node_port_address(*at, key, node),
            None => mistakes::port_not_served(*at, *protocol, &explanation.clients),
        };
        explanation.findings.insert(0, finding);
    }
    if !node.known {
        let name = &node.name;
        explanation.notes.push(format!(
            "no Node {name} is known: this is for a node without endpoints of its own; --node-name names another"
        ));
    }
    explanation.findings.sort_by_key(|finding| finding.severity);
    Ok(explanation)
}

/// Whom to explain: of an address whoever wins it, else whoever has the address for other ports.
pub fn owner(
    subject: &Subject,
    namespace: &str,
    objects: &Objects,
    node: &NodeFacts,
) -> Result<Owner, Error> {
    match subject {
        Subject::Service(name) => {
            let name = ServiceName { namespace: namespace.into(), name: name.as_str().into() };
            if objects.services.contains_key(&name) {
                return Ok(name.into());
            }
            let elsewhere: Vec<_> = objects
                .services
                .keys()
                .filter(|other| other.name == name.name)
                .map(|n| &*n.namespace)
                .collect();
            let hint = match elsewhere.as_slice() {
                [] => String::new(),
                others => format!("; one of that name is in namespace {} (-n)", others.join(", ")),
            };
            Err(Error::NoService { name, hint })
        }
        Subject::Address(at, protocol) => {
            let claims = claims::Claims::of(objects, node);
            claims.owner(*at, *protocol, node).ok_or_else(|| {
                let hint = claims::whose(at.ip(), objects, node);
                Error::NobodyHas { at: at.to_string(), hint }
            })
        }
    }
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests;
