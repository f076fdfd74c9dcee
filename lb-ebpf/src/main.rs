//! The programs Fairlead loads into the kernel. They decide nothing: each builds the context, runs the
//! pipeline of `lb-common`, counts, and returns the verdict in the words of its hook.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(not(target_arch = "bpf"), allow(unused, reason = "on the host this crate is only type-checked"))]
#![expect(
    clippy::inline_always,
    reason = "a call costs 8 ns, takes five arguments at most, and hides from the verifier what was checked"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "helpers take and return numbers of sizes of their own; none of ours comes near a limit"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "program entries have the signature that aya's macros want"
)]
#![warn(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bounds;
mod fib;
mod globals;
mod maps;
mod skb;
mod sockets;
mod sweep;
mod xdp;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::{classifier, xdp as xdp_program};
use aya_ebpf::programs::{TcContext, XdpContext};
use aya_log_ebpf::debug;
use lb_common::abi::Side;
use lb_common::packet::NETWORK;
use lb_common::pipeline::{Verdict, process};
use lb_common::tunnel;
use lb_common::wire::EthHdr;
use lb_common::{Family, Hook, Packet, Reason, V4, V6};

use crate::maps::{Kernel, count};
use crate::skb::Skb;
use crate::xdp::Xdp;

/// GPL-only helpers (`bpf_ktime_get_coarse_ns`, `bpf_fib_lookup` and more) ask for a compatible licence.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// External edge, first hook.
#[xdp_program]
pub fn xdp_nic(ctx: XdpContext) -> u32 {
    let mut packet = Xdp::new(ctx.ctx);
    let ether_type = packet.view::<EthHdr>(0).map_or(0, |eth| eth.ether_type.get());
    let (verdict, reason) = run(&mut packet, ether_type, Hook::Xdp, Side::NicIn);
    debug!(&ctx, "xdp: reason {}", reason as u32);
    match verdict {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Forward => packet.transmit(),
        Verdict::SendBack => xdp_action::XDP_TX,
        Verdict::Drop => xdp_action::XDP_DROP,
    }
}

/// External edge: what XDP left, or everything where there is no XDP.
#[classifier]
pub fn tc_nic_in(ctx: TcContext) -> i32 {
    classify(&ctx, Hook::NicIn, Side::NicIn)
}

/// External edge: to clients outside.
#[classifier]
pub fn tc_nic_out(ctx: TcContext) -> i32 {
    classify(&ctx, Hook::NicOut, Side::NicOut)
}

/// Pod edge: from the pod.
#[classifier]
pub fn tc_pod_in(ctx: TcContext) -> i32 {
    classify(&ctx, Hook::PodIn, Side::PodIn)
}

/// Pod edge: to the pod.
#[classifier]
pub fn tc_pod_out(ctx: TcContext) -> i32 {
    classify(&ctx, Hook::PodOut, Side::PodOut)
}

#[inline(always)]
fn classify(ctx: &TcContext, hook: Hook, side: Side) -> i32 {
    let mut packet = Skb::new(ctx.skb.skb);
    let ether_type = packet.ether_type();
    let (verdict, reason) = run(&mut packet, ether_type, hook, side);
    debug!(ctx, "tc: hook {} reason {}", hook as u32, reason as u32);
    match verdict {
        Verdict::Pass => skb::NEXT,
        Verdict::Forward => packet.forward(),
        Verdict::SendBack => packet.send_back(),
        Verdict::Drop => skb::SHOT,
    }
}

/// Runs the pipeline of the packet's family and counts what came of it.
#[inline(always)]
fn run<P: Packet>(packet: &mut P, ether_type: u16, hook: Hook, side: Side) -> (Verdict, Reason) {
    let bytes = packet.size().wrapping_sub(NETWORK as u32);
    if side as u8 == Side::NicIn as u8
        && let Err(reason) = unwrap(packet, ether_type)
    {
        count(hook, reason, bytes);
        return (Verdict::Drop, reason);
    }
    let (verdict, reason) = match ether_type {
        V4::ETHER_TYPE => process::<V4, P, Kernel>(packet, &Kernel, side),
        V6::ETHER_TYPE => process::<V6, P, Kernel>(packet, &Kernel, side),
        _ => (Verdict::Pass, Reason::NotIp),
    };
    count(hook, reason, bytes);
    (verdict, reason)
}

/// Takes the packet out of the tunnel that it came in by, if it did. It is of the same family inside.
#[inline(always)]
fn unwrap<P: Packet>(packet: &mut P, ether_type: u16) -> Result<bool, Reason> {
    match ether_type {
        V4::ETHER_TYPE => tunnel::unwrap::<V4, P, Kernel>(packet, &Kernel),
        V6::ETHER_TYPE => tunnel::unwrap::<V6, P, Kernel>(packet, &Kernel),
        _ => Ok(false),
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No code here can panic; if some could, the verifier would refuse this loop.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
