//! Budgets of the kernel programs, and that they load in every configuration. Needs root.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Mutex;

use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Options, Place, Sizes, program_names};
use lb_common::maps::{MAPS, MapKind, MapSpec, programs};

fn options() -> Options {
    let sizes = Sizes { flows: Some(1024), services: Some(1024), backends: Some(1024) };
    Options { sizes, ..Options::default() }
}

/// What a program may cost: (verified instructions, bytes of machine code). The verifier stops at a million; that of 6.1
/// walks twice as many as that of 6.18.
fn budget(name: &str) -> (u32, u32) {
    match name {
        programs::XDP_NIC => (750_000, 56_000),
        programs::TC_NIC_IN | programs::TC_POD_IN => (600_000, 56_000),
        programs::TC_NIC_OUT | programs::TC_POD_OUT => (120_000, 40_000),
        _ => (16_000, 12_000),
    }
}

#[test]
fn programs_keep_their_budgets() {
    for masquerade_all in [false, true] {
        let options = Options { masquerade_all, ..options() };
        let datapath = Datapath::isolated(&options).expect("the programs load");
        for name in program_names() {
            let program = datapath.programs().get(name).expect(name);
            let info = fairlead::sys::bpf::prog_info(program).expect("what the kernel knows of it");
            let (instructions, bytes) = budget(name);
            println!("{name}: {} instructions verified, {} bytes", info.verified_insns, info.jited_len);
            assert!(info.verified_insns <= instructions, "{name}: {info:?}");
            assert!(info.jited_len > 0 && info.jited_len <= bytes, "{name}: {info:?}");
        }
    }
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

/// What the kernel gives for so many bytes (`kmalloc`).
const fn allotted(bytes: u64) -> u64 {
    let power = bytes.next_power_of_two();
    if power <= 256 && bytes <= power / 4 * 3 { power / 4 * 3 } else { power }
}

/// What a map takes at most, bytes, on so many CPUs: what the kernel keeps for each entry, and for hashes a bucket of 16
/// bytes for each in the next power of two.
fn most(spec: &MapSpec, entries: u32, cpus: u64) -> u64 {
    let [key, value] = [spec.key_size, spec.value_size].map(|size| u64::from(size.next_multiple_of(8)));
    let entry = match spec.kind {
        MapKind::Array => value,
        MapKind::PerCpuArray => 8 + value * cpus,
        // A node for each prefix, and one where prefixes part.
        MapKind::LpmTrie => 2 * allotted(48 + key + value),
        MapKind::Hash => allotted(56 + key + value),
        MapKind::LruHash => 48 + key + value,
    };
    let buckets = match spec.kind {
        MapKind::Hash | MapKind::LruHash => 16 * u64::from(entries.next_power_of_two()),
        _ => 0,
    };
    // The map itself, and what it keeps ready for each CPU.
    u64::from(entries) * entry + buckets + (8 << 10) + cpus * (1 << 10)
}

#[test]
fn maps_at_default_sizes_keep_their_budget() {
    const MIB: u64 = 1 << 20;
    let datapath = Datapath::isolated(&Options::default()).expect("the programs load");
    let cpus = std::fs::read_to_string("/sys/devices/system/cpu/possible").expect("which CPUs there may be");
    let last = cpus.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u64>().ok());
    let cpus = last.expect("a number") + 1;
    let (mut at_start, mut full) = (0, 0);
    for spec in &MAPS {
        let entries = Sizes::default().wanted(spec.capacity).entries;
        let (has, most) = (memory(&datapath, spec), most(spec, entries, cpus));
        println!("| `{}` | {entries} | {} | {} |", spec.name, has >> 10, most >> 10);
        assert!(has <= most, "{}: {has} bytes, of {most} at most", spec.name);
        (at_start, full) = (at_start + has, full + most);
    }
    println!("{} MiB at the start, {} MiB at most, on {cpus} CPUs", at_start / MIB, full / MIB);
    assert!(full < 400 * MIB + cpus * MIB, "{} MiB", full / MIB);
}
