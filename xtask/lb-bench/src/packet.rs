//! Group `packet`: what one packet costs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use fairlead::datapath::Place;
use lb_common::{V4, V6, tunnel};

use crate::bpf::{Output, ProgType};
use crate::frame::{Family, Segment, tcp};
use crate::live::Live;
use crate::node::{Link, Node, PORT, PORT_HERE, PORT_NOWHERE, PORT_THERE};
use crate::sender::{Client, Pick, Sender, TC_NEXT, Traffic, XDP_PASS};
use crate::series::Series;

const GROUP: &str = "packet";
pub(crate) const XDP_TX: u32 = 3;
/// `TC_ACT_REDIRECT`
const TC_REDIRECT: u32 = 7;
/// New flows that a flood takes turns with: more than any table holds.
pub(crate) const FLOOD: u32 = 1 << 30;
/// The first of them that begins no known flow anew: more than are known.
const NEW: u32 = 1 << 24;

/// Known flows of one kind, at most, beside which everything else is measured: a flow table of the default size or twice that has
/// room for all kinds.
const FEW: u32 = 100_000;

/// Answers that tc writes into one buffer: each leaves less of it, and the kernel makes it longer.
const ANSWERS: u32 = 16;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// How often everything is measured
    #[arg(long, default_value_t = 31)]
    rounds: u32,
    /// Packets of a round
    #[arg(long, default_value_t = 20_000)]
    packets: u32,
    /// How many flows are known
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 100_000, 1_000_000])]
    flows: Vec<u32>,
    /// How many Services there are
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10_000, 100_000])]
    services: Vec<u32>,
}

/// A kind of packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum What {
    /// Of flows that were silent for a second and more.
    NodePortHereIdle,
    NodePortHere,
    NodePortThere,
    ReplyHere,
    ReplyThere,
    NodePortHereByTc,
    ClusterIp,
    ClusterIpReply,
    NewNodePortHere,
    NewNodePortThere,
    NewClusterIp,
    FloodNodePortHere,
    NoBackends,
    NoBackendsFromPod,
    NotOurs,
    NotOursFromPod,
    /// To the node of its backend, which answers the client itself.
    Tunnelled,
}

/// What flows a kind of packet needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Flows {
    /// They are there already.
    Known,
    /// Each packet begins one, in a table with room.
    New,
    /// Each packet begins one, in a table that is full.
    Flood,
    /// None.
    No,
}

impl What {
    /// All that there are where the node that is asked brings back the answers.
    ///
    /// Idle flows come first in each round: others wake them.
    const ALL: [Self; 16] = [
        Self::NodePortHereIdle,
        Self::NodePortHere,
        Self::NodePortThere,
        Self::ReplyHere,
        Self::ReplyThere,
        Self::NodePortHereByTc,
        Self::ClusterIp,
        Self::ClusterIpReply,
        Self::NewNodePortHere,
        Self::NewNodePortThere,
        Self::NewClusterIp,
        Self::FloodNodePortHere,
        Self::NoBackends,
        Self::NoBackendsFromPod,
        Self::NotOurs,
        Self::NotOursFromPod,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::NodePortHereIdle => "nodeport-here-idle",
            Self::NodePortHere => "nodeport-here",
            Self::NodePortThere => "nodeport-there",
            Self::ReplyHere => "reply-here",
            Self::ReplyThere => "reply-there",
            Self::NodePortHereByTc => "nodeport-here-tc",
            Self::ClusterIp => "clusterip",
            Self::ClusterIpReply => "clusterip-reply",
            Self::NewNodePortHere => "new-nodeport-here",
            Self::NewNodePortThere => "new-nodeport-there",
            Self::NewClusterIp => "new-clusterip",
            Self::FloodNodePortHere => "flood-nodeport-here",
            Self::NoBackends => "no-backends",
            Self::NoBackendsFromPod => "no-backends-pod",
            Self::NotOurs => "not-ours",
            Self::NotOursFromPod => "not-ours-pod",
            Self::Tunnelled => "nodeport-there-dsr",
        }
    }

    pub(crate) const fn place(self) -> Place {
        match self {
            Self::NodePortHereIdle
            | Self::NodePortHere
            | Self::NodePortThere
            | Self::ReplyThere
            | Self::NewNodePortHere
            | Self::NewNodePortThere
            | Self::FloodNodePortHere
            | Self::NoBackends
            | Self::NotOurs
            | Self::Tunnelled => Place::Xdp,
            Self::NodePortHereByTc => Place::NicIn,
            Self::ReplyHere => Place::NicOut,
            Self::ClusterIp | Self::NewClusterIp | Self::NoBackendsFromPod | Self::NotOursFromPod => {
                Place::PodIn
            }
            Self::ClusterIpReply => Place::PodOut,
        }
    }

    const fn flows(self) -> Flows {
        match self {
            Self::NodePortHereIdle
            | Self::NodePortHere
            | Self::NodePortThere
            | Self::ReplyHere
            | Self::ReplyThere
            | Self::NodePortHereByTc
            | Self::ClusterIp
            | Self::ClusterIpReply
            | Self::Tunnelled => Flows::Known,
            Self::NewNodePortHere | Self::NewNodePortThere | Self::NewClusterIp => Flows::New,
            Self::FloodNodePortHere => Flows::Flood,
            Self::NoBackends | Self::NoBackendsFromPod | Self::NotOurs | Self::NotOursFromPod => Flows::No,
        }
    }

    /// The kind of packet that begins its flows.
    const fn opening(self) -> Option<Self> {
        match self {
            Self::NodePortHereIdle | Self::NodePortHere | Self::NodePortHereByTc | Self::ReplyHere => {
                Some(Self::NewNodePortHere)
            }
            Self::NodePortThere | Self::ReplyThere | Self::Tunnelled => Some(Self::NewNodePortThere),
            Self::ClusterIp | Self::ClusterIpReply => Some(Self::NewClusterIp),
            _ => None,
        }
    }

    /// Whether there are answers for one flow only: which ports were given to others is not known here.
    const fn is_single(self) -> bool {
        matches!(self, Self::ReplyThere | Self::ClusterIpReply)
    }

    /// The first packet.
    fn frame(self, family: Family) -> Result<Vec<u8>> {
        let at = |ip, port| std::net::SocketAddr::new(ip, port);
        let node = |port| at(family.node(), port);
        let (outside, pod, cluster_ip) = (family.outside(), family.pod(), at(family.cluster_ip(0), PORT));
        let (segment, from, to) = match self {
            Self::NodePortHereIdle | Self::NodePortHere | Self::NodePortHereByTc => {
                (Segment::Data, outside, node(PORT_HERE))
            }
            Self::NodePortThere | Self::Tunnelled => (Segment::Data, outside, node(PORT_THERE)),
            Self::ReplyHere => (Segment::Data, family.backend(true, 1), outside),
            Self::ClusterIp => (Segment::Data, pod, cluster_ip),
            Self::NewNodePortHere | Self::FloodNodePortHere => (Segment::Syn, outside, node(PORT_HERE)),
            // The address and port of an answer are filled in once they are known.
            Self::NewNodePortThere | Self::ReplyThere => (Segment::Syn, outside, node(PORT_THERE)),
            Self::NewClusterIp | Self::ClusterIpReply => (Segment::Syn, pod, cluster_ip),
            Self::NoBackends => (Segment::Syn, outside, node(PORT_NOWHERE)),
            Self::NoBackendsFromPod => (Segment::Syn, pod, node(PORT_NOWHERE)),
            Self::NotOurs => (Segment::Data, outside, family.stranger()),
            Self::NotOursFromPod => (Segment::Data, pod, family.stranger()),
        };
        tcp(segment, from, to)
    }

    /// What becomes of a packet: the program's verdict, and whether [`Self::translated`] is another one then.
    const fn outcome(self) -> (u32, bool) {
        let pass = if self.kind() as u32 == ProgType::Xdp as u32 { XDP_PASS } else { TC_NEXT };
        match self {
            Self::NodePortThere
            | Self::ReplyThere
            | Self::NewNodePortThere
            | Self::NoBackends
            | Self::Tunnelled => (XDP_TX, true),
            Self::NoBackendsFromPod => (TC_REDIRECT, true),
            Self::NotOurs | Self::NotOursFromPod => (pass.cast_unsigned(), false),
            _ => (pass.cast_unsigned(), true),
        }
    }

    /// The address that is not the client's.
    const fn translated(self) -> Client {
        match self {
            Self::ReplyHere | Self::ClusterIpReply => Client::Source,
            _ => Client::Destination,
        }
    }

    const fn kind(self) -> ProgType {
        match self.place() {
            Place::Xdp => ProgType::Xdp,
            _ => ProgType::SchedCls,
        }
    }

    pub(crate) fn traffic(self, family: Family, flows: u32, services: u32) -> Result<Traffic> {
        let to_service = matches!(self, Self::ClusterIp | Self::NewClusterIp);
        Ok(Traffic {
            kind: self.kind(),
            family,
            frame: self.frame(family)?,
            client: if matches!(self, Self::ReplyHere) { Client::Destination } else { Client::Source },
            pick: if self.flows() == Flows::Known { Pick::Random } else { Pick::Next },
            flows,
            services: if to_service { services } else { 1 },
            outer: 0,
        })
    }
}

/// A kind of packet among so many flows and Services.
struct Case<'a> {
    what: What,
    family: Family,
    flows: u32,
    services: u32,
    node: &'a Node,
    sender: Sender,
    floor: Sender,
    /// The same flows one after the other: nobody of them was silent for long then.
    waker: Option<Sender>,
    samples: Vec<f64>,
    floors: Vec<f64>,
}

/// The group.
pub(crate) fn run(args: &Args) -> Result<()> {
    let link = Link::new()?;
    let (few, many): (Vec<u32>, Vec<u32>) = args.flows.iter().partition(|flows| **flows <= FEW);
    // Three kinds of known flows with two entries each, and half as much again, so that none is pushed out.
    let room = |flows: &[u32]| flows.iter().max().map_or(0, |most| most.saturating_mul(9)).max(256 * 1024);
    let nodes = args
        .services
        .iter()
        .enumerate()
        .map(|(index, services)| {
            let flows = if index == 0 { room(&few) } else { 256 * 1024 };
            Ok((*services, Node::new(&link, flows, *services)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let (_, first) = nodes.first().context("no number of Services")?;
    // A table that is many times as large is slower to look into, whatever is in it.
    let large = (!many.is_empty()).then(|| Node::new(&link, room(&many), 1)).transpose()?;
    let tunnelling = Node::tunnelling(&link, 256 * 1024)?;
    let mut cases = Vec::new();
    for (index, (services, node)) in nodes.iter().enumerate() {
        let flows = if index == 0 { few.as_slice() } else { &[1] };
        for family in Family::ALL {
            cases.extend(Case::all(&link, node, family, flows, *services)?);
        }
    }
    if let Some(large) = &large {
        for family in Family::ALL {
            cases.extend(Case::known(&link, large, family, &many)?);
        }
    }
    for family in Family::ALL {
        cases.push(Case::tunnelled(&link, &tunnelling, family)?);
    }
    eprintln!("packet: {} kinds of packets, {} rounds", cases.len(), args.rounds);
    let mut live = Vec::new();
    for family in Family::ALL {
        live.extend(Live::beside_swap(&link, first, family)?);
    }
    for _ in 0..args.rounds {
        cases.iter_mut().try_for_each(|case| case.measure(args.packets))?;
        live.iter_mut().try_for_each(|live| live.measure(args.packets))?;
    }
    cases.into_iter().try_for_each(Case::print)?;
    live.into_iter().try_for_each(|live| live.print(GROUP))
}

impl<'a> Case<'a> {
    /// Packets of known flows that there are many of, which are entered here.
    fn known(link: &Link, node: &'a Node, family: Family, flows: &[u32]) -> Result<Vec<Self>> {
        begin_all(link, node, family, flows, 1)?;
        let mut cases = Vec::new();
        for what in What::ALL.into_iter().filter(|what| what.flows() == Flows::Known && !what.is_single()) {
            for flows in flows {
                cases.push(Self::new(link, node, what, &what.traffic(family, *flows, 1)?, 1)?);
            }
        }
        Ok(cases)
    }

    /// Every kind of packet of a family at a node, whose known flows are entered here.
    fn all(link: &Link, node: &'a Node, family: Family, flows: &[u32], services: u32) -> Result<Vec<Self>> {
        let replies = begin_all(link, node, family, flows, services)?;
        let mut cases = Vec::new();
        for what in What::ALL {
            let many = what.flows() == Flows::Known && !what.is_single();
            let flows = match what.flows() {
                Flows::Known if many => flows,
                Flows::New | Flows::Flood => &[FLOOD],
                _ => &[1],
            };
            for flows in flows {
                let mut traffic = what.traffic(family, *flows, services)?;
                if what.is_single() {
                    let sent = what.opening().and_then(|opening| replies.get(&opening));
                    traffic.frame = reply(family, sent.context("its flow was begun")?)?;
                }
                cases.push(Self::new(link, node, what, &traffic, services)?);
            }
        }
        Ok(cases)
    }

    /// Packets of a flow that go to the node of its backend as they are.
    fn tunnelled(link: &Link, node: &'a Node, family: Family) -> Result<Self> {
        let outer = match family {
            Family::V4 => tunnel::overhead::<V4>(),
            Family::V6 => tunnel::overhead::<V6>(),
        };
        let traffic = |what: What| Ok::<_, anyhow::Error>(Traffic { outer, ..what.traffic(family, 1, 1)? });
        let opening =
            Sender::new(&traffic(What::NewNodePortThere)?, node.program(Place::Xdp)?, link.ifindex)?;
        begin(node, family, &opening, 1, ONE_WAY)?;
        Self::new(link, node, What::Tunnelled, &traffic(What::Tunnelled)?, 1)
    }

    fn new(link: &Link, node: &'a Node, what: What, traffic: &Traffic, services: u32) -> Result<Self> {
        let (family, flows) = (traffic.family, traffic.flows);
        let sender = Sender::new(traffic, node.program(what.place())?, link.ifindex)?;
        let floor = Sender::floor(traffic, link.ifindex)?;
        let wakes =
            what != What::NodePortHereIdle && traffic.pick == Pick::Random && (2..=FEW).contains(&flows);
        let one_by_one = Traffic { pick: Pick::Next, ..traffic.clone() };
        let program = node.program(what.place())?;
        let waker = wakes.then(|| Sender::new(&one_by_one, program, link.ifindex)).transpose()?;
        if matches!(what.flows(), Flows::New | Flows::Flood) {
            // Clients that have no flow: a SYN would end one.
            sender.seek(NEW)?;
        }
        let case = Self {
            what,
            family,
            flows,
            services,
            node,
            sender,
            floor,
            waker,
            samples: Vec::new(),
            floors: Vec::new(),
        };
        case.check(traffic)?;
        Ok(case)
    }

    /// That happens to a packet what is said to be measured.
    fn check(&self, traffic: &Traffic) -> Result<()> {
        let Output { verdict, frame, .. } = self.sender.send(1)?;
        let (want, changes) = self.what.outcome();
        let (at, _) = self.family.end(self.what.translated());
        let addr = usize::try_from(at)?..usize::try_from(at + self.family.address_len())?;
        let changed = frame.get(addr.clone()) != traffic.frame.get(addr);
        ensure!(
            (verdict, changed) == (want, changes),
            "{} {}: verdict {verdict}, translated: {changed}; not {want}, {changes}",
            self.what.name(),
            self.family.name()
        );
        Ok(())
    }

    fn measure(&mut self, packets: u32) -> Result<()> {
        let (packets, at_once) = match (self.what, self.what.flows()) {
            (What::NoBackendsFromPod, _) => (packets / 16, ANSWERS),
            (_, Flows::New) => (packets.min(self.node.pending()), u32::MAX),
            _ => (packets, u32::MAX),
        };
        let floor = mean(&self.floor, packets, at_once)?;
        if let Some(waker) = &self.waker {
            waker.send(self.flows)?;
        }
        let whole = mean(&self.sender, packets, at_once)
            .with_context(|| format!("{} {}", self.what.name(), self.family.name()))?;
        if self.what.flows() == Flows::New {
            self.node.forget_pending(self.family)?;
        }
        self.floors.push(floor);
        self.samples.push(whole - floor);
        Ok(())
    }

    fn print(self) -> Result<()> {
        let axes: BTreeMap<_, _> = [
            ("family", self.family.name().to_owned()),
            ("flows", if self.flows == FLOOD { "new".to_owned() } else { self.flows.to_string() }),
            ("services", self.services.to_string()),
        ]
        .into();
        for (variant, samples) in [("fairlead", self.samples), ("floor", self.floors)] {
            let (what, axes) = (self.what.name().to_owned(), axes.clone());
            Series { group: GROUP, what, variant, unit: "ns", axes, samples }.print()?;
        }
        Ok(())
    }
}

/// Has known flows of every kind begin, as many as the largest of these numbers. What became of the first packet of each kind.
fn begin_all(
    link: &Link,
    node: &Node,
    family: Family,
    flows: &[u32],
    services: u32,
) -> Result<BTreeMap<What, Vec<u8>>> {
    let most = flows.iter().copied().max().unwrap_or(1);
    let mut replies = BTreeMap::new();
    for opening in [What::NewNodePortHere, What::NewNodePortThere, What::NewClusterIp] {
        let traffic = opening.traffic(family, FLOOD, services)?;
        let sender = Sender::new(&traffic, node.program(opening.place())?, link.ifindex)?;
        replies.insert(opening, begin(node, family, &sender, most, BOTH)?);
    }
    Ok(replies)
}

/// What one of so many packets costs, ns.
fn mean(sender: &Sender, packets: u32, at_once: u32) -> Result<f64> {
    let mut sum = 0.0;
    let mut sent = 0;
    while sent < packets {
        let some = at_once.min(packets - sent);
        sum += f64::from(sender.send(some)?.nanoseconds) * f64::from(some);
        sent += some;
    }
    Ok(sum / f64::from(sent))
}

/// Entries of a flow whose answers come by here.
pub(crate) const BOTH: usize = 2;
/// Entries of a flow whose answers do not.
const ONE_WAY: usize = 1;

/// Begins so many flows, and has them established. What became of the first packet.
pub(crate) fn begin(
    node: &Node,
    family: Family,
    sender: &Sender,
    flows: u32,
    entries_each: usize,
) -> Result<Vec<u8>> {
    sender.seek(0)?;
    let first = sender.send(1)?.frame;
    let (mut begun, mut entries) = (1, 0);
    while begun < flows {
        let some = node.pending().min(flows - begun);
        sender.send(some)?;
        begun += some;
        entries += node.establish_pending(family)?;
    }
    entries += node.establish_pending(family)?;
    // A few find no source port of their own.
    let want = flows as usize * entries_each;
    ensure!(entries >= want - want / 100, "of {flows} flows {entries} entries are there");
    Ok(first)
}

/// The answer to a packet that was translated.
fn reply(family: Family, sent: &[u8]) -> Result<Vec<u8>> {
    let address = |end| {
        let (at, port) = family.end(end);
        let (at, port) = (usize::try_from(at)?, usize::try_from(port)?);
        let len = usize::try_from(family.address_len())?;
        let octets = sent.get(at..at + len).context("an address")?;
        let ip: std::net::IpAddr = match family {
            Family::V4 => <[u8; 4]>::try_from(octets)?.into(),
            Family::V6 => <[u8; 16]>::try_from(octets)?.into(),
        };
        let port = sent.get(port..port + 2).context("a port")?;
        anyhow::Ok(std::net::SocketAddr::new(ip, u16::from_be_bytes(port.try_into()?)))
    };
    tcp(Segment::Data, address(Client::Destination)?, address(Client::Source)?)
}
