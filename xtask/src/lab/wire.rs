//! What the lab's clients and servers say to each other.
//!
//! Over TCP a client sends a line and gets a line: `who` is answered with an [`Introduction`]; `bulk N` with
//! one too, after which both sides send N bytes of a known stream at the same time and the server says in a
//! last line what it made of the client's. A line that begins with `GET` gets the introduction as HTTP, for
//! people with curl. Over UDP, `who NONCE` is answered with the nonce and an introduction, and a [`Frame`]
//! with the frame of the other direction.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::{Context, Error, anyhow};
use serde::{Deserialize, Serialize};

/// Transport protocol of a call or server.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    /// Without sockets: single calls only.
    Sctp,
}

impl Protocol {
    /// Those with sockets.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// How a server answers `who`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Introduction {
    /// Name of the pod or node.
    pub server: String,
    /// The server's own address.
    pub at: SocketAddr,
    /// The client's address as the server sees it.
    pub saw: SocketAddr,
}

impl fmt::Display for Introduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, at, saw } = self;
        write!(f, "{server} at {at} saw {saw}")
    }
}

impl FromStr for Introduction {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self, Error> {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            [server, "at", at, "saw", saw] => {
                Ok(Self { server: (*server).to_owned(), at: at.parse()?, saw: saw.parse()? })
            }
            _ => Err(anyhow!("not an introduction: {line:?}")),
        }
    }
}

/// Who sends a stream: each direction has its own bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Sender {
    Client = 1,
    Server = 2,
}

/// Bytes are made and compared in pieces of this size.
const PIECE: usize = 32 * 1024;

/// Byte `8 * i` and the seven after it are SplitMix64's output number `i` for the seed `key`: any part of a
/// stream can be made on its own.
fn fill(key: u64, first_word: u64, bytes: &mut [u8]) {
    for (word, i) in bytes.chunks_mut(8).zip(first_word..) {
        let mut z = key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..word.len()]);
    }
}

fn pieces(sender: Sender, len: u64) -> impl Iterator<Item = Vec<u8>> {
    (0..len.div_ceil(PIECE as u64)).map(move |i| {
        let start = i * PIECE as u64;
        let size = (len - start).min(PIECE as u64);
        let mut piece = vec![0; usize::try_from(size).unwrap_or(PIECE)];
        fill(sender as u64, start / 8, &mut piece);
        piece
    })
}

/// Sends the stream of `sender`.
pub fn send_stream(out: &mut impl Write, sender: Sender, len: u64) -> io::Result<()> {
    pieces(sender, len).try_for_each(|piece| out.write_all(&piece))
}

/// Receives the stream of `sender` to its end; the number of the first byte that is not as it was sent, if
/// there is one.
pub fn receive_stream(input: &mut impl Read, sender: Sender, len: u64) -> io::Result<Option<u64>> {
    let mut first_wrong = None;
    let mut offset = 0;
    for want in pieces(sender, len) {
        let mut got = vec![0; want.len()];
        input.read_exact(&mut got)?;
        if first_wrong.is_none() {
            first_wrong = difference(&want, &got).map(|at| offset + at);
        }
        offset += want.len() as u64;
    }
    Ok(first_wrong)
}

fn difference(want: &[u8], got: &[u8]) -> Option<u64> {
    if want == got {
        return None;
    }
    let at = want.iter().zip(got).position(|(want, got)| want != got);
    Some(at.unwrap_or(want.len().min(got.len())) as u64)
}

/// A datagram of a bulk transfer: `#`, its number, and bytes that follow from number and direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub number: u32,
    pub sender: Sender,
    /// Of the whole datagram.
    pub len: usize,
}

impl Frame {
    const MARK: u8 = b'#';
    const HEADER: usize = 5;

    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        fill(self.sender as u64 ^ (u64::from(self.number) << 8), 0, &mut bytes);
        if let Some(header) = bytes.first_chunk_mut::<{ Self::HEADER }>() {
            header[0] = Self::MARK;
            header[1..].copy_from_slice(&self.number.to_be_bytes());
        }
        bytes
    }

    /// The frame that `sender` sent as `bytes`; an error if a byte of it is wrong, `None` if it is none.
    pub fn check(sender: Sender, bytes: &[u8]) -> Result<Option<Self>, Error> {
        let Some((&[Self::MARK, a, b, c, d], _)) = bytes.split_first_chunk::<{ Self::HEADER }>() else {
            return Ok(None);
        };
        let frame = Self { number: u32::from_be_bytes([a, b, c, d]), sender, len: bytes.len() };
        match difference(&frame.bytes(), bytes) {
            None => Ok(Some(frame)),
            Some(at) => Err(anyhow!("datagram {} is damaged at byte {at}", frame.number)),
        }
    }
}

/// Reads one line, without taking a byte more from the stream. Lines of this protocol are short.
pub fn read_line(input: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        if input.read(&mut byte)? == 0 {
            break;
        }
        match byte {
            [b'\n'] => return Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
            [byte] => line.push(byte),
        }
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"))
}

/// The number in `bulk N`.
pub fn bulk_len(line: &str) -> Result<Option<u64>, Error> {
    let Some(len) = line.strip_prefix("bulk ") else { return Ok(None) };
    len.parse().map(Some).with_context(|| format!("not a length: {len:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_compare_byte_by_byte() {
        let len = 3 * PIECE as u64 + 13;
        let mut sent = Vec::new();
        send_stream(&mut sent, Sender::Client, len).unwrap();
        assert_eq!(sent.len() as u64, len);
        assert_eq!(receive_stream(&mut sent.as_slice(), Sender::Client, len).unwrap(), None);
        assert_eq!(receive_stream(&mut sent.as_slice(), Sender::Server, len).unwrap(), Some(0));
        sent[PIECE + 5] ^= 1;
        assert_eq!(
            receive_stream(&mut sent.as_slice(), Sender::Client, len).unwrap(),
            Some(PIECE as u64 + 5)
        );
        assert!(receive_stream(&mut &sent[1..], Sender::Client, len).is_err());
    }

    #[test]
    fn frames_show_damage() {
        let frame = Frame { number: 7, sender: Sender::Server, len: 1400 };
        let mut bytes = frame.bytes();
        assert_eq!(Frame::check(Sender::Server, &bytes).unwrap(), Some(frame));
        assert!(Frame::check(Sender::Client, &bytes).is_err());
        assert_eq!(Frame::check(Sender::Server, b"who 1").unwrap(), None);
        bytes[1399] ^= 1;
        assert!(Frame::check(Sender::Server, &bytes).is_err());
    }

    #[test]
    fn introductions_survive_the_wire() {
        let line = "web-1 at [fd00::1]:80 saw 192.0.2.1:4711";
        let parsed: Introduction = line.parse().unwrap();
        assert_eq!(parsed.to_string(), line);
        assert!("web-1 saw 192.0.2.1:4711".parse::<Introduction>().is_err());
    }
}
