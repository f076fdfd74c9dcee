//! The sweep: what is over leaves the flow tables, what lives stays, and so does the other half of what lives.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use fairlead::datapath::{Datapath, Options, Sizes};
use fairlead::flows::Sweeper;
use lb_common::Addr4;
use lb_common::abi::{Carry, Flow, FlowKey, Side, flow_flags};
use lb_common::flow::{State, reverse_key, reverse_value};
use lb_common::maps::MAPS;

use crate::support::in_new_netns;

type Flows = HashMap<MapData, FlowKey<Addr4>, Flow<Addr4>>;

const TCP: u8 = 6;
const UDP: u8 = 17;
const BOTH: u8 = flow_flags::FIN | flow_flags::PEER_FIN;

fn open(datapath: &Datapath, name: &str) -> Flows {
    let spec = MAPS.iter().find(|spec| spec.name == name).unwrap();
    Map::from_map_data(datapath.map_data(spec).unwrap()).and_then(HashMap::try_from).unwrap()
}

fn monotonic() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(Duration::from(time).as_nanos()).unwrap()
}

/// Writes both halves of a flow that was seen so long ago, the second half at another time.
fn write(map: &mut Flows, port: u16, proto: u8, flags: u8, idle: [u64; 2]) {
    let side = Side::NicIn as u8;
    let (src, dst) = (Addr4 { octets: [192, 0, 2, 7] }, Addr4 { octets: [192, 0, 2, 1] });
    let key = FlowKey { src, dst, src_port: port, dst_port: 80, proto, side, pad: 0 };
    let backend = Addr4 { octets: [10, 0, 0, 1] };
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
    let mut other = reverse_value(&key, &flow);
    other.last_seen = now.saturating_sub(idle[1]);
    map.insert(key, flow, 0).unwrap();
    map.insert(reverse_key(&key, &flow), other, 0).unwrap();
}

#[test]
fn what_is_over_is_swept_and_what_lives_stays() {
    in_new_netns(|| {
        let sizes = Sizes { flows: Some(65536), services: Some(256), backends: Some(256) };
        let datapath = Datapath::isolated(&Options { sizes, ..Options::default() }).unwrap();
        let (mut flows, mut pending) = (open(&datapath, "FLOWS4"), open(&datapath, "PENDING4"));
        // The clock may not have run for a day: what needs that long is left to the tests of the states.
        let cases = [
            (true, TCP, 0, State::Opening),
            (true, UDP, 0, State::Unanswered),
            (false, UDP, 0, State::Answered),
            (false, TCP, BOTH, State::Closed),
            (false, TCP, flow_flags::RST, State::Reset),
        ];
        let second = 1_000_000_000;
        let mut live = BTreeSet::new();
        for (port, (is_pending, proto, flags, state)) in (1..).step_by(3).zip(cases) {
            let map = if is_pending { &mut pending } else { &mut flows };
            let (over, fresh) = (state.default_timeout() + second, state.default_timeout() - 5 * second);
            write(map, port, proto, flags, [over, over]);
            write(map, port + 1, proto, flags, [fresh, fresh]);
            // A packet of the other direction has come since.
            write(map, port + 2, proto, flags, [over, 0]);
            live.extend([port + 1, port + 2]);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut sweeper = Sweeper::new(&datapath).unwrap();
        let pass = runtime.block_on(sweeper.pass(Duration::ZERO)).unwrap();
        for (_, _, _, state) in cases {
            assert_eq!(pass.swept.get(&("ipv4", state)), Some(&2), "{state:?}");
            assert_eq!(pass.flows.get(&("ipv4", state)), Some(&2), "{state:?}");
        }
        let left: BTreeSet<u16> = [&flows, &pending]
            .into_iter()
            .flat_map(|map| map.keys().map(|key| key.unwrap()))
            .filter(|key| key.side == Side::NicIn as u8)
            .map(|key| key.src_port)
            .collect();
        assert_eq!(left, live);

        // What a walk costs.
        for port in 0..25_000 {
            write(&mut flows, port, TCP, 0, [0, 0]);
        }
        let begin = Instant::now();
        let pass = runtime.block_on(sweeper.pass(Duration::ZERO)).unwrap();
        println!("50000 entries: {:?} of {:?}", pass.busy, begin.elapsed());
        assert!(pass.busy < Duration::from_secs(2), "{:?}", pass.busy);
    });
}
