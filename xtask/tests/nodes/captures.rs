//! What arrives where, seen by a reader of its own on the wires: every checksum is right, or will be when a device has
//! completed it, and nobody meets a packet of which one half was translated.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom, setsockopt};
use nix::{libc, setsockopt_impl, sockopt_impl};
use socket2::{Domain, Protocol as Number, Socket, Type};
use xtask::lab::netns::Netns;
use xtask::lab::{Addrs, AgentOptions, Call, Caller, Family, Protocol, Xdp};

use crate::world::{PORT, TARGET_PORT, World, at_vip, node_port, options, service, set_offloads, vip};

/// Every Ethernet type.
const ETH_P_ALL: u16 = 3;
const TCP: u8 = 6;
const UDP: u8 = 17;

sockopt_impl!(
    /// Packets come with what is known of their checksum and segments (`struct virtio_net_hdr`).
    VnetHeader,
    SetOnly,
    libc::SOL_PACKET,
    libc::PACKET_VNET_HDR,
    bool
);

/// Bytes of `struct virtio_net_hdr`.
const VNET_HEADER: usize = 10;
/// In its flags: the checksum is to be completed from `csum_start` on, into the field at `csum_offset`.
const NEEDS_CSUM: u8 = 1;

#[test]
fn captures_hold_no_wrong_checksum_with_xdp() -> Result<()> {
    capture(AgentOptions { xdp: Xdp::Native, ..options() }, false)
}

#[test]
fn captures_hold_no_wrong_checksum_with_tc() -> Result<()> {
    capture(AgentOptions { xdp: Xdp::Off, ..options() }, false)
}

#[test]
fn captures_hold_no_wrong_checksum_with_offloads() -> Result<()> {
    capture(AgentOptions { xdp: Xdp::Off, ..options() }, true)
}

/// A packet as it arrived.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
    /// Of TCP and UDP, unless in a later fragment.
    ports: Option<(u16, u16)>,
    ttl: u8,
}

/// What somebody got.
#[derive(Default)]
struct Capture {
    packets: BTreeSet<Packet>,
    /// Transport checksums that were looked at.
    checked: u64,
    /// Those of them that a device has yet to complete.
    unfinished: u64,
    /// Packets that are longer than a wire takes, and will be divided, or were put together.
    segments: u64,
    wrong: Vec<String>,
}

/// Where somebody listens, and to what.
struct Place<'a> {
    ns: &'a Netns,
    device: &'a str,
    /// What comes in for these addresses; `None`: all there is on the wire.
    addrs: Option<[IpAddr; 2]>,
}

/// With `offloads`, senders leave checksums and segments to devices, and receivers put segments together.
fn capture(options: AgentOptions, offloads: bool) -> Result<()> {
    let world = World::with_services(options, |world| {
        vec![service(1, [&world.a1]), service(2, [&world.b1]), service(3, [])]
    })?;
    let lab = world.lab();
    let pods = world.pods();
    let mut devices: Vec<(&Netns, &str)> = pods.iter().map(|pod| (&pod.ns, "eth0")).collect();
    devices.extend([&lab.outside, &lab.far].map(|machine| (&machine.ns, "eth0")));
    for (node, pods) in [(world.node_a(), [&world.a1, &world.a2]), (world.node_b(), [&world.b1, &world.b2])] {
        devices.extend(pods.map(|pod| (&node.ns, pod.device.as_str())));
        if offloads {
            devices.extend([(&node.ns, "eth0"), (&lab.router, node.name.as_str())]);
        }
    }
    if offloads {
        devices.extend([(&lab.router, "outside"), (&lab.router, "far")]);
    }
    let state = if offloads { "on" } else { "off" };
    for (ns, device) in devices {
        set_offloads(ns, device, &["tx", state, "gro", state])?;
    }
    let end = |ns, addrs: Addrs| Place { ns, device: "eth0", addrs: Some(addrs.both()) };
    let wire = |device| Place { ns: &lab.router, device, addrs: None };
    let places: [Place<'_>; 8] = [
        end(&lab.outside.ns, lab.outside.addrs),
        end(&lab.far.ns, lab.far.addrs),
        end(&world.a1.ns, world.a1.addrs),
        end(&world.a2.ns, world.a2.addrs),
        end(&world.b1.ns, world.b1.addrs),
        end(&world.b2.ns, world.b2.addrs),
        wire("node-a"),
        wire("node-b"),
    ];
    let done = AtomicBool::new(false);
    let captures = std::thread::scope(|scope| -> Result<Vec<Capture>> {
        let readers = places
            .iter()
            .map(|place| -> Result<_> {
                let (socket, device) = place.ns.run(|| listen(place.device))??;
                let done = &done;
                Ok(scope.spawn(move || read_all(&socket, device, place.addrs.as_ref(), done)))
            })
            .collect::<Result<Vec<_>>>();
        let talked = talk(&world);
        done.store(true, Ordering::Relaxed);
        talked?;
        readers?.into_iter().map(|reader| reader.join().expect("a reader")).collect()
    })?;

    for (Place { ns, device, .. }, capture) in places.iter().zip(&captures) {
        let Capture { checked, unfinished, segments, wrong, .. } = capture;
        let what = format!(
            "{device} of {}: {checked} packets, {unfinished} of them unfinished, {segments} long",
            ns.name()
        );
        ensure!(wrong.is_empty(), "{what}: {wrong:#?}");
        ensure!(*checked > 100, "{what}");
        // Without offloads, there is nothing to complete on any wire.
        ensure!(if offloads { *unfinished > 20 && *segments > 0 } else { *unfinished == 0 }, "{what}");
    }
    let pods: Vec<IpAddr> = world.pods().iter().flat_map(|pod| pod.addrs.both()).collect();
    let frontends: Vec<IpAddr> = [1, 2, 3].into_iter().flat_map(vip).collect();
    // On the wires of the nodes, who is outside talks with nodes alone, and of Services' addresses nobody knows.
    let outside = [lab.outside.addrs.both(), lab.far.addrs.both()].concat();
    for wire in &captures[6..] {
        ensure!(wire.packets.iter().any(|packet| pods.contains(&packet.dst)), "no pod on the wire");
        for packet in &wire.packets {
            let ends = [packet.src, packet.dst];
            let met =
                ends.iter().any(|end| outside.contains(end)) && ends.iter().any(|end| pods.contains(end));
            ensure!(!met && !ends.iter().any(|end| frontends.contains(end)), "on a wire: {packet:?}");
        }
    }
    // Clients ask frontends alone, and so hear from frontends alone.
    for client in [0, 1, 3, 5] {
        for packet in &captures[client].packets {
            let answer = packet.ports.is_some_and(|(from, _)| from == TARGET_PORT);
            ensure!(!answer && (client > 1 || !pods.contains(&packet.src)), "a client got {packet:?}");
        }
    }
    // Backends hear from clients and nodes: of frontends only themselves, who asked them.
    for (backend, number) in [(2, 1), (4, 2)] {
        for packet in &captures[backend].packets {
            let from_frontend = frontends.contains(&packet.src);
            ensure!(!from_frontend || vip(number).contains(&packet.src), "a backend got {packet:?}");
            let port = packet.ports.map(|(_, to)| to);
            ensure!(![Some(PORT), Some(node_port(number))].contains(&port), "a backend got {packet:?}");
        }
    }
    // Rule 9: each node that forwards counts once, and the router before the far client.
    let nodes = [lab.node_a.addrs.both(), lab.node_b.addrs.both()].concat();
    let askers = [
        (lab.outside.addrs.both().to_vec(), BTreeSet::from([63])),
        (lab.far.addrs.both().to_vec(), BTreeSet::from([62])),
        (nodes, BTreeSet::from([62, 61])),
    ];
    for backend in [2, 4] {
        for (addrs, hops) in &askers {
            let packets = captures[backend].packets.iter().filter(|packet| addrs.contains(&packet.src));
            let asked = packets.filter(|packet| packet.ports.is_some_and(|(_, to)| to == TARGET_PORT));
            let seen: BTreeSet<u8> = asked.map(|packet| packet.ttl).collect();
            ensure!(seen == *hops, "from {addrs:?}: TTLs {seen:?} instead of {hops:?}");
        }
    }
    Ok(())
}

/// A bit of everything, in both families.
fn talk(world: &World) -> Result<()> {
    let lab = world.lab();
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            for number in [1, 2] {
                let near = [&*lab.outside, &*lab.far];
                let outside = near
                    .into_iter()
                    .flat_map(|caller| lab.nodes().map(|node| (caller, node.at(family, node_port(number)))));
                let pods: [&Caller; 2] = [&world.a2, &world.b2];
                let inside = pods.map(|caller| (caller, at_vip(number, family, PORT)));
                let itself: &Caller = if number == 1 { &world.a1 } else { &world.b1 };
                for (caller, target) in outside.chain(inside).chain([(itself, at_vip(number, family, PORT))])
                {
                    let call = Call::new(protocol, target);
                    caller.transfer(call.clone(), 200_000).with_context(|| format!("{call:?}"))?;
                    if protocol == Protocol::Udp {
                        caller.transfer(call.datagram(3000), 30_000)?;
                    }
                }
            }
            for caller in [&*lab.outside, &*world.a2, &*world.b2] {
                let target = if caller.name() == lab.outside.name() {
                    lab.node_a.at(family, node_port(3))
                } else {
                    at_vip(3, family, PORT)
                };
                caller.ask(Call::new(protocol, target))?;
            }
        }
    }
    Ok(())
}

/// A socket that sees every packet of a namespace, and the number of the device that is meant.
fn listen(device: &str) -> Result<(Socket, usize)> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Number::from(i32::from(ETH_P_ALL.to_be()))))?;
    socket.set_recv_buffer_size(64 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    setsockopt(&socket, VnetHeader, &true)?;
    Ok((socket, usize::try_from(nix::net::if_::if_nametoindex(device)?)?))
}

/// Reads what arrives at these addresses, or all there is, until all is said and nothing comes any more.
fn read_all(
    socket: &Socket,
    device: usize,
    addrs: Option<&[IpAddr; 2]>,
    done: &AtomicBool,
) -> Result<Capture> {
    let mut capture = Capture::default();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((len, from)) if from.is_some_and(|from| from.ifindex() == device) => {
                if let Some((header, frame)) = buffer[..len].split_first_chunk() {
                    look(header, frame, addrs, &mut capture);
                }
            }
            Ok(_) => {}
            Err(Errno::EAGAIN) => {
                if done.load(Ordering::Relaxed) {
                    return Ok(capture);
                }
            }
            Err(error) => return Err(error).context("a packet socket"),
        }
    }
}

/// Sum in one's complement (RFC 1071).
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u64::from(*byte))).sum()
}

fn look(known: &[u8; VNET_HEADER], frame: &[u8], addrs: Option<&[IpAddr; 2]>, capture: &mut Capture) {
    let Some((link, ip)) = frame.split_at_checked(14) else { return };
    let array = |at: usize| <[u8; 16]>::try_from(&ip[at..at + 16]).expect("16 bytes");
    let quad = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).expect("4 bytes");
    let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
    let (src, dst, ttl, mut proto, mut header, end, mut fragment): (IpAddr, IpAddr, _, _, _, _, _) =
        match link[12..] {
            [8, 0] if ip.len() >= 20 => {
                let header = usize::from(ip[0] & 15) * 4;
                if !sum(&ip[..header]).is_multiple_of(0xffff) {
                    capture.wrong.push(format!("IPv4 header {:02x?}", &ip[..header]));
                }
                (
                    quad(12).into(),
                    quad(16).into(),
                    ip[8],
                    ip[9],
                    header,
                    usize::from(word(2)),
                    word(6) & 0x3fff,
                )
            }
            [0x86, 0xdd] if ip.len() >= 40 => {
                (array(8).into(), array(24).into(), ip[7], ip[6], 40, 40 + usize::from(word(4)), 0)
            }
            _ => return,
        };
    if addrs.is_some_and(|addrs| !addrs.contains(&dst) || addrs.contains(&src)) {
        return;
    }
    if proto == 44 {
        (proto, fragment) = (ip[header], word(header + 2));
        header += 8;
    }
    let first = fragment & if src.is_ipv4() { 0x1fff } else { 0xfff8 } == 0;
    let ports = (first && [TCP, UDP].contains(&proto)).then(|| (word(header), word(header + 2)));
    capture.packets.insert(Packet { src, dst, proto, ports, ttl });
    if fragment != 0 {
        return;
    }
    let Some(body) = ip.get(header..end) else {
        capture.wrong.push(format!("{end} bytes of IP in a frame of {}", frame.len()));
        return;
    };
    let pseudo = match (src, dst) {
        (IpAddr::V4(_), _) if proto == 1 => 0,
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            sum(&src.octets()) + sum(&dst.octets()) + u64::from(proto) + body.len() as u64
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            sum(&src.octets()) + sum(&dst.octets()) + u64::from(proto) + body.len() as u64
        }
        _ => return,
    };
    capture.segments += u64::from(known[1] != 0);
    if known[0] & NEEDS_CSUM != 0 {
        // The field has the pseudo-header's sum; whoever completes the checksum adds all from the header on.
        let at = |at: usize| usize::from(u16::from_ne_bytes([known[at], known[at + 1]]));
        let (start, field) = (at(6), at(8));
        capture.checked += 1;
        capture.unfinished += 1;
        let right = start == link.len() + header
            && field == if proto == TCP { 16 } else { 6 }
            && sum(&body[field..field + 2]) % 0xffff == pseudo % 0xffff;
        if !right {
            let what = format!("unfinished, from {start} to {field}: protocol {proto} from {src} to {dst}");
            capture.wrong.push(format!("{what} {ports:?}, {} bytes", body.len()));
        }
        return;
    }
    let none = proto == UDP && src.is_ipv4() && body[6..8] == [0, 0];
    if [1, TCP, UDP, 58].contains(&proto) && !none {
        capture.checked += 1;
        if !(pseudo + sum(body)).is_multiple_of(0xffff) {
            capture
                .wrong
                .push(format!("protocol {proto} of {} bytes from {src} to {dst} {ports:?}", body.len()));
        }
    }
}
