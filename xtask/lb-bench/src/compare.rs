//! Group `compare`: the same packet through programs that are like others'.
//!
//! katran's way, and no more of it than has to be: one lookup in an LRU hash, an outer header in front, and back to where
//! the frame came from. No address is changed, nothing is checked but the length, and where a packet goes is written into
//! the program. To be repeated, each packet first loses the outer header again, a call that counts for katran.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use fairlead::datapath::Place;

use crate::asm::{Alu, Code, Helper, Reg, Size};
use crate::bpf::{self, MapType, ProgType};
use crate::frame::{DEVICE_MAC, Family, ROUTER_MAC};
use crate::live::Live;
use crate::node::{Link, Node};
use crate::packet::{BOTH, FLOOD, What, XDP_TX, begin};
use crate::sender::{FIRST_PORT, PORTS, Sender, Traffic, write};
use crate::series::Series;

const GROUP: &str = "compare";
const XDP_DROP: i32 = 1;
/// An IPv4 header.
const OUTER: u16 = 20;
/// Addresses, ports, protocol.
const KEY: usize = 16;

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
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100_000])]
    flows: Vec<u32>,
}

/// One program among so many flows.
struct Case {
    what: What,
    variant: &'static str,
    flows: u32,
    sender: Sender,
    floor: Sender,
    samples: Vec<f64>,
}

/// The group.
pub(crate) fn run(args: &Args) -> Result<()> {
    let link = Link::new()?;
    let most = args.flows.iter().copied().max().unwrap_or(1);
    let node = Node::new(&link, most.saturating_mul(8).max(256 * 1024), 1)?;
    let family = Family::V4;
    for opening in [What::NewNodePortHere, What::NewNodePortThere] {
        let traffic = opening.traffic(family, FLOOD, 1)?;
        begin(&node, family, &Sender::new(&traffic, node.program(Place::Xdp)?, link.ifindex)?, most, BOTH)?;
    }
    let known = known_flows(most)?;
    let katran = encapsulate(known.as_fd())?;
    let mut cases = Vec::new();
    for flows in &args.flows {
        let mut add = |what: What, variant, target: BorrowedFd<'_>, outer| {
            let traffic = what.traffic(family, *flows, 1)?;
            let sender = Sender::new(&Traffic { outer, ..traffic.clone() }, target, link.ifindex)?;
            let floor = Sender::floor(&traffic, link.ifindex)?;
            cases.push(Case { what, variant, flows: *flows, sender, floor, samples: Vec::new() });
            anyhow::Ok(())
        };
        add(What::NodePortThere, "katran-like", katran.as_fd(), OUTER)?;
        add(What::NodePortThere, "fairlead", node.program(Place::Xdp)?, 0)?;
        add(What::NodePortHere, "fairlead", node.program(Place::Xdp)?, 0)?;
    }
    let verdict = cases.first().context("no flows")?.sender.send(3)?.verdict;
    ensure!(verdict == XDP_TX, "the program that is like katran's does not send: {verdict}");
    let [_, ours] = Live::beside_swap(&link, &node, family)?;
    let traffic = Traffic { outer: OUTER, ..What::NodePortThere.traffic(family, 1, 1)? };
    let theirs = Live::new(&link, "live-nodeport-there", "katran-like", &traffic, katran.as_fd())?;
    let mut live = [theirs, ours];
    for _ in 0..args.rounds {
        cases.iter_mut().try_for_each(|case| case.measure(args.packets))?;
        live.iter_mut().try_for_each(|live| live.measure(args.packets))?;
    }
    cases.into_iter().try_for_each(Case::print)?;
    live.into_iter().try_for_each(|live| live.print(GROUP))
}

impl Case {
    fn measure(&mut self, packets: u32) -> Result<()> {
        let floor = self.floor.send(packets)?.nanoseconds;
        self.samples.push(f64::from(self.sender.send(packets)?.nanoseconds) - f64::from(floor));
        Ok(())
    }

    fn print(self) -> Result<()> {
        let Self { what, variant, flows, samples, .. } = self;
        let axes: BTreeMap<_, _> =
            [("family", Family::V4.name().to_owned()), ("flows", flows.to_string())].into();
        Series { group: GROUP, what: what.name().to_owned(), variant, unit: "ns", axes, samples }.print()
    }
}

/// The flows of [`What::NodePortThere`], as katran would know them.
fn known_flows(flows: u32) -> Result<OwnedFd> {
    let map = bpf::map_create(MapType::LruHash, 16, 4, flows.saturating_mul(2).max(1024))?;
    let frame = What::NodePortThere.traffic(Family::V4, 1, 1)?.frame;
    let mut keys = Vec::new();
    for flow in 0..flows {
        let mut key = [0; KEY];
        key[..12].copy_from_slice(frame.get(26..38).context("a frame without addresses")?);
        let address = u16::try_from(flow / PORTS + 1).context("too many flows")?;
        let port = FIRST_PORT + u16::try_from(flow % PORTS).context("ports have 16 bits")?;
        key[2..4].copy_from_slice(&address.to_be_bytes());
        key[8..10].copy_from_slice(&port.to_be_bytes());
        key[12] = *frame.get(23).context("a frame without a protocol")?;
        keys.extend(key);
    }
    bpf::put_entries(map.as_fd(), &keys, &vec![1; 4 * flows as usize], KEY)?;
    Ok(map)
}

/// Looks the flow up, puts an outer header in front and sends the packet back.
fn encapsulate(flows: BorrowedFd<'_>) -> Result<OwnedFd> {
    let mut code = Code::default();
    let bounds = |code: &mut Code, len| {
        code.load(Size::Word, Reg::R2, Reg::R6, 0)
            .load(Size::Word, Reg::R3, Reg::R6, 4)
            .exit_if_shorter(len, XDP_DROP);
    };
    code.mov_reg(Reg::R6, Reg::R1);
    bounds(&mut code, 54);
    code.load(Size::Double, Reg::R0, Reg::R2, 26)
        .store(Size::Double, Reg::R10, -16, Reg::R0)
        .load(Size::Word, Reg::R0, Reg::R2, 34)
        .store(Size::Word, Reg::R10, -8, Reg::R0)
        .load(Size::Byte, Reg::R0, Reg::R2, 23)
        .store(Size::Word, Reg::R10, -4, Reg::R0)
        .load_map(Reg::R1, flows)
        .mov_reg(Reg::R2, Reg::R10)
        .alu(Alu::Add, Reg::R2, -16)
        .call(Helper::MapLookup)
        .exit_if_null(XDP_DROP)
        .mov_reg(Reg::R1, Reg::R6)
        .mov(Reg::R2, -i32::from(OUTER))
        .call(Helper::XdpAdjustHead);
    bounds(&mut code, 54);
    // Ethernet, and IPv4 with protocol 4 (IPIP) from the node to a backend.
    let mut outer = Vec::new();
    outer.extend(ROUTER_MAC);
    outer.extend(DEVICE_MAC);
    outer.extend([0x08, 0x00, 0x45, 0, 0, 70, 0, 0, 0, 0, 64, 4, 0, 0, 192, 0, 2, 1, 10, 245, 2, 1]);
    write(&mut code, &outer)?;
    code.exit(XDP_TX.cast_signed());
    bpf::prog_load(ProgType::Xdp, code.insns())
}
