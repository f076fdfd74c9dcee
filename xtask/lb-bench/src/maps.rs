//! Group `maps`: what the kernel's kinds of maps cost by themselves, on one CPU and on all of them at the same time. What
//! the datapath is made of was chosen by these numbers (docs/datapath.md).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::asm::{Alu, Code, Helper, Reg, Size};
use crate::bpf::{self, Input, MapType, ProgType};
use crate::sender::{Pick, XDP_PASS, pick};
use crate::series::Series;

const GROUP: &str = "maps";
/// A program's result if an entry that must be there is not.
const XDP_ABORTED: i32 = 0;
/// Bytes of a key: addresses, ports, protocol; and of a value: a rewrite.
const KEY: i16 = 16;
const VALUE: i16 = 64;
/// `BPF_F_NO_PREALLOC`
const NO_PREALLOC: u32 = 1;
/// `BPF_F_NO_COMMON_LRU`
const NO_COMMON_LRU: u32 = 2;
/// Bits of a network among source ranges, behind the 32 of the Service's number.
const PREFIX: i32 = 32 + 24;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// How often everything is measured
    #[arg(long, default_value_t = 31)]
    rounds: u32,
    /// Runs of a round
    #[arg(long, default_value_t = 20_000)]
    runs: u32,
    /// How many entries there are to be found
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 100_000])]
    entries: Vec<u32>,
}

/// A kind of map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Array,
    Hash,
    /// With one list of what was used last, from which CPUs take entries by the batch.
    Lru,
    /// With a list for each CPU.
    LruListPerCpu,
    /// With a value for each CPU.
    LruValuePerCpu,
    LpmTrie,
}

/// What is done with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    /// Any of the entries is looked up.
    Lookup,
    /// The same, and four bytes of it are written.
    Touch,
    /// An entry that is not there is written into a map with room.
    Insert,
    /// The same into a map that is full: another goes.
    InsertFull,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Array => "array",
            Self::Hash => "hash",
            Self::Lru => "lru",
            Self::LruListPerCpu => "lru-list-per-cpu",
            Self::LruValuePerCpu => "lru-value-per-cpu",
            Self::LpmTrie => "lpm-trie",
        }
    }

    fn create(self, entries: u32) -> Result<OwnedFd> {
        let (kind, key, flags) = match self {
            Self::Array => (MapType::Array, 4, 0),
            Self::Hash => (MapType::Hash, KEY, 0),
            Self::Lru => (MapType::LruHash, KEY, 0),
            Self::LruListPerCpu => (MapType::LruHash, KEY, NO_COMMON_LRU),
            Self::LruValuePerCpu => (MapType::LruPerCpuHash, KEY, 0),
            Self::LpmTrie => (MapType::LpmTrie, 12, NO_PREALLOC),
        };
        bpf::map_create_with(kind, key.unsigned_abs().into(), VALUE.unsigned_abs().into(), entries, flags)
    }
}

impl What {
    const fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Touch => "touch",
            Self::Insert => "insert",
            Self::InsertFull => "insert-full",
        }
    }

    const fn inserts(self) -> bool {
        matches!(self, Self::Insert | Self::InsertFull)
    }
}

/// A program of one CPU, and the same without a map.
struct Worker {
    program: OwnedFd,
    floor: OwnedFd,
    cpu: usize,
    _state: OwnedFd,
}

/// Something done with a kind of map, by some CPUs at the same time.
struct Case {
    what: What,
    kind: Kind,
    entries: u32,
    map: OwnedFd,
    workers: Vec<Worker>,
    samples: Vec<f64>,
}

/// The group.
pub(crate) fn run(args: &Args) -> Result<()> {
    let cpus = cpus()?;
    let one = cpus.get(..1).context("no CPU")?;
    let mut cases = Vec::new();
    for entries in &args.entries {
        for kind in [Kind::Array, Kind::Hash, Kind::Lru, Kind::LpmTrie] {
            cases.push(Case::new(What::Lookup, kind, *entries, one)?);
        }
    }
    // Room for all that one round inserts, as CPUs keep a few entries to themselves.
    let room = args.runs * u32::try_from(cpus.len() + 1)? + 1024;
    let one_and_all = if cpus.len() > 1 { vec![one, &cpus] } else { vec![one] };
    for cpus in one_and_all {
        for kind in [Kind::Lru, Kind::LruValuePerCpu] {
            cases.push(Case::new(What::Touch, kind, 1, cpus)?);
        }
        for kind in [Kind::Hash, Kind::Lru, Kind::LruListPerCpu] {
            cases.push(Case::new(What::Insert, kind, room, cpus)?);
        }
        for kind in [Kind::Lru, Kind::LruListPerCpu] {
            cases.push(Case::new(What::InsertFull, kind, args.runs / 4, cpus)?);
        }
    }
    eprintln!("maps: {} ways to use them, {} rounds", cases.len(), args.rounds);
    // The first round fills what is to be full.
    for round in 0..=args.rounds {
        cases.iter_mut().try_for_each(|case| case.measure(args.runs, round > 0))?;
    }
    cases.into_iter().try_for_each(Case::print)
}

/// The CPUs of this process.
fn cpus() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("cannot tell the CPUs")?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

impl Case {
    fn new(what: What, kind: Kind, entries: u32, cpus: &[usize]) -> Result<Self> {
        let map = kind.create(entries)?;
        let workers = cpus
            .iter()
            .map(|cpu| Worker::new(what, kind, entries, map.as_fd(), *cpu))
            .collect::<Result<Vec<_>>>()?;
        if !what.inserts() && kind != Kind::Array {
            let state = bpf::map_create(MapType::Array, 4, 8, 1)?;
            let fill = program(What::Insert, kind, Pick::Next, entries, Some(map.as_fd()), state.as_fd())?;
            send(fill.as_fd(), entries)?;
        }
        Ok(Self { what, kind, entries, map, workers, samples: Vec::new() })
    }

    fn measure(&mut self, runs: u32, counts: bool) -> Result<()> {
        if self.what == What::Insert {
            while !bpf::take_entries(self.map.as_fd(), KEY as usize, VALUE as usize)?.0.is_empty() {}
        }
        let floor = self.at_once(runs, |worker| worker.floor.as_fd())?;
        let whole = self.at_once(runs, |worker| worker.program.as_fd())?;
        if counts {
            self.samples.push(whole - floor);
        }
        Ok(())
    }

    /// Has every CPU run a program so many times; the mean of one run, ns.
    fn at_once(&self, runs: u32, of: impl Fn(&Worker) -> BorrowedFd<'_> + Sync) -> Result<f64> {
        let ready = &Barrier::new(self.workers.len());
        let means: Vec<Result<u32>> = thread::scope(|scope| {
            let run = |worker| {
                let of = &of;
                scope.spawn(move || pinned(worker, ready, || send(of(worker), runs)))
            };
            let threads: Vec<_> = self.workers.iter().map(run).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        let means = means.into_iter().collect::<Result<Vec<_>>>();
        let means = means.with_context(|| format!("{} {}", self.what.name(), self.kind.name()))?;
        Ok(means.iter().copied().map(f64::from).sum::<f64>() / f64::from(u32::try_from(means.len())?))
    }

    fn print(self) -> Result<()> {
        let cpus = self.workers.len();
        // How large a map is that has room, or none, says nothing.
        let entries = if self.what.inserts() { "new".to_owned() } else { self.entries.to_string() };
        let axes: BTreeMap<_, _> = [("entries", entries), ("cpus", cpus.to_string())].into();
        let what = self.what.name().to_owned();
        Series { group: GROUP, what, variant: self.kind.name(), unit: "ns", axes, samples: self.samples }
            .print()
    }
}

/// Does something on a worker's CPU, when all others are ready.
fn pinned<T>(worker: &Worker, ready: &Barrier, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut set = CpuSet::new();
    let at_home = set.set(worker.cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    ready.wait();
    at_home.context("cannot choose a CPU")?;
    work()
}

impl Worker {
    fn new(what: What, kind: Kind, entries: u32, map: BorrowedFd<'_>, cpu: usize) -> Result<Self> {
        let how = if what.inserts() { Pick::Next } else { Pick::Random };
        // What is inserted is never the same again.
        let numbers = if what.inserts() { i32::MAX.unsigned_abs() } else { entries };
        let state = bpf::map_create(MapType::Array, 4, 8, 1)?;
        // CPUs begin far from each other.
        let first = u64::try_from(cpu)? << 26;
        bpf::map_update(state.as_fd(), &[0; 4], &first.to_ne_bytes())?;
        let program = |map| program(what, kind, how, numbers, map, state.as_fd());
        Ok(Self { program: program(Some(map))?, floor: program(None)?, cpu, _state: state })
    }
}

/// So many runs; the mean of one, ns.
fn send(program: BorrowedFd<'_>, runs: u32) -> Result<u32> {
    let input = Input { kind: ProgType::Xdp, frame: &[0; 64], ifindex: 0 };
    let output = bpf::test_run(program, input, runs)?;
    ensure!(output.verdict == XDP_PASS.cast_unsigned(), "an entry is not there");
    Ok(output.nanoseconds)
}

/// Does something with an entry of the map, or nothing without one.
fn program(
    what: What,
    kind: Kind,
    how: Pick,
    numbers: u32,
    map: Option<BorrowedFd<'_>>,
    state: BorrowedFd<'_>,
) -> Result<OwnedFd> {
    let mut code = Code::default();
    pick(&mut code, state, how, numbers)?;
    match kind {
        Kind::LpmTrie => {
            // The length of the prefix, a Service, and a network with this number.
            code.mov(Reg::R1, PREFIX)
                .store(Size::Word, Reg::R10, -KEY, Reg::R1)
                .mov(Reg::R1, 1)
                .store(Size::Word, Reg::R10, 4 - KEY, Reg::R1)
                .alu(Alu::Mul, Reg::R0, 256)
                .big_endian(Reg::R0, 32)
                .store(Size::Word, Reg::R10, 8 - KEY, Reg::R0);
        }
        _ => {
            code.store(Size::Double, Reg::R10, -KEY, Reg::R0).mov(Reg::R1, 0).store(
                Size::Double,
                Reg::R10,
                8 - KEY,
                Reg::R1,
            );
        }
    }
    if what.inserts() {
        code.mov(Reg::R1, 0);
        for at in (0..VALUE).step_by(8) {
            code.store(Size::Double, Reg::R10, at - KEY - VALUE, Reg::R1);
        }
    }
    if let Some(map) = map {
        code.load_map(Reg::R1, map).mov_reg(Reg::R2, Reg::R10).alu(Alu::Add, Reg::R2, (-KEY).into());
        if what.inserts() {
            code.mov_reg(Reg::R3, Reg::R10)
                .alu(Alu::Add, Reg::R3, (-KEY - VALUE).into())
                .mov(Reg::R4, 0)
                .call(Helper::MapUpdate);
        } else {
            code.call(Helper::MapLookup).exit_if_null(XDP_ABORTED);
        }
        if what == What::Touch {
            code.mov(Reg::R1, 1).store(Size::Word, Reg::R0, 0, Reg::R1);
        }
    }
    code.exit(XDP_PASS);
    bpf::prog_load(ProgType::Xdp, code.insns())
}
