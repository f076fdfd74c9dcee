//! `fairlead services` and `fairlead backends`.

use anyhow::Result;
use clap::Args;

use super::{Read, Usage, frontend_kind, protocol};
use crate::entries::{FrontendKind, Protocol};
use crate::inspect::{EndpointFilter, NameFilter};
use crate::show::{self, BackendFilter, BackendState, ServiceFilter};

pub(super) const SERVICES_EXAMPLES: &str = "\
Examples:
  fairlead services                           every frontend
  fairlead services web -n shop -o wide       one Service, all columns
  fairlead services --kind nodeport,hostport
  fairlead services --frontend :443 -o json";

pub(super) const BACKENDS_EXAMPLES: &str = "\
Examples:
  fairlead backends                           what is in use
  fairlead backends web -n shop               those that a Service may choose
  fairlead backends --state terminating
  fairlead backends --address 10.1.0.0/24 -o json";

#[derive(Args)]
pub(super) struct Services {
    /// Only those of this Service, or of the host ports of this Pod
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: Option<NameFilter>,
    /// Only those of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// ClusterIP, NodePort, LoadBalancer, ExternalIP or HostPort
    #[arg(short, long, value_name = "KIND", value_delimiter = ',', value_parser = frontend_kind)]
    kind: Vec<FrontendKind>,
    /// What clients ask for; nodePorts are at every address
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    frontend: Vec<EndpointFilter>,
    /// tcp, udp or sctp
    #[arg(short, long, value_name = "PROTOCOL", value_delimiter = ',', value_parser = protocol)]
    proto: Vec<Protocol>,
    #[command(flatten)]
    read: Read,
}

impl Services {
    pub(super) fn run(self) -> Result<()> {
        let filter = ServiceFilter {
            name: NameFilter::new(self.name, self.namespace.as_deref()).map_err(Usage::new)?,
            kinds: self.kind,
            frontend: self.frontend,
            protocols: self.proto,
        };
        self.read.show(|to| show::services(to, &filter))
    }
}

#[derive(Args)]
pub(super) struct Backends {
    /// Only those that this Service, or the host ports of this Pod, may choose
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: Option<NameFilter>,
    /// Only those that Services of this namespace may choose
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Where they answer
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    address: Vec<EndpointFilter>,
    /// What they take
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_enum)]
    state: Vec<BackendState>,
    /// Also ids that are not in use
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    read: Read,
}

impl Backends {
    pub(super) fn run(self) -> Result<()> {
        let filter = BackendFilter {
            name: NameFilter::new(self.name, self.namespace.as_deref()).map_err(Usage::new)?,
            address: self.address,
            states: self.state,
            all: self.all,
        };
        self.read.show(|to| show::backends(to, &filter))
    }
}
