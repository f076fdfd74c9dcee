//! What holds for every packet that went through the pipeline, whatever it was: written from the RFCs, not from the
//! pipeline.

use std::net::IpAddr;

use super::{Seen, read};
use crate::pipeline::Verdict;
use crate::reason::Reason;
use crate::wire::{IpProto, tcp_flags};

/// Length of the Ethernet header.
const LINK: usize = 14;
const TCP: u8 = IpProto::Tcp as u8;
const UDP: u8 = IpProto::Udp as u8;
const SCTP: u8 = IpProto::Sctp as u8;

/// Where the parts of an IP packet are.
struct Layout {
    v6: bool,
    /// End of the IP packet in the frame; what follows is padding.
    end: usize,
    transport: usize,
    proto: u8,
    /// Not the first fragment: no transport header.
    later: bool,
}

impl Layout {
    /// Of a frame whose headers are known to be good.
    fn of(frame: &[u8]) -> Self {
        let word = |at| u16::from_be_bytes([frame[at], frame[at + 1]]);
        if frame[LINK] == 0x45 {
            let len = match usize::from(word(16)) {
                0 => frame.len() - LINK,
                len => len,
            };
            let later = word(20) & 0x1fff != 0;
            return Self { v6: false, end: LINK + len, transport: 34, proto: frame[23], later };
        }
        let (mut next, mut at, mut later) = (frame[20], 54, false);
        while let 0 | 43 | 44 | 60 = next {
            let fragment = next == 44;
            next = frame[at];
            later |= fragment && word(at + 2) & 0xfff8 != 0;
            at += if fragment { 8 } else { 8 + 8 * usize::from(frame[at + 1]) };
            if later {
                break;
            }
        }
        Self { v6: true, end: 54 + usize::from(word(18)), transport: at, proto: next, later }
    }

    fn addresses(&self) -> std::ops::Range<usize> {
        if self.v6 { 22..54 } else { 26..34 }
    }

    fn ttl(&self) -> usize {
        if self.v6 { 21 } else { 22 }
    }

    fn is_icmp(&self) -> bool {
        self.proto == if self.v6 { 58 } else { 1 }
    }
}

/// Sum of 16-bit words in one's complement, of which 0 is written in two ways.
fn sum(bytes: &[u8]) -> u64 {
    let words =
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u64::from(*b)));
    words.sum::<u64>() % 0xffff
}

/// Checks what became of a frame.
///
/// # Panics
///
/// If a rule is broken.
pub fn check(before: &[u8], after: &[u8], verdict: Verdict, reason: Reason) {
    let carried = match reason {
        Reason::Translated => Some(Verdict::Pass),
        Reason::Forwarded => Some(Verdict::Forward),
        Reason::Hairpinned => Some(Verdict::SendBack),
        _ => None,
    };
    if let Some(way) = carried {
        assert_eq!(verdict, way);
        check_carried(before, after, reason);
        if let (Ok(_), Err(error)) = (read(before), read(after)) {
            panic!("{error} in what was a good packet: {before:02x?} {after:02x?}");
        }
    } else if verdict == Verdict::SendBack {
        check_answer(before, after);
    } else {
        assert!(matches!(verdict, Verdict::Pass | Verdict::Drop), "{verdict:?} for {reason:?}");
        assert_eq!(before, after, "{reason:?}");
    }
}

/// A translated packet differs in addresses, ports, checksums and TTL, and in these as it must.
fn check_carried(before: &[u8], after: &[u8], reason: Reason) {
    assert_eq!(before.len(), after.len());
    let layout = Layout::of(before);
    assert!(
        layout.end <= before.len() && layout.transport <= layout.end,
        "read beyond its end: {before:02x?}"
    );
    let mut want = before.to_vec();
    let mut may_change = |range: std::ops::Range<usize>| want[range.clone()].copy_from_slice(&after[range]);
    may_change(layout.addresses());
    if !layout.v6 {
        may_change(24..26);
    }
    let at = layout.transport;
    if layout.later {
    } else if layout.is_icmp() {
        let (quote, header) = (at + 8, at + 8 + if layout.v6 { 40 } else { 20 });
        may_change(at + 2..at + 4);
        may_change(if layout.v6 { quote + 8..quote + 40 } else { quote + 10..quote + 20 });
        may_change(header..header + 4);
        match before[quote + if layout.v6 { 6 } else { 9 }] {
            UDP => may_change(header + 6..header + 8),
            TCP if header + 20 <= layout.end => may_change(header + 16..header + 18),
            _ => {}
        }
    } else {
        let check = match layout.proto {
            TCP => at + 16..at + 18,
            UDP => at + 6..at + 8,
            SCTP => at + 8..at + 12,
            other => panic!("protocol {other} was translated"),
        };
        may_change(at..at + 4);
        may_change(check);
    }
    // Rule 9.
    if reason != Reason::Translated {
        let ttl = &mut want[layout.ttl()];
        assert!(*ttl > 1, "sent on with a TTL of {ttl}");
        *ttl -= 1;
    }
    if reason == Reason::Hairpinned {
        want[..12].rotate_left(6);
    }
    assert_eq!(want, after, "{reason:?}");
    check_sums(before, after, &layout);
}

/// Rule 8: a checksum that was right stays right, and one that was wrong stays wrong by as much.
fn check_sums(before: &[u8], after: &[u8], layout: &Layout) {
    let same = |what: &str, cover: &dyn Fn(&[u8]) -> u64| {
        assert_eq!(cover(before) % 0xffff, cover(after) % 0xffff, "{what}: {before:02x?} {after:02x?}");
    };
    let header = layout.transport;
    let pseudo = |frame: &[u8]| sum(&frame[layout.addresses()]);
    if !layout.v6 {
        same("IPv4 header", &|frame| sum(&frame[LINK..34]));
    }
    let zero = |at: usize| before[at..at + 2] == [0, 0];
    if layout.later {
    } else if layout.is_icmp() {
        let all = |frame: &[u8]| sum(&frame[header..layout.end]);
        same("ICMP", &|frame| all(frame) + if layout.v6 { pseudo(frame) } else { 0 });
        let quote = header + 8;
        let inner = quote + if layout.v6 { 40 } else { 20 };
        if !layout.v6 {
            same("quoted IPv4 header", &|frame| sum(&frame[quote..inner]));
        }
        let addresses = if layout.v6 { quote + 8..inner } else { quote + 12..inner };
        let check = match before[quote + if layout.v6 { 6 } else { 9 }] {
            UDP if !zero(inner + 6) => Some(inner + 6),
            TCP if inner + 20 <= layout.end => Some(inner + 16),
            _ => None,
        };
        if let Some(check) = check {
            same("quoted transport", &|frame| {
                sum(&frame[addresses.clone()]) + sum(&frame[inner..inner + 4]) + sum(&frame[check..check + 2])
            });
        }
    } else if layout.proto == SCTP {
        let to_come = |frame: &[u8]| frame[header + 8..header + 12] == [0; 4];
        assert!(!to_come(before) || to_come(after), "there was no checksum");
    } else if layout.proto == UDP && zero(header + 6) {
        assert_eq!(after[header + 6..header + 8], [0, 0], "there was no checksum");
    } else {
        same("transport", &|frame| pseudo(frame) + sum(&frame[header..layout.end]));
        assert!(layout.proto != UDP || after[header + 6..header + 8] != [0, 0], "the checksum is gone");
    }
}

/// An answer is a good packet that goes back to who asked, from the address asked for, and no longer than an error is.
fn check_answer(before: &[u8], after: &[u8]) {
    let seen = read(after).unwrap_or_else(|e| panic!("{e}: {after:02x?} answers {before:02x?}"));
    let (asked, answer) = (Layout::of(before), Layout::of(after));
    let half = asked.addresses().len() / 2;
    let mut turned = before[asked.addresses()].to_vec();
    turned.rotate_left(half);
    assert_eq!(turned, after[answer.addresses()], "{seen:?}");
    assert_eq!((&before[..6], &before[6..12]), (&after[6..12], &after[..6]), "{seen:?}");
    assert!(!asked.later, "a later fragment was answered");
    assert!(before[0] & 1 == 0 && before[6] & 1 == 0, "a group of the link was answered");
    let nobody = match seen.ends().1.ip() {
        IpAddr::V4(addr) => {
            addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || addr.is_broadcast()
        }
        IpAddr::V6(addr) => addr.is_unspecified() || addr.is_loopback() || addr.is_multicast(),
    };
    assert!(!nobody, "{seen:?} was told to nobody");
    match seen {
        Seen::Tcp { flags, payload, .. } => {
            assert!(flags & tcp_flags::RST != 0 && payload.is_empty());
            let ports = |frame: &[u8], at: usize| [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
            let [a, b, c, d] = ports(before, asked.transport);
            assert_eq!([c, d, a, b], ports(after, answer.transport));
            assert_eq!(before[asked.transport + 13] & tcp_flags::RST, 0, "a reset was answered");
        }
        Seen::Icmp { .. } => {
            let quote = &after[answer.transport + 8..];
            assert_eq!(quote, &before[LINK..LINK + quote.len()]);
            let error = if asked.v6 { 0..=127 } else { 3..=3 };
            assert!(!asked.is_icmp() || !error.contains(&before[asked.transport]), "an error was answered");
        }
        other => panic!("{other:?} is no answer"),
    }
}
