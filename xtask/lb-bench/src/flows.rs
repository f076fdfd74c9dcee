//! Group `flows`: how many connections can begin, until their table is full and beyond, and what it takes to look
//! through it for those that are over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairlead::datapath::Place;
use fairlead::flows::Sweeper;

use crate::bpf::ProgType;
use crate::frame::{Family, Segment, tcp};
use crate::node::{Link, Node, PORT_HERE};
use crate::packet::FLOOD;
use crate::sender::{Client, Pick, Sender, Traffic};
use crate::series::Series;

const GROUP: &str = "flows";

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Entries of the flow table; a connection has two
    #[arg(long, default_value_t = 2_000_000)]
    table: u32,
    /// How often the full table is looked through
    #[arg(long, default_value_t = 5)]
    sweeps: u32,
}

/// The group.
pub(crate) fn run(args: &Args) -> Result<()> {
    let link = Link::new()?;
    for family in Family::ALL {
        eprintln!("flows: {}, {} entries", family.name(), args.table);
        let node = Node::new(&link, args.table, 1)?;
        let handshake = Handshake::new(&link, &node, family)?;
        for part in ["to 50 %", "to 100 %", "beyond"] {
            let samples = handshake.open(args.table / 4)?;
            series("handshake", family, part, "1/s", samples).print()?;
        }
        let [walls, cpus] = sweep(&node, args.sweeps)?;
        let flows = (args.table / 2).to_string();
        series("sweep-time", family, &flows, "ms", walls).print()?;
        series("sweep-cpu", family, &flows, "ms", cpus).print()?;
    }
    Ok(())
}

fn series(what: &str, family: Family, flows: &str, unit: &'static str, samples: Vec<f64>) -> Series {
    let axes = [("family", family.name().to_owned()), ("flows", flows.to_owned())].into();
    Series { group: GROUP, what: what.to_owned(), variant: "fairlead", unit, axes, samples }
}

/// What it takes to open connections: SYN, answer, and the client's first data.
struct Handshake<'a> {
    node: &'a Node,
    family: Family,
    steps: [Sender; 3],
}

impl<'a> Handshake<'a> {
    fn new(link: &Link, node: &'a Node, family: Family) -> Result<Self> {
        let (client, pod) = (family.outside(), family.backend(true, 1));
        let frontend = std::net::SocketAddr::new(family.node(), PORT_HERE);
        let step = |place: Place, segment, from, to| {
            let (kind, client) = match place {
                Place::Xdp => (ProgType::Xdp, Client::Source),
                _ => (ProgType::SchedCls, Client::Destination),
            };
            let frame = tcp(segment, from, to)?;
            let traffic = Traffic {
                kind,
                family,
                frame,
                client,
                pick: Pick::Next,
                flows: FLOOD,
                services: 1,
                outer: 0,
            };
            Sender::new(&traffic, node.program(place)?, link.ifindex)
        };
        let steps = [
            step(Place::Xdp, Segment::Syn, client, frontend)?,
            step(Place::NicOut, Segment::SynAck, pod, client)?,
            step(Place::Xdp, Segment::Data, client, frontend)?,
        ];
        Ok(Self { node, family, steps })
    }

    /// Opens so many more connections, some at a time. How many a second each time.
    fn open(&self, count: u32) -> Result<Vec<f64>> {
        let at_once = self.node.pending().min(count.div_ceil(8));
        let mut rates = Vec::new();
        let mut opened = 0;
        while opened + at_once <= count {
            let mut nanoseconds = 0.0;
            for step in &self.steps {
                nanoseconds += f64::from(step.send(at_once)?.nanoseconds);
            }
            let pending = self.node.forget_pending(self.family)?;
            ensure!(pending < at_once as usize / 10, "{pending} of {at_once} connections were not opened");
            rates.push(1e9 / nanoseconds);
            opened += at_once;
        }
        Ok(rates)
    }
}

/// Looks for what is over again and again: the time, and that of the CPU, each in ms.
fn sweep(node: &Node, times: u32) -> Result<[Vec<f64>; 2]> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.context("cannot make a runtime")?;
    let mut sweeper = Sweeper::new(node.datapath())?;
    let (mut walls, mut cpus) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let (begin, cpu) = (Instant::now(), cpu_time()?);
        runtime.block_on(sweeper.pass(Duration::ZERO)).context("cannot sweep")?;
        walls.push(begin.elapsed().as_secs_f64() * 1e3);
        cpus.push(cpu_time()?.saturating_sub(cpu).as_secs_f64() * 1e3);
    }
    Ok([walls, cpus])
}

fn cpu_time() -> Result<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID);
    Ok(time.context("cannot tell the CPU time")?.into())
}
