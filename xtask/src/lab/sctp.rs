//! SCTP as far as a load balancer can tell: packets of one chunk through raw sockets, so that no kernel needs SCTP of
//! its own. INIT carries `who NONCE`, INIT ACK the nonce and an introduction; what has a wrong checksum is discarded.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lb_common::wire::{IpProto, SctpHdr, sctp_chunk};
use socket2::{Domain, Protocol, Socket, Type};

use super::client::{Answer, Call, Outcome};
use super::server::Stop;
use super::wire::Introduction;

/// Source port of calls that name none.
const ANY_PORT: u16 = 40132;
/// Common header and chunk header.
const HEADERS: usize = SctpHdr::LEN + 4;

/// A packet with one chunk.
struct Packet {
    from_port: u16,
    to_port: u16,
    kind: u8,
    text: String,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.from_port.to_be_bytes(), self.to_port.to_be_bytes()].concat();
        bytes.extend([0; 8]);
        bytes.extend([self.kind, 0]);
        bytes.extend(u16::try_from(4 + self.text.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(self.text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let check = checksum(&bytes);
        bytes[8..SctpHdr::LEN].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Reads what a raw socket received: of IPv4 the whole packet, of IPv6 what is behind its header.
    fn read(received: &[u8], is_v4: bool) -> Option<Self> {
        let header = if is_v4 { usize::from(received.first()? & 0xf) * 4 } else { 0 };
        let mut bytes = received.get(header..)?.to_vec();
        let check = u32::from_le_bytes(bytes.get(8..SctpHdr::LEN)?.try_into().ok()?);
        bytes[8..SctpHdr::LEN].fill(0);
        if check != checksum(&bytes) {
            return None;
        }
        let number = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let end = SctpHdr::LEN + usize::from(number(SctpHdr::LEN + 2)?);
        Some(Self {
            from_port: number(0)?,
            to_port: number(2)?,
            kind: *bytes.get(SctpHdr::LEN)?,
            text: String::from_utf8_lossy(bytes.get(HEADERS..end)?).into_owned(),
        })
    }
}

/// CRC32c (RFC 9260, appendix A), bit by bit: the lab does not trust the arithmetic it tests.
fn checksum(bytes: &[u8]) -> u32 {
    let shift = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| shift(crc)))
}

/// An address for a raw socket, which has no ports.
fn without_port(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip(), 0)
}

fn raw(addr: SocketAddr) -> io::Result<Socket> {
    let sctp = Protocol::from(i32::from(IpProto::Sctp as u8));
    Socket::new(Domain::for_address(addr), Type::from(nix::libc::SOCK_RAW), Some(sctp))
}

/// A socket that sends to one address only, and so is told when that is refused.
pub(super) fn connect(target: SocketAddr) -> io::Result<Socket> {
    let socket = raw(target)?;
    socket.connect(&without_port(target).into())?;
    Ok(socket)
}

/// Starts a server in the namespace of the calling thread.
pub(super) fn serve(name: &str, at: SocketAddr, stop: &Stop) -> io::Result<()> {
    let socket = raw(at)?;
    socket.bind(&without_port(at).into())?;
    let socket = UdpSocket::from(socket);
    let (name, stop) = (name.to_owned(), stop.clone());
    thread::spawn(move || {
        while stop.readable(&socket) {
            let Ok(Some((request, from))) = receive(&socket, at.is_ipv4()) else { continue };
            if request.to_port != at.port() || request.kind != sctp_chunk::INIT {
                continue;
            }
            let saw = SocketAddr::new(from.ip(), request.from_port);
            let nonce = request.text.trim_start_matches("who").trim();
            let text = format!("{nonce} {}", Introduction { server: name.clone(), at, saw });
            let (from_port, to_port) = (at.port(), saw.port());
            let answer = Packet { from_port, to_port, kind: sctp_chunk::INIT_ACK, text };
            // A client that cannot be reached any more has to say so itself.
            let _ = socket.send_to(&answer.bytes(), without_port(saw));
        }
    });
    Ok(())
}

/// Asks `who` on a socket of `call`. Late answers to earlier requests are skipped.
pub(super) fn introduce(call: &Call, socket: &Socket, nonce: u64) -> io::Result<Outcome> {
    let port = call.from_port.unwrap_or(ANY_PORT);
    let text = format!("who {nonce}");
    let request = Packet { from_port: port, to_port: call.target.port(), kind: sctp_chunk::INIT, text };
    let socket = UdpSocket::from(socket.try_clone()?);
    socket.send(&request.bytes())?;
    let local = socket.local_addr()?;
    let deadline = Instant::now() + call.patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let Some((answer, from)) = receive(&socket, call.target.is_ipv4())? else { continue };
        let Some(line) = answer.text.strip_prefix(&format!("{nonce} ")) else { continue };
        if answer.to_port != port || answer.kind != sctp_chunk::INIT_ACK {
            continue;
        }
        let peer = SocketAddr::new(from.ip(), answer.from_port);
        if peer != call.target {
            return Ok(Outcome::Failed(format!("{} answers as {peer}: {line}", call.target)));
        }
        return Ok(match line.parse() {
            Ok(introduction) => {
                Outcome::Answer(Answer { introduction, local: SocketAddr::new(local.ip(), port), peer })
            }
            Err(err) => Outcome::Failed(format!("{err:#}")),
        });
    }
}

/// The next packet, if it is sound, and where it came from.
fn receive(socket: &UdpSocket, is_v4: bool) -> io::Result<Option<(Packet, SocketAddr)>> {
    let mut buffer = [0; 2048];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok(Packet::read(&buffer[..len], is_v4).map(|packet| (packet, from)))
}
