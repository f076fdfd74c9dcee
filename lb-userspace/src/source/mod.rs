//! Where changes of Services, EndpointSlices, Pods and the Node come from: a Kubernetes API server, or manifest
//! files. Both convert at their border: Kubernetes' types go no further than this directory.

mod budget;
pub mod convert;
mod known;
pub mod kubernetes;
pub mod manifests;

use std::collections::BTreeSet;
use std::fmt;

use tokio::sync::mpsc;

use crate::model::Change;

/// Changes on their way to the agent. While it is busy, sources wait.
pub const CHANNEL: usize = 1024;

/// What a source tells the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Changed(Change),
    /// Every object of this kind has been told once.
    Listed(Kind),
    /// Objects of this kind may not be read, and everything else goes on without them until they may.
    Refused(Kind),
    /// Whether the source can be asked about objects of this kind; until it cannot, it can.
    Answers(Kind, bool),
    /// So many objects of this kind cannot be read now, or documents in manifests, whatever their kind; what was
    /// known of them stays.
    Unreadable(Option<Kind>, usize),
}

/// A kind of objects that is listed and watched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Services,
    EndpointSlices,
    /// Those of this node.
    Pods,
    Nodes,
    /// Not every API server has them.
    ServiceCidrs,
}

impl Kind {
    /// Every kind that every API server has; the agent writes nothing before all of them are listed.
    pub const ALL: [Self; 4] = [Self::Services, Self::EndpointSlices, Self::Pods, Self::Nodes];

    /// Services are served without objects of this kind, if they may not be read.
    pub const fn is_dispensable(self) -> bool {
        matches!(self, Self::Pods)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Services => "Services",
            Self::EndpointSlices => "EndpointSlices",
            Self::Pods => "Pods",
            Self::Nodes => "Nodes",
            Self::ServiceCidrs => "ServiceCIDRs",
        })
    }
}

/// The kinds that have not been listed yet: what readiness waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unlisted(BTreeSet<Kind>);

impl Default for Unlisted {
    fn default() -> Self {
        Self(BTreeSet::from(Kind::ALL))
    }
}

impl Unlisted {
    pub fn note(&mut self, kind: Kind) {
        self.0.remove(&kind);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Unlisted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join(", "))
    }
}

/// The agent is gone; nobody needs changes any more.
#[derive(Debug)]
struct Closed;

type Sender = mpsc::Sender<Event>;
