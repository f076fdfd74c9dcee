//! Running a loaded program on a packet of our own (`BPF_PROG_TEST_RUN`): for tests, and for
//! `fairlead trace`.

use std::io;

use super::hooks::Place;
use super::load::Programs;
use crate::sys::bpf::{self, TestRunInput};

/// A packet and where it comes from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The frame, from its link header on.
    pub frame: &'a [u8],
    /// The device the packet is seen at; 0: the kernel's choice (loopback).
    pub ifindex: u32,
    /// Packet mark (tc only).
    pub mark: u32,
    /// How many times to run; the result is that of the last.
    pub repeat: u32,
}

impl<'a> Input<'a> {
    pub fn new(frame: &'a [u8]) -> Self {
        Self { frame, ifindex: 0, mark: 0, repeat: 1 }
    }
}

/// What the program did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// The program's return value: `XDP_*` or `TC_ACT_*`.
    pub verdict: u32,
    pub frame: Vec<u8>,
    /// Packet mark afterwards (tc only).
    pub mark: u32,
    /// Mean time of one run in nanoseconds.
    pub nanoseconds: u32,
}

/// Room for headers that a program puts before a packet.
const HEADROOM: usize = 256;

/// Runs the program of a place. Device indices need a kernel of 5.15 (XDP) or 5.2 (tc).
pub fn test_run(programs: &Programs, place: Place, input: Input<'_>) -> io::Result<Output> {
    let program = programs.get(place.program()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
    let context = match place {
        Place::Xdp => xdp_context(&input),
        _ => skb_context(&input),
    };
    let output = bpf::prog_test_run(
        program,
        TestRunInput {
            data: input.frame,
            ctx: &context,
            data_out: input.frame.len() + HEADROOM,
            repeat: input.repeat,
            live: 0,
        },
    )?;
    let mark = if place == Place::Xdp { 0 } else { word(&output.ctx, skb::MARK) };
    Ok(Output { verdict: output.retval, frame: output.data, mark, nanoseconds: output.duration })
}

/// `struct xdp_md`: data, `data_end`, `data_meta`, `ingress_ifindex`, `rx_queue_index`.
///
/// The kernel looks the device up in the caller's namespace and demands that its queue exists.
fn xdp_context(input: &Input<'_>) -> Vec<u8> {
    if input.ifindex == 0 {
        return Vec::new();
    }
    let end = u32::try_from(input.frame.len()).unwrap_or(u32::MAX);
    let words = [0, end, 0, input.ifindex, 0, 0];
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// Offsets in `struct __sk_buff`.
mod skb {
    pub(super) const MARK: usize = 8;
    pub(super) const IFINDEX: usize = 40;
    pub(super) const SIZE: usize = 192;
}

/// The device alone: programs do not ask where a packet came in, and older kernels do not take it.
fn skb_context(input: &Input<'_>) -> Vec<u8> {
    let mut context = vec![0; skb::SIZE];
    let mut put = |offset: usize, value: u32| {
        if let Some(word) = context.get_mut(offset..offset + 4) {
            word.copy_from_slice(&value.to_ne_bytes());
        }
    };
    put(skb::MARK, input.mark);
    put(skb::IFINDEX, input.ifindex);
    context
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
}
