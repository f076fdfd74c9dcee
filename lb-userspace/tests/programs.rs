//! Budgets of the kernel programs, and that they load in every configuration. Needs root.

use std::sync::Mutex;

use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Options, Place, Sizes, program_names};
use lb_common::maps::{Capacity, MAPS, programs};

fn options() -> Options {
    let sizes = Sizes { flows: Some(1024), services: Some(1024), backends: Some(1024) };
    Options { sizes, ..Options::default() }
}

/// What a program may cost: (verified instructions, bytes of machine code). The verifier stops at a million.
fn budget(name: &str) -> (u32, u32) {
    match name {
        programs::XDP_NIC => (650_000, 56_000),
        programs::TC_NIC_IN | programs::TC_POD_IN => (500_000, 56_000),
        programs::TC_NIC_OUT | programs::TC_POD_OUT => (100_000, 40_000),
        _ => (16_000, 12_000),
    }
}

#[test]
fn programs_keep_their_budgets() {
    let datapath = Datapath::isolated(&options()).expect("the programs load");
    for name in program_names() {
        let program = datapath.programs().get(name).expect(name);
        let info = fairlead::sys::bpf::prog_info(program).expect("what the kernel knows of it");
        let (instructions, bytes) = budget(name);
        println!("{name}: {} instructions verified, {} bytes", info.verified_insns, info.jited_len);
        assert!(info.verified_insns <= instructions, "{name}: {info:?}");
        assert!(info.jited_len > 0 && info.jited_len <= bytes, "{name}: {info:?}");
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

#[test]
fn maps_at_default_sizes_stay_below_their_memory() {
    let sizes = Sizes::default();
    let bytes: u64 = MAPS
        .iter()
        .map(|spec| {
            let entries = u64::from(sizes.wanted(spec.capacity).entries);
            // What the kernel adds to each entry: a hash element's header (48 bytes, 56 with its LRU node).
            let overhead = if matches!(spec.capacity, Capacity::Backends | Capacity::Slots) { 0 } else { 56 };
            let element = u64::from(spec.key_size.next_multiple_of(8) + spec.value_size.next_multiple_of(8));
            entries * (element + overhead)
        })
        .sum();
    assert!(bytes < 336 << 20, "{} MiB", bytes >> 20);
}
