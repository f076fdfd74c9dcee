//! The sweep: what is over leaves the flow tables, what lives stays, and so does the other half of what lives; whether the
//! kernel does it or the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::os::fd::AsFd as _;
use std::time::Duration;

use aya::Pod;
use aya::maps::{HashMap, IterableMap as _, Map, MapData};
use fairlead::datapath::{Datapath, Idle, Options, Sizes, SweepMode};
use fairlead::flows::{Pass, Sweeper};
use fairlead::sys::bpf;
use lb_common::abi::{Carry, Flow, FlowKey, Side, flow_flags};
use lb_common::flow::{State, reverse_key, reverse_value};
use lb_common::maps::MAPS;
use lb_common::{Addr4, Addr6};

use crate::support::{has_iterators, in_new_netns};

type Flows<A> = HashMap<MapData, FlowKey<A>, Flow<A>>;

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const BOTH: u8 = flow_flags::FIN | flow_flags::PEER_FIN;
const SECOND: u64 = 1_000_000_000;
/// By the agent, and by the kernel's programs where it takes them.
fn ways() -> impl Iterator<Item = SweepMode> {
    [SweepMode::Agent].into_iter().chain(has_iterators("sweeps by the kernel").then_some(SweepMode::Auto))
}

/// A datapath that sweeps this way.
fn start(sweep: SweepMode, flows: u32) -> Datapath {
    let sizes = Sizes { flows: Some(flows), services: Some(256), backends: Some(256) };
    let datapath =
        Datapath::isolated(&Options { sizes, sweep, idle: Idle::ALL, ..Options::default() }).unwrap();
    assert_eq!(datapath.sweeps().is_some(), sweep == SweepMode::Auto);
    assert_eq!(datapath.features().kernel_sweep, sweep == SweepMode::Auto);
    datapath
}

fn open<A: Copy>(datapath: &Datapath, name: &str) -> Flows<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let spec = MAPS.iter().find(|spec| spec.name == name).unwrap();
    Map::from_map_data(datapath.map_data(spec).unwrap()).and_then(HashMap::try_from).unwrap()
}

/// Walks once without pauses.
fn pass(sweeper: &mut Sweeper) -> Pass {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(sweeper.pass(Duration::ZERO)).unwrap()
}

fn monotonic() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(Duration::from(time).as_nanos()).unwrap()
}

fn addr4(client: u32) -> [Addr4; 3] {
    let [_, a, b, c] = client.to_be_bytes();
    [[10, a, b, c], [192, 0, 2, 1], [172, 16, 0, 1]].map(|octets| Addr4 { octets })
}

fn addr6(client: u32) -> [Addr6; 3] {
    let octets = |last: u32| [[0xfd; 4], [0; 4], [0; 4], last.to_be_bytes()].concat().try_into().unwrap();
    [client, 1 << 30, 1 << 31].map(|last| Addr6 { octets: octets(last) })
}

/// Both halves of a flow of a client to a frontend and its backend that was seen so long ago, the second half at another
/// time.
fn halves<A: Copy + Default>(
    [src, dst, backend]: [A; 3],
    port: u16,
    proto: u8,
    flags: u8,
    idle: [u64; 2],
) -> [(FlowKey<A>, Flow<A>); 2] {
    let key = FlowKey { src, dst, src_port: port, dst_port: 80, proto, side: Side::NicIn as u8, pad: 0 };
    let now = monotonic();
    let flow = Flow {
        last_seen: now.saturating_sub(idle[0]),
        src,
        dst: backend,
        src_port: port,
        dst_port: 8080,
        flags,
        carry: Carry::Stack as u8,
        ..Flow::default()
    };
    let other = Flow { last_seen: now.saturating_sub(idle[1]), ..reverse_value(&key, &flow) };
    [(key, flow), (reverse_key(&key, &flow), other)]
}

fn write(map: &mut Flows<Addr4>, port: u16, proto: u8, flags: u8, idle: [u64; 2]) {
    for (key, flow) in halves(addr4(7), port, proto, flags, idle) {
        map.insert(key, flow, 0).unwrap();
    }
}

#[test]
fn what_is_over_is_swept_and_what_lives_stays() {
    in_new_netns(|| ways().for_each(sweeps_what_is_over));
}

fn sweeps_what_is_over(way: SweepMode) {
    let datapath = start(way, 65536);
    let (mut flows, mut pending) = (open(&datapath, "FLOWS4"), open(&datapath, "PENDING4"));
    // The clock may not have run for a day: what needs that long is left to the tests of the states.
    let cases = [
        (true, TCP, 0, State::Opening),
        (true, UDP, 0, State::Unanswered),
        (false, UDP, 0, State::Answered),
        (false, TCP, BOTH, State::Closed),
        (false, TCP, flow_flags::RST, State::Reset),
    ];
    let mut live = BTreeSet::new();
    for (port, (is_pending, proto, flags, state)) in (1..).step_by(4).zip(cases) {
        let map = if is_pending { &mut pending } else { &mut flows };
        let (over, fresh) = (state.default_timeout() + SECOND, state.default_timeout() - 5 * SECOND);
        write(map, port, proto, flags, [over, over]);
        write(map, port + 1, proto, flags, [fresh, fresh]);
        // A packet of the other direction has come since.
        write(map, port + 2, proto, flags, [over, 0]);
        // The LRU has taken the other half.
        let [(key, flow), _] = halves(addr4(7), port + 3, proto, flags, [over, over]);
        map.insert(key, flow, 0).unwrap();
        live.extend([port + 1, port + 2]);
    }
    let mut sweeper = Sweeper::new(&datapath).unwrap();
    let found = pass(&mut sweeper);
    for (_, _, _, state) in cases {
        assert_eq!(found.swept.get(&("ipv4", state)), Some(&3), "{way:?} {state:?}");
        assert_eq!(found.flows.get(&("ipv4", state)), Some(&2), "{way:?} {state:?}");
    }
    let stay: Vec<u64> = found.fill.iter().map(|(_, entries, _)| *entries).collect();
    assert_eq!(stay, [12, 8, 0, 0], "{way:?}");
    let left: BTreeSet<u16> = [&flows, &pending]
        .into_iter()
        .flat_map(|map| map.keys().map(|key| key.unwrap()))
        .filter(|key| key.side == Side::NicIn as u8)
        .map(|key| key.src_port)
        .collect();
    assert_eq!(left, live, "{way:?}");
    // A walk begins anew each time.
    let again = pass(&mut sweeper);
    assert_eq!((again.swept.len(), again.flows), (0, found.flows), "{way:?}");
}

/// What walks have found until there was nothing left to sweep, and what is left.
#[derive(PartialEq, Eq, Debug)]
struct Outcome<A> {
    swept: BTreeMap<(&'static str, State), u64>,
    flows: BTreeMap<(&'static str, State), u64>,
    fill: Vec<(&'static str, u64, u64)>,
    left: Vec<BTreeSet<FlowKey<A>>>,
}

/// Sweeps thousands of flows of every protocol, table, flag and age, some without their other half.
fn outcome<A: Copy + Ord + Default + Debug>(
    way: SweepMode,
    names: [&str; 2],
    addresses: fn(u32) -> [A; 3],
) -> Outcome<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let datapath = start(way, 131_072);
    let mut maps = names.map(|name| open::<A>(&datapath, name));
    let mut seed = 1_u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    for client in 0..6000 {
        let proto = [TCP, UDP, SCTP][random(3) as usize];
        let flags = [0, flow_flags::FIN, BOTH, flow_flags::RST, flow_flags::ANSWERED][random(5) as usize];
        // Far from every time-out: the two tables are not written at the same time.
        let mut age = || [0, 20, 45, 90, 150][random(5) as usize] * SECOND;
        let idle = [age(), age()];
        let map = &mut maps[random(2) as usize];
        let alone = random(10) == 0;
        for (key, flow) in halves(addresses(client), 1000, proto, flags, idle).into_iter().skip(alone.into())
        {
            map.insert(key, flow, 0).unwrap();
        }
    }
    let mut sweeper = Sweeper::new(&datapath).unwrap();
    let mut swept: BTreeMap<_, u64> = BTreeMap::new();
    for _ in 0..100 {
        let found = pass(&mut sweeper);
        for (labels, entries) in &found.swept {
            *swept.entry(*labels).or_default() += entries;
        }
        if found.swept.is_empty() {
            let left = maps.iter().map(|map| map.keys().map(|key| key.unwrap()).collect()).collect();
            return Outcome { swept, flows: found.flows, fill: found.fill, left };
        }
    }
    panic!("{way:?}: still something to sweep");
}

#[test]
fn kernel_and_agent_sweep_the_same() {
    in_new_netns(|| {
        let agent = outcome(SweepMode::Agent, ["FLOWS4", "PENDING4"], addr4);
        assert!(agent.swept.len() >= 5 && agent.flows.len() >= 7, "{:?} {:?}", agent.swept, agent.flows);
        let agent6 = outcome(SweepMode::Agent, ["FLOWS6", "PENDING6"], addr6);
        assert!(agent6.swept.keys().all(|(family, _)| *family == "ipv6") && !agent6.swept.is_empty());
        if has_iterators("whether the kernel sweeps as the agent does") {
            assert_eq!(outcome(SweepMode::Auto, ["FLOWS4", "PENDING4"], addr4), agent);
            assert_eq!(outcome(SweepMode::Auto, ["FLOWS6", "PENDING6"], addr6), agent6);
        }
    });
}

/// What walks over a table cost by which nothing, half or all is to be removed. `FAIRLEAD_SWEEP_ENTRIES=1000000` is what
/// docs/datapath.md tells of.
#[test]
fn a_walk_keeps_its_budget() {
    // A walk over a table that is too small leaves too much to chance.
    let usual = if std::env::var_os("FAIRLEAD_FEWER").is_some() { 10_000 } else { 50_000 };
    let entries = std::env::var("FAIRLEAD_SWEEP_ENTRIES").map_or(usual, |text| text.parse().unwrap());
    in_new_netns(move || {
        for way in ways() {
            let datapath = start(way, entries + entries / 4);
            let flows = open::<Addr4>(&datapath, "FLOWS4");
            let mut sweeper = Sweeper::new(&datapath).unwrap();
            for over_of_2 in 0..=2 {
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                for client in 0..entries / 2 {
                    let idle = if client % 2 < over_of_2 { 130 * SECOND } else { 0 };
                    for (key, flow) in halves(addr4(client), 1000, UDP, flow_flags::ANSWERED, [idle; 2]) {
                        keys.push(key);
                        values.push(flow);
                    }
                }
                bpf::map_update_batch(flows.map().fd().as_fd(), &keys, &values).unwrap();
                let Pass { busy, longest, swept, .. } = pass(&mut sweeper);
                let swept: u64 = swept.values().sum();
                println!("{way:?}: {swept} of {entries} over: {busy:?}, longest slice {longest:?}");
                // Some hide behind what was removed where a slice ended.
                let over = u64::from(entries / 2 * over_of_2);
                assert!(swept <= over && swept >= over / 100 * 98, "{way:?}: {swept} of {over}");
                assert!(busy < Duration::from_secs(2) * entries.div_ceil(50_000), "{way:?}: {busy:?}");
                assert!(longest < Duration::from_millis(500), "{way:?}: {longest:?}");
            }
        }
    });
}
