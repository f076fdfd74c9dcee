//! Frames that a device sees and that are another host's.

use lb_common::abi::{OwnMac, Side};
use lb_common::maps::MAX_MACS;
use lb_common::pipeline::Verdict;
use lb_common::testing::node::{NIC, Node, client};
use lb_common::testing::{RECEIVER, TestFamily, at, ports, tcp};
use lb_common::wire::Mac;
use lb_common::wire::tcp_flags::SYN;
use lb_common::{Reason, both_families};

both_families! {
    what_is_for_another_host_is_left_alone
}

fn what_is_for_another_host_is_left_alone<F: TestFamily>() {
    let mut node = Node::<F>::new();
    let to = |dst: [u8; 6]| {
        let mut frame = tcp(client::<F>(40000), at(F::NODE, ports::WEB_NODE), SYN);
        frame[..6].copy_from_slice(&dst);
        frame
    };
    let [mut first, mut last, mut group] = [RECEIVER; 3];
    first[1] ^= 1;
    last[5] ^= 1;
    group[0] |= 1;
    // Nobody has said what the device's address is.
    assert_eq!(node.send(Side::NicIn, to(last)).reason, Reason::Translated);
    let own = OwnMac { ifindex: NIC, mac: Mac { octets: RECEIVER }, pad: 0 };
    // The place is another device's.
    node.tables.own_macs.insert(NIC, OwnMac { ifindex: NIC + MAX_MACS, ..own });
    assert_eq!(node.send(Side::NicIn, to(last)).reason, Reason::Translated);
    node.tables.own_macs.insert(NIC, own);
    for other in [first, last] {
        node.send(Side::NicIn, to(other)).untouched(Verdict::Pass, Reason::OtherHost);
    }
    for own in [RECEIVER, group, [0xff; 6]] {
        assert_eq!(node.send(Side::NicIn, to(own)).reason, Reason::Translated, "{own:02x?}");
    }
    // Pods send to the bridge that they are behind.
    let frame = tcp(at(F::OTHER_POD, 5000), at(F::VIP, ports::WEB), SYN);
    node.tables.own_macs.insert(NIC, OwnMac { mac: Mac { octets: last }, ..own });
    assert_eq!(node.send(Side::PodIn, frame).reason, Reason::Translated);
}
