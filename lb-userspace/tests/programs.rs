//! Budgets of the kernel programs, and that they load in every configuration. Needs root.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Mutex;

use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Features, Idle, Options, Place, Sizes};
use lb_common::maps::{MAPS, MapKind, MapSpec, programs};

fn options() -> Options {
    let sizes = Sizes { flows: Some(1024), services: Some(1024), backends: Some(1024) };
    Options { sizes, ..Options::default() }
}

/// What a program may cost: (verified instructions, bytes of machine code). The verifier stops at a million; that of 6.1
/// walks up to three times as many as that of 6.18.
fn budget(name: &str, tunnels: bool) -> (u32, u32) {
    match name {
        programs::XDP_NIC if tunnels => (600_000, 70_000),
        programs::TC_NIC_IN | programs::TC_POD_IN if tunnels => (370_000, 70_000),
        programs::TC_NIC_OUT | programs::TC_POD_OUT if tunnels => (130_000, 44_000),
        programs::XDP_NIC => (460_000, 58_000),
        programs::TC_NIC_IN | programs::TC_POD_IN => (300_000, 58_000),
        programs::TC_NIC_OUT | programs::TC_POD_OUT => (110_000, 40_000),
        // For each entry of a table, without a pause.
        "sweep_flows4" | "sweep_pending4" | "sweep_flows6" | "sweep_pending6" => (2_000, 4_000),
        _ => (16_000, 12_000),
    }
}

#[test]
fn programs_keep_their_budgets() {
    let mut over = Vec::new();
    for (masquerade_all, tunnel_port) in [(false, 0), (true, 0), (false, 6081)] {
        let options = Options { masquerade_all, tunnel_port, ..options() };
        let datapath = Datapath::isolated(&options).expect("the programs load");
        let sweeps: Vec<_> = datapath.sweeps().into_iter().flat_map(|sweeps| sweeps.programs()).collect();
        if Features::probe().kernel_sweep {
            assert_eq!(sweeps.len(), programs::SWEEPS.len());
        } else {
            eprintln!("this kernel lets no iterator in; not tested: the budget of the programs that sweep");
        }
        for (name, program) in datapath.programs().iter().chain(sweeps) {
            let info = fairlead::sys::bpf::prog_info(program).expect("what the kernel knows of it");
            let (instructions, bytes) = budget(name, tunnel_port != 0);
            let cost =
                format!("{name}: {} instructions verified, {} bytes", info.verified_insns, info.jited_len);
            println!("{cost}");
            assert!(info.jited_len > 0, "{name}: no machine code");
            if info.verified_insns > instructions || info.jited_len > bytes {
                over.push(format!("{cost}; allowed: {instructions}, {bytes}"));
            }
        }
    }
    assert!(over.is_empty(), "{over:#?}");
}

/// Those of hooks that are switched off cost no start anything.
#[test]
fn idle_programs_are_verified_at_once() {
    let options = Options { idle: Idle::ALL, ..Options::default() };
    let datapath = Datapath::isolated(&options).expect("the programs load");
    for (name, program) in datapath.programs().iter() {
        let info = fairlead::sys::bpf::prog_info(program).expect("what the kernel knows of it");
        assert!(info.verified_insns < 100, "{name}: {info:?}");
        assert!(info.jited_len < 100, "{name}: {info:?}");
    }
}

/// What is published is the same wherever it was built. Lines of our sources are there for the verifier's log.
#[test]
fn the_object_does_not_say_where_it_was_built() {
    let object = include_bytes!(env!("FAIRLEAD_BPF_OBJECT"));
    let has = |text: &str| object.windows(text.len()).any(|window| window == text.as_bytes());
    let package = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = package.parent().and_then(|path| path.to_str()).expect("a path that is text");
    for path in [workspace, "/.rustup/", "/.cargo/", ".debug_"] {
        assert!(!has(path), "{path}");
    }
    assert!(has("./lb-ebpf/src/xdp.rs") && has("lb_common"), "the names of sources, and of types");
}

/// Keeps what is logged.
struct Kept(Mutex<Vec<String>>);

impl log::Log for Kept {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("lb_ebpf") {
            self.0.lock().expect("no panic inside").push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

static KEPT: Kept = Kept(Mutex::new(Vec::new()));

#[test]
fn programs_log_when_they_are_told_to() {
    log::set_logger(&KEPT).expect("no other logger in this test program");
    log::set_max_level(log::LevelFilter::Trace);
    let frame = [0; 60];

    let quiet = Datapath::isolated(&options());
    let mut quiet = quiet.expect("the programs load");
    test_run(quiet.programs(), Place::Xdp, Input::new(&frame)).expect("a run");
    assert!(quiet.take_logger().is_none(), "no log without a level");

    let mut datapath = Datapath::isolated(&Options { log_level: 5, ..options() }).expect("the programs load");
    let mut logger = datapath.take_logger().expect("a log");
    test_run(datapath.programs(), Place::Xdp, Input::new(&frame)).expect("a run");
    logger.flush();
    assert_eq!(*KEPT.0.lock().expect("no panic inside"), ["xdp: reason 4"]);
}

/// What the kernel says a map takes, bytes: since 6.4 what it has, before what it may come to.
fn memory(datapath: &Datapath, spec: &'static MapSpec) -> u64 {
    let map = datapath.map_data(spec).expect(spec.name);
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path).expect("what the kernel says of a file of ours");
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).expect("of every map");
    bytes.trim().parse().expect("a number")
}

/// Whether `memlock` of a map is what the map takes: up to 5.10 it was charged, since 6.4 (commit 90a5527d7686) each kind
/// of map counts itself; between them keys and values are multiplied by entries, whatever the kind.
fn kernel_counts_memory() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
    let version = (numbers.next().expect("a major version"), numbers.next().expect("a minor version"));
    !((5, 11)..(6, 4)).contains(&version)
}

/// A bucket of a hash, bytes.
const BUCKET: u64 = 16;

/// What the kernel gives for so many bytes (`kmalloc`).
const fn allotted(bytes: u64) -> u64 {
    let power = bytes.next_power_of_two();
    if power <= 256 && bytes <= power / 4 * 3 { power / 4 * 3 } else { power }
}

/// What the kernel keeps for an entry of a map on so many CPUs, bytes.
fn of_entry(spec: &MapSpec, cpus: u64) -> u64 {
    let [key, value] = [spec.key_size, spec.value_size].map(|size| u64::from(size.next_multiple_of(8)));
    match spec.kind {
        MapKind::Array => value,
        MapKind::PerCpuArray => 8 + value * cpus,
        MapKind::PerCpuHash => allotted(56 + key + 8) + allotted(value) * cpus,
        // Its pages; the kernel maps them twice, in a row, and has a page for each end.
        MapKind::RingBuf => 2,
        // A node for each prefix, and one where prefixes part.
        MapKind::LpmTrie => 2 * allotted(48 + key + value),
        MapKind::Hash => allotted(56 + key + value),
        MapKind::LruHash => 48 + key + value,
    }
}

/// What a map takes at most, bytes, on so many CPUs: what the kernel keeps for each entry, and for hashes a bucket
/// for each in the next power of two.
fn most(spec: &MapSpec, entries: u32, cpus: u64) -> u64 {
    let buckets = match spec.kind {
        MapKind::Hash | MapKind::PerCpuHash | MapKind::LruHash => {
            BUCKET * u64::from(entries.next_power_of_two())
        }
        _ => 0,
    };
    // The map itself, and what it keeps ready for each CPU.
    u64::from(entries) * of_entry(spec, cpus) + buckets + (8 << 10) + cpus * (1 << 10)
}

#[test]
fn maps_at_default_sizes_keep_their_budget() {
    const MIB: u64 = 1 << 20;
    let datapath = Datapath::isolated(&Options::default()).expect("the programs load");
    let cpus = std::fs::read_to_string("/sys/devices/system/cpu/possible").expect("which CPUs there may be");
    let last = cpus.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u64>().ok());
    let cpus = last.expect("a number") + 1;
    let counts = kernel_counts_memory();
    let (mut at_start, mut full) = (0, 0);
    for spec in &MAPS {
        let entries = Sizes::default().wanted(spec.capacity).entries;
        let (has, most) = (memory(&datapath, spec), most(spec, entries, cpus));
        println!("| `{}` | {entries} | {} | {} |", spec.name, has >> 10, most >> 10);
        assert!(!counts || has <= most, "{}: {has} bytes, of {most} at most", spec.name);
        (at_start, full) = (at_start + has, full + most);
    }
    println!("{} MiB at the start, {} MiB at most, on {cpus} CPUs", at_start / MIB, full / MIB);
    assert!(full < 489 * MIB + cpus * MIB, "{} MiB", full / MIB);
}

/// docs/operations.md says what flows and Services take.
#[test]
fn the_page_of_sizes_counts_as_the_kernel_does() {
    // It is not beside the test on machines of `cargo xtask kernels`.
    let page = include_str!("../../docs/operations.md");
    let bytes = |name| of_entry(MAPS.iter().find(|spec| spec.name == name).expect(name), 1);
    let both = |ipv4, ipv6| format!("{ipv4} bytes (IPv4) or {ipv6} bytes (IPv6)");
    let flow = |name| 2 * (bytes(name) + BUCKET);
    for row in [
        format!("| a flow | {} of these |", both(flow("FLOWS4"), flow("FLOWS6"))),
        format!("| a Service | {} bytes |", bytes("NAMES")),
        format!("| a frontend | {} |", both(bytes("SERVICES4"), bytes("SERVICES6"))),
        format!(
            "| an address of a Service or an endpoint | {} |",
            both(bytes("ADDRESSES4"), bytes("ADDRESSES6"))
        ),
        format!("for each of its windows | {} bytes |", bytes("MEMBERS")),
    ] {
        assert!(page.contains(&row), "docs/operations.md has no row {row}");
    }
}
