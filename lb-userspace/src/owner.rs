//! Whose frontends: a Service's, or those of the host ports of a Pod.

use std::fmt;
use std::sync::Arc;

use crate::entries::ServiceName;

/// Whom a frontend belongs to. A Service comes before a Pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    Service(ServiceName),
    Pod(PodName),
}

impl Owner {
    /// The Service, if it is one.
    pub const fn service(&self) -> Option<&ServiceName> {
        match self {
            Self::Service(name) => Some(name),
            Self::Pod(_) => None,
        }
    }

    /// The Pod, if it is one.
    pub const fn pod(&self) -> Option<&PodName> {
        match self {
            Self::Service(_) => None,
            Self::Pod(name) => Some(name),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Pod(name) => write!(f, "Pod {name}"),
        }
    }
}

impl From<ServiceName> for Owner {
    fn from(name: ServiceName) -> Self {
        Self::Service(name)
    }
}

impl From<PodName> for Owner {
    fn from(name: PodName) -> Self {
        Self::Pod(name)
    }
}

/// Name of a Pod. Many places keep it; they share it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PodName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
