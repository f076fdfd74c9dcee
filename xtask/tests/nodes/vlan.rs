//! Frames at an edge that are none of the node's: of a VLAN, whose own device they belong to, or for another host.
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_common::reason::{Hook, Reason};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, MsgFlags, sendto};
use socket2::{Domain, Socket, Type};
use xtask::lab::netns::Netns;
use xtask::lab::{AgentOptions, Xdp, eventually};

use crate::world::{SOON, World, node_port, options, service};

/// How many of each kind, so that a neighbour's stray packet is not taken for them.
const FRAMES: u64 = 20;

/// Where a namespace's `eth0` is on its link.
fn link(ns: &Netns) -> Result<LinkAddr> {
    ns.run(|| {
        let of_eth0 = getifaddrs()?.filter(|entry| entry.interface_name == "eth0");
        let link = of_eth0.filter_map(|entry| entry.address).find_map(|addr| addr.as_link_addr().copied());
        link.context("an eth0 with a link")
    })?
}

/// A SYN with these tags: an answer would be a RST, as there are no endpoints.
fn syn(dst: [u8; 6], src: [u8; 6], tags: &[u16], [from, to]: [[u8; 4]; 2]) -> Vec<u8> {
    let tags = tags.iter().flat_map(|kind| [kind.to_be_bytes(), [0, 7]]).flatten();
    let link = dst.into_iter().chain(src).chain(tags).chain([8, 0]);
    let mut ip = [[0x45, 0, 0, 40], [0; 4], [64, 6, 0, 0], from, to].concat();
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let check = !u16::try_from(sum % 0xffff).expect("16 bits");
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let ports = 40000_u16.to_be_bytes().into_iter().chain(node_port(1).to_be_bytes());
    let tcp = ports.chain([0; 8]).chain([0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    link.chain(ip).chain(tcp).collect()
}

/// Sends a frame many times.
fn send(from: &Netns, link: &LinkAddr, frame: &[u8]) -> Result<()> {
    from.run(|| {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        for _ in 0..FRAMES {
            sendto(socket.as_raw_fd(), frame, link, MsgFlags::empty())?;
        }
        Ok(())
    })?
}

#[test]
fn tagged_frames_are_left_to_the_device_of_their_vlan() -> Result<()> {
    let world = World::with_services(AgentOptions { xdp: Xdp::Off, ..options() }, |_| vec![service(1, [])])?;
    let (outside, node) = (&world.lab().outside, world.node_a());
    let agent = world.cluster.agent(node)?;
    let (here, there) = (link(&outside.ns)?, link(&node.ns)?);
    let [src, dst] = [here, there].map(|link| link.addr().expect("an Ethernet address"));
    let ends = [outside.addrs.v4.octets(), node.addrs.v4.octets()];
    // Without a tag they are refused: the frames are good for something.
    for (tags, reason) in [
        (&[][..], Reason::NoEndpoints),
        (&[0x8100], Reason::NotIp),
        (&[0x88a8], Reason::NotIp),
        (&[0x88a8, 0x8100], Reason::NotIp),
    ] {
        let before = agent.counters()?;
        send(&outside.ns, &here, &syn(dst, src, tags, ends))?;
        eventually(SOON, || {
            let counted = agent.counters()?.since(&before);
            ensure!(counted.get(Hook::NicIn, reason) >= FRAMES, "tags {tags:04x?}: {counted:?}");
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(100));
        let deeds = agent.counters()?.since(&before).deeds().count();
        ensure!(deeds == usize::from(tags.is_empty()), "tags {tags:04x?}: {:?}", agent.counters()?);
    }
    Ok(())
}

/// A device that listens to everything sees frames for others, as each does that a switch floods them to.
fn frames_for_others_are_not_answered(xdp: Xdp, hook: Hook) -> Result<()> {
    let world = World::with_services(AgentOptions { xdp, ..options() }, |_| vec![service(1, [])])?;
    let (outside, node) = (&world.lab().outside, world.node_a());
    let agent = world.cluster.agent(node)?;
    let (here, there) = (link(&outside.ns)?, link(&node.ns)?);
    let [src, dst] = [here, there].map(|link| link.addr().expect("an Ethernet address"));
    let ends = [outside.addrs.v4.octets(), node.addrs.v4.octets()];
    node.ns.ip("link set eth0 promisc on")?;
    let other = [2, 0xfa, 0, 0, 0, 9];
    let ask = |dst, reason| -> Result<()> {
        let before = agent.counters()?;
        send(&outside.ns, &here, &syn(dst, src, &[], ends))?;
        eventually(SOON, || {
            let counted = agent.counters()?.since(&before);
            ensure!(counted.get(hook, reason) >= FRAMES, "{reason:?}: {counted:?}");
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(100));
        let deeds = agent.counters()?.since(&before).deeds().count();
        ensure!(deeds == usize::from(reason == Reason::NoEndpoints), "{reason:?}: {:?}", agent.counters()?);
        Ok(())
    };
    ask(dst, Reason::NoEndpoints)?;
    ask(other, Reason::OtherHost)?;
    // The device takes the other address: what was another's is its own.
    node.ns.ip("link set eth0 address 02:fa:00:00:00:09")?;
    eventually(SOON, || ask(other, Reason::NoEndpoints))?;
    ask(dst, Reason::OtherHost)
}

#[test]
fn frames_for_other_hosts_pass_untouched_and_counted() -> Result<()> {
    frames_for_others_are_not_answered(Xdp::Native, Hook::Xdp)
}

#[test]
fn frames_for_other_hosts_pass_untouched_and_counted_by_tc() -> Result<()> {
    frames_for_others_are_not_answered(Xdp::Off, Hook::NicIn)
}
