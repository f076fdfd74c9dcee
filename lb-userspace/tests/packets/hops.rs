//! Next hops that flows remember, in the kernel: believed until the agent says that something has changed.

use std::thread;
use std::time::Duration;

use aya::Pod;
use aya::maps::{Array, Map, MapData};
use fairlead::datapath::test_run::{Input, test_run};
use lb_common::abi::{
    AffinityKey, Backend, Flow, FlowKey, FragmentKey, Network, Routing, ServiceKey, Source,
};
use lb_common::testing::{at, ports, tcp};
use lb_common::wire::tcp_flags::{ACK, SYN};
use lb_common::{V4, V6};

use super::{DEVICE, KernelFamily, Pair, Place, ROUTER_MAC, ip, mac, map, monotonic, on_node, words};
use lb_common::pipeline::Verdict;

/// Another router's.
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 9];
/// Longer than any tick of the kernel's, so that a flow looks whether somebody follows.
const TICK: Duration = Duration::from_millis(700);

fn remembered_hops_are_followed<F: KernelFamily>(device: u32)
where
    ServiceKey<F::Addr>: Pod,
    Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let pair = Pair::<F>::new(device, None);
    if !pair.since_5_15 {
        return;
    }
    let mut routing: Array<MapData, Routing> =
        Map::Array(map::<F>(&pair.kernel, "ROUTING")).try_into().expect("an array");
    let mut follow =
        |generation, until| routing.set(0, Routing { until, generation, pad: 0 }, 0).expect("room");
    let next_hop = |flags| -> [u8; 6] {
        let frame = tcp(at(F::CLIENT, 40000), at(F::NODE, ports::FAR_NODE), flags);
        let input = Input { ifindex: device, ..Input::new(&frame) };
        let output = test_run(pair.kernel.programs(), Place::Xdp, input).expect("a run");
        assert_eq!(output.verdict, words(Place::Xdp, Verdict::Forward));
        output.frame[..6].try_into().expect("an Ethernet address")
    };
    let router_is =
        |addr| ip(&format!("neigh replace {} lladdr {} nud permanent dev {DEVICE}", F::ROUTER, mac(addr)));

    follow(7, u64::MAX);
    assert_eq!([SYN, ACK, ACK].map(next_hop), [ROUTER_MAC; 3]);
    router_is(OTHER_MAC);
    assert_eq!(next_hop(ACK), ROUTER_MAC, "it was asked for again, though nobody has said so");
    follow(8, u64::MAX);
    assert_eq!(next_hop(ACK), OTHER_MAC, "what has changed is not seen");
    // The agent has gone.
    follow(8, monotonic());
    thread::sleep(TICK);
    assert_eq!(next_hop(ACK), OTHER_MAC);
    router_is(ROUTER_MAC);
    assert_eq!(next_hop(ACK), ROUTER_MAC, "a hop is believed that nobody vouches for");
}

#[test]
fn remembered_hops_are_followed_in_ipv4() {
    on_node(remembered_hops_are_followed::<V4>);
}

#[test]
fn remembered_hops_are_followed_in_ipv6() {
    on_node(remembered_hops_are_followed::<V6>);
}
