//! What arrives where, seen by a reader of its own on the wires: every checksum is right, and nobody meets a packet of
//! which one half was translated.
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol as Number, Socket, Type};
use xtask::lab::netns::Netns;
use xtask::lab::{AgentOptions, Call, Caller, Family, Protocol, Xdp};

use crate::world::{PORT, TARGET_PORT, World, at_vip, node_port, options, service, set_offload, vip};

/// Every Ethernet type.
const ETH_P_ALL: u16 = 3;
const TCP: u8 = 6;
const UDP: u8 = 17;

#[test]
fn captures_hold_no_wrong_checksum_with_xdp() -> Result<()> {
    capture(AgentOptions { xdp: Xdp::Native, ..options() })
}

#[test]
fn captures_hold_no_wrong_checksum_with_tc() -> Result<()> {
    capture(AgentOptions { xdp: Xdp::Off, ..options() })
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
    wrong: Vec<String>,
}

fn capture(options: AgentOptions) -> Result<()> {
    let world = World::with_services(options, |world| {
        vec![service(1, [&world.a1]), service(2, [&world.b1]), service(3, [])]
    })?;
    let lab = world.lab();
    // Whose own device computes no checksum sends them complete; what receivers put together is no packet of the wire.
    for ns in [&world.a1, &world.a2, &world.b1, &world.b2].map(|pod| &pod.ns) {
        set_offload(ns, "eth0", "tx", "off")?;
    }
    for (node, pods) in [(world.node_a(), [&world.a1, &world.a2]), (world.node_b(), [&world.b1, &world.b2])] {
        pods.into_iter().try_for_each(|pod| set_offload(&node.ns, &pod.device, "tx", "off"))?;
    }
    for machine in [&lab.outside, &lab.far] {
        set_offload(&machine.ns, "eth0", "tx", "off")?;
    }
    let places: [(&Netns, [IpAddr; 2]); 6] = [
        (&lab.outside.ns, lab.outside.addrs.both()),
        (&lab.far.ns, lab.far.addrs.both()),
        (&world.a1.ns, world.a1.addrs.both()),
        (&world.a2.ns, world.a2.addrs.both()),
        (&world.b1.ns, world.b1.addrs.both()),
        (&world.b2.ns, world.b2.addrs.both()),
    ];
    let done = AtomicBool::new(false);
    let captures = std::thread::scope(|scope| -> Result<Vec<Capture>> {
        let readers = places
            .map(|(ns, addrs)| -> Result<_> {
                let socket = ns.run(listen)??;
                let done = &done;
                Ok(scope.spawn(move || read_all(&socket, &addrs, done)))
            })
            .into_iter()
            .collect::<Result<Vec<_>>>();
        let talked = talk(&world);
        done.store(true, Ordering::Relaxed);
        talked?;
        readers?.into_iter().map(|reader| reader.join().expect("a reader")).collect()
    })?;

    for ((ns, _), capture) in places.iter().zip(&captures) {
        ensure!(capture.wrong.is_empty(), "{}: {:#?}", ns.name(), capture.wrong);
        ensure!(capture.checked > 100, "{}: only {} packets were looked at", ns.name(), capture.checked);
    }
    let pods: Vec<IpAddr> = world.pods().iter().flat_map(|pod| pod.addrs.both()).collect();
    // Clients ask frontends alone, and so hear from frontends alone.
    for client in [0, 1, 3, 5] {
        for packet in &captures[client].packets {
            let answer = packet.ports.is_some_and(|(from, _)| from == TARGET_PORT);
            ensure!(!answer && (client > 1 || !pods.contains(&packet.src)), "a client got {packet:?}");
        }
    }
    // Backends hear from clients and nodes: of frontends only themselves, who asked them.
    let frontends: Vec<IpAddr> = [1, 2, 3].into_iter().flat_map(vip).collect();
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

fn listen() -> Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Number::from(i32::from(ETH_P_ALL.to_be()))))?;
    socket.set_recv_buffer_size(64 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(socket)
}

/// Reads what arrives at these addresses until all is said and nothing comes any more.
fn read_all(mut socket: &Socket, addrs: &[IpAddr], done: &AtomicBool) -> Result<Capture> {
    let mut capture = Capture::default();
    let mut frame = vec![0; 1 << 16];
    loop {
        match socket.read(&mut frame) {
            Ok(len) => look(&frame[..len], addrs, &mut capture),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
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

fn look(frame: &[u8], addrs: &[IpAddr], capture: &mut Capture) {
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
    if !addrs.contains(&dst) || addrs.contains(&src) {
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
