//! `fairlead flows`: one line for each direction of each flow, written as it is read: there may be a million.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use super::To;
use crate::entries::Protocol;
use crate::inspect::{EndpointFilter, FlowPosition, FlowView, Inspector, Labels, NameFilter};

/// Which flows are asked for; an empty list or `None` is any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FlowFilter {
    pub client: Vec<EndpointFilter>,
    pub frontend: Vec<EndpointFilter>,
    pub backend: Vec<EndpointFilter>,
    /// The client, the frontend or the backend.
    pub any: Vec<EndpointFilter>,
    pub protocols: Vec<Protocol>,
    pub states: Vec<FlowState>,
    pub edges: Vec<FlowEdge>,
    pub part: Option<Part>,
    pub service: NameFilter,
}

/// Where a flow is in its life.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowState {
    /// The client has not heard an answer
    Pending,
    Established,
    /// One end has sent a FIN
    Closing,
    /// Ended by a RST
    Closed,
}

impl FlowState {
    const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }
}

/// Where a packet of the flow is seen.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[value(rename_all = "snake_case")]
pub enum FlowEdge {
    NicIn,
    NicOut,
    PodIn,
    PodOut,
}

impl FlowEdge {
    const fn name(self) -> &'static str {
        match self {
            Self::NicIn => "nic_in",
            Self::NicOut => "nic_out",
            Self::PodIn => "pod_in",
            Self::PodOut => "pod_out",
        }
    }
}

/// A direction of a flow.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// From the client
    Request,
    /// From the backend
    Reply,
}

/// What comes first.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The longest without a packet
    Idle,
    /// The last with a packet
    Recent,
}

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    /// Entries at most.
    pub limit: Option<usize>,
    /// Only with a limit.
    pub order: Option<Order>,
}

/// An entry as its ends are called: whichever direction it is of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FlowLine<'a> {
    #[serde(flatten)]
    pub flow: &'a FlowView,
    pub client: IpAddr,
    pub client_port: u16,
    /// `null`: the client asks for the backend itself.
    pub frontend: Option<IpAddr>,
    pub frontend_port: Option<u16>,
    pub backend_address: IpAddr,
    pub backend_port: u16,
    /// Of the Service, or of the Pod with the host port; `null`: it has no name in the map.
    pub namespace: Option<&'a str>,
    pub name: Option<&'a str>,
    /// The `port` of the Service; `null`: it has no such frontend any more.
    pub service_port: Option<u16>,
}

/// Client, frontend and backend.
fn ends(flow: &FlowView) -> [(IpAddr, u16); 3] {
    let asked = (flow.destination, flow.destination_port);
    let answered = (flow.new_source, flow.new_source_port);
    if flow.reply {
        let client = (flow.new_destination, flow.new_destination_port);
        [client, answered, (flow.source, flow.source_port)]
    } else {
        let backend = (flow.new_destination, flow.new_destination_port);
        [(flow.source, flow.source_port), asked, backend]
    }
}

impl<'a> FlowLine<'a> {
    pub fn new(flow: &'a FlowView, labels: &'a Labels) -> Self {
        let [client, frontend, backend] = ends(flow);
        let frontend = (flow.carry != "direct").then_some(frontend);
        let label = labels.owner(flow.service);
        let protocol = Protocol::from_number(flow.protocol);
        Self {
            flow,
            client: client.0,
            client_port: client.1,
            frontend: frontend.map(|(addr, _)| addr),
            frontend_port: frontend.map(|(_, port)| port),
            backend_address: backend.0,
            backend_port: backend.1,
            namespace: label.map(|label| label.namespace.as_str()),
            name: label.map(|label| label.name.as_str()),
            service_port: frontend.and_then(|(_, port)| labels.port(flow.service, protocol?, port)),
        }
    }

    /// A row of the table.
    pub(super) fn row(&self, labels: &Labels, wide: bool) -> String {
        let flow = self.flow;
        let at = |addr, port| SocketAddr::new(addr, port).to_string();
        let protocol = Protocol::from_number(flow.protocol)
            .map_or_else(|| flow.protocol.to_string(), |known| known.to_string());
        let frontend = match (self.frontend, self.frontend_port) {
            (Some(addr), Some(port)) => at(addr, port),
            _ => "-".into(),
        };
        let mut cells = vec![
            format!("{:7}", flow.side),
            format!("{protocol:5}"),
            format!("{:7}", if flow.reply { "reply" } else { "request" }),
            format!("{:11}", flow.state),
            format!("{:>7}", format!("{} s", flow.idle_seconds)),
            format!("{:21}", at(self.client, self.client_port)),
            format!("{frontend:21}"),
            format!("{:21}", at(self.backend_address, self.backend_port)),
        ];
        if wide {
            let pair = |from, to| format!("{:45}", format!("{from} > {to}"));
            cells.extend([
                format!("{:7}", flow.carry),
                pair(at(flow.source, flow.source_port), at(flow.destination, flow.destination_port)),
                pair(
                    at(flow.new_source, flow.new_source_port),
                    at(flow.new_destination, flow.new_destination_port),
                ),
            ]);
        }
        cells.push(labels.text(flow.service, self.service_port));
        cells.join("  ")
    }
}

/// The header of [`FlowLine::row`].
pub(super) fn header(wide: bool) -> String {
    let mut text = format!(
        "{:7}  {:5}  {:7}  {:11}  {:>7}  {:21}  {:21}  {:21}",
        "EDGE", "PROTO", "PART", "STATE", "IDLE", "CLIENT", "FRONTEND", "BACKEND"
    );
    if wide {
        text.extend([format!("  {:7}  {:45}  {:45}", "CARRY", "SEEN AS", "GOES ON AS")]);
    }
    text + "  SERVICE"
}

impl FlowFilter {
    /// `services`: the numbers that [`FlowFilter::service`] stands for.
    pub fn matches(&self, flow: &FlowView, services: &BTreeSet<u32>) -> bool {
        let [client, frontend, backend] = ends(flow);
        let is_at = |filters: &[EndpointFilter], at: &[(IpAddr, u16)]| {
            filters.is_empty()
                || filters.iter().any(|filter| at.iter().any(|(addr, port)| filter.matches(*addr, *port)))
        };
        let is_direct = flow.carry == "direct";
        let frontends = if is_direct { &[][..] } else { &[frontend] };
        let part = self.part.is_none_or(|part| (part == Part::Reply) == flow.reply);
        part && (self.protocols.is_empty()
            || self.protocols.iter().any(|protocol| protocol.number() == flow.protocol))
            && (self.states.is_empty() || self.states.iter().any(|state| state.name() == flow.state))
            && (self.edges.is_empty() || self.edges.iter().any(|edge| edge.name() == flow.side))
            && is_at(&self.client, &[client])
            && is_at(&self.frontend, frontends)
            && is_at(&self.backend, &[backend])
            && is_at(&self.any, &[client, frontend, backend])
            && (self.service.is_any() || services.contains(&flow.service))
    }

    /// The numbers of the Services that are asked for; none if all are.
    pub(super) fn numbers(&self, labels: &Labels) -> BTreeSet<u32> {
        if self.service.is_any() { BTreeSet::new() } else { labels.numbers(&self.service) }
    }
}

/// Lists them.
pub fn flows(to: &mut To<'_>, filter: &FlowFilter, extent: Extent) -> Result<()> {
    let inspector = Inspector::open(to.bpffs)?;
    let labels = inspector.labels()?;
    let services = filter.numbers(&labels);
    if services.is_empty() && !filter.service.is_any() {
        bail!("no frontend of {} is programmed here; see `fairlead services`", filter.service);
    }
    let mut list = List::begin(to, &labels)?;
    let mut ordered = extent.order.map(|order| Ordered::new(order, extent.limit.unwrap_or(usize::MAX)));
    let mut at = FlowPosition::default();
    let mut failed = None;
    'tables: loop {
        let next = inspector.flow_slice(at, &mut |flow| {
            if failed.is_some() || !filter.matches(&flow, &services) {
                return;
            }
            match &mut ordered {
                Some(ordered) => ordered.take(flow),
                None if extent.limit.is_some_and(|limit| list.count >= limit) => {}
                None => failed = list.write(&flow).err(),
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let is_full = ordered.is_none() && extent.limit.is_some_and(|limit| list.count >= limit);
        match next {
            Some(next) if !is_full => at = next,
            _ => break 'tables,
        }
    }
    for flow in ordered.into_iter().flat_map(Ordered::into_list) {
        list.write(&flow)?;
    }
    list.end()
}

/// A table or a JSON list under way.
struct List<'a, 'b> {
    out: &'a mut (dyn Write + 'b),
    labels: &'a Labels,
    json: bool,
    wide: bool,
    count: usize,
}

impl<'a, 'b> List<'a, 'b> {
    fn begin(to: &'a mut To<'b>, labels: &'a Labels) -> Result<Self> {
        let (json, wide) = (to.json, to.wide);
        if json {
            write!(to.out, "[")?;
        } else {
            writeln!(to.out, "{}", header(wide))?;
        }
        Ok(Self { out: &mut *to.out, labels, json, wide, count: 0 })
    }

    fn write(&mut self, flow: &FlowView) -> Result<()> {
        let line = FlowLine::new(flow, self.labels);
        if self.json {
            write!(self.out, "{}\n  ", if self.count == 0 { "" } else { "," })?;
            serde_json::to_writer(&mut self.out, &line)?;
        } else {
            writeln!(self.out, "{}", line.row(self.labels, self.wide))?;
        }
        self.count += 1;
        Ok(())
    }

    fn end(self) -> Result<()> {
        if self.json {
            writeln!(self.out, "{}]", if self.count == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// The first so many in an order; holds no more than these.
struct Ordered {
    order: Order,
    limit: usize,
    /// The last of them is on top.
    heap: BinaryHeap<Ranked>,
    /// How many it was shown.
    read: u64,
}

/// Compared by rank alone.
struct Ranked {
    rank: (Reverse<u64>, u64),
    flow: FlowView,
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank.cmp(&other.rank)
    }
}

impl Ordered {
    fn new(order: Order, limit: usize) -> Self {
        Self { order, limit, heap: BinaryHeap::new(), read: 0 }
    }

    fn take(&mut self, flow: FlowView) {
        // Of two that are alike the one that was read first comes first.
        self.read += 1;
        let idle = flow.idle_seconds;
        let rank = match self.order {
            Order::Idle => (Reverse(idle), self.read),
            Order::Recent => (Reverse(u64::MAX - idle), self.read),
        };
        self.heap.push(Ranked { rank, flow });
        if self.heap.len() > self.limit {
            self.heap.pop();
        }
    }

    fn into_list(self) -> impl Iterator<Item = FlowView> {
        self.heap.into_sorted_vec().into_iter().map(|ranked| ranked.flow)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::show) fn request(client: &str, state: &'static str, idle: u64) -> FlowView {
        let client: SocketAddr = client.parse().unwrap();
        FlowView {
            side: "nic_in",
            protocol: 6,
            source: client.ip(),
            source_port: client.port(),
            destination: "192.0.2.1".parse().unwrap(),
            destination_port: 30080,
            new_source: "192.0.2.1".parse().unwrap(),
            new_source_port: 12345,
            new_destination: "10.1.0.7".parse().unwrap(),
            new_destination_port: 8080,
            reply: false,
            state,
            carry: "forward",
            service: 9,
            backend: 3,
            idle_seconds: idle,
        }
    }

    /// The other direction of [`request`].
    fn reply(client: &str) -> FlowView {
        let to = request(client, "established", 0);
        FlowView {
            source: to.new_destination,
            source_port: to.new_destination_port,
            destination: to.new_source,
            destination_port: to.new_source_port,
            new_source: to.destination,
            new_source_port: to.destination_port,
            new_destination: to.source,
            new_destination_port: to.source_port,
            reply: true,
            ..to
        }
    }

    #[test]
    fn every_part_of_both_directions_can_be_asked_for() {
        let flows = [request("198.51.100.1:5000", "established", 0), reply("198.51.100.1:5000")];
        let filter = |text: &str| -> Vec<EndpointFilter> { vec![text.parse().unwrap()] };
        let none = FlowFilter::default;
        let wanted: [(FlowFilter, bool); 16] = [
            (none(), true),
            (FlowFilter { client: filter("198.51.100.0/24:5000"), ..none() }, true),
            (FlowFilter { client: filter("192.0.2.1"), ..none() }, false),
            (FlowFilter { frontend: filter(":30080"), ..none() }, true),
            (FlowFilter { frontend: filter("10.1.0.7"), ..none() }, false),
            (FlowFilter { backend: filter("10.1.0.7:8080"), ..none() }, true),
            (FlowFilter { backend: filter("10.1.0.7:30080"), ..none() }, false),
            (FlowFilter { any: filter(":8080"), ..none() }, true),
            (FlowFilter { any: filter(":12345"), ..none() }, false),
            (FlowFilter { protocols: vec![Protocol::Udp, Protocol::Tcp], ..none() }, true),
            (FlowFilter { protocols: vec![Protocol::Udp], ..none() }, false),
            (FlowFilter { states: vec![FlowState::Established], ..none() }, true),
            (FlowFilter { states: vec![FlowState::Pending, FlowState::Closed], ..none() }, false),
            (FlowFilter { edges: vec![FlowEdge::NicIn], ..none() }, true),
            (FlowFilter { edges: vec![FlowEdge::PodOut], ..none() }, false),
            (FlowFilter { client: [filter("10.0.0.1"), filter(":5000")].concat(), ..none() }, true),
        ];
        for (filter, expected) in wanted {
            for flow in &flows {
                assert_eq!(filter.matches(flow, &BTreeSet::new()), expected, "{filter:?} {flow:?}");
            }
        }
        let part = FlowFilter { part: Some(Part::Reply), ..none() };
        assert_eq!(flows.each_ref().map(|flow| part.matches(flow, &BTreeSet::new())), [false, true]);
        let service = FlowFilter { service: "web".parse().unwrap(), ..none() };
        let matches = |numbers: &[u32]| service.matches(&flows[0], &numbers.iter().copied().collect());
        assert_eq!((matches(&[9]), matches(&[8]), matches(&[])), (true, false, false));
        // Who asks for a backend itself asks for no frontend.
        let direct = FlowView { carry: "direct", ..flows[0].clone() };
        let of_frontend = FlowFilter { frontend: filter(":30080"), ..none() };
        assert!(!of_frontend.matches(&direct, &BTreeSet::new()));
    }

    #[test]
    fn the_first_of_an_order_and_no_more_are_held() {
        let of = |order| {
            let mut ordered = Ordered::new(order, 2);
            for (port, idle) in [(1, 5), (2, 9), (3, 0), (4, 7)] {
                ordered.take(request(&format!("198.51.100.1:{port}"), "established", idle));
                assert!(ordered.heap.len() <= 2);
            }
            ordered.into_list().map(|flow| flow.source_port).collect::<Vec<_>>()
        };
        assert_eq!((of(Order::Idle), of(Order::Recent)), (vec![2, 4], vec![3, 1]));
    }

    #[test]
    fn rows_and_json_stay_as_they_are() {
        let labels = super::super::tests::labels();
        let flow = request("198.51.100.1:5000", "established", 3);
        let line = FlowLine::new(&flow, &labels);
        let table = |wide| format!("{}\n{}", header(wide), line.row(&labels, wide));
        assert_eq!(
            table(false),
            "EDGE     PROTO  PART     STATE           IDLE  CLIENT                 FRONTEND               BACKEND                SERVICE\n\
             nic_in   TCP    request  established      3 s  198.51.100.1:5000      192.0.2.1:30080        10.1.0.7:8080          shop/web:80"
        );
        let wide = table(true);
        assert!(
            wide.ends_with(
                "  forward  198.51.100.1:5000 > 192.0.2.1:30080            192.0.2.1:12345 > 10.1.0.7:8080                shop/web:80"
            ),
            "{wide}"
        );
        assert_eq!(
            serde_json::to_value(&line).unwrap(),
            serde_json::json!({
                "side": "nic_in", "protocol": 6, "source": "198.51.100.1", "source_port": 5000,
                "destination": "192.0.2.1", "destination_port": 30080, "new_source": "192.0.2.1",
                "new_source_port": 12345, "new_destination": "10.1.0.7", "new_destination_port": 8080,
                "reply": false, "state": "established", "carry": "forward", "service": 9, "backend": 3,
                "idle_seconds": 3, "client": "198.51.100.1", "client_port": 5000, "frontend": "192.0.2.1",
                "frontend_port": 30080, "backend_address": "10.1.0.7", "backend_port": 8080,
                "namespace": "shop", "name": "web", "service_port": 80,
            })
        );
    }
}
