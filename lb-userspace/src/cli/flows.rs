//! `fairlead flows`.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::{Read, Usage, protocol, seconds};
use crate::entries::Protocol;
use crate::inspect::{EndpointFilter, NameFilter};
use crate::show::{self, Extent, FlowEdge, FlowFilter, FlowState, Order, Part};

pub(super) const EXAMPLES: &str = "\
Examples:
  fairlead flows --client 198.51.100.0/24 --state established
  fairlead flows --service web -n shop --part request -o json
  fairlead flows --backend 10.1.0.7:8080 --proto udp
  fairlead flows --sort idle --limit 10                 the longest without a packet
  fairlead flows --follow --frontend :443               what comes, changes and ends

Filters of one kind are alternatives, of several kinds conditions. Each flow has two entries, one for each direction.";

#[derive(Args)]
pub(super) struct Flows {
    #[command(flatten)]
    read: Read,
    /// Who asks
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    client: Vec<EndpointFilter>,
    /// What the client asks for
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    frontend: Vec<EndpointFilter>,
    /// Who answers
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    backend: Vec<EndpointFilter>,
    /// Client, frontend or backend
    #[arg(short, long, value_name = "ADDRESS[/PREFIX][:PORT]", value_delimiter = ',')]
    address: Vec<EndpointFilter>,
    /// tcp, udp or sctp
    #[arg(short, long, value_name = "PROTOCOL", value_delimiter = ',', value_parser = protocol)]
    proto: Vec<Protocol>,
    /// Where it is in its life
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_enum)]
    state: Vec<FlowState>,
    /// Where its packets are seen
    #[arg(long, value_name = "EDGE", value_delimiter = ',', value_enum)]
    edge: Vec<FlowEdge>,
    /// Only entries of this direction [with --follow: request]
    #[arg(long, value_enum)]
    part: Option<Part>,
    /// Of this Service, or of the host ports of this Pod
    #[arg(short, long, value_name = "[NAMESPACE/]NAME")]
    service: Option<NameFilter>,
    /// Where --service is; alone: of everything there
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// At most so many entries
    #[arg(short, long, value_name = "COUNT", conflicts_with = "follow")]
    limit: Option<usize>,
    /// What comes first; holds no more than --limit entries
    #[arg(long, value_enum, requires = "limit")]
    sort: Option<Order>,
    /// One line, or with -o json one object, for each flow that comes, changes or ends from now on, until it is interrupted
    #[arg(long)]
    follow: bool,
    /// Seconds between two looks of --follow
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds, requires = "follow")]
    interval: Duration,
}

impl Flows {
    pub(super) fn run(self) -> Result<()> {
        let filter = FlowFilter {
            client: self.client,
            frontend: self.frontend,
            backend: self.backend,
            any: self.address,
            protocols: self.proto,
            states: self.state,
            edges: self.edge,
            part: self.part,
            service: NameFilter::new(self.service, self.namespace.as_deref()).map_err(Usage::new)?,
        };
        if !self.follow {
            let extent = Extent { limit: self.limit, order: self.sort };
            return self.read.show(|to| show::flows(to, &filter, extent));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start the runtime")?;
        self.read.show(|to| runtime.block_on(show::follow(to, &filter, self.interval)))
    }
}
