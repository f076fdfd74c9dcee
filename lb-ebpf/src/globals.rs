//! What the agent sets at load ([`lb_common::maps::globals`]): read-only afterwards, so that the verifier removes
//! the code that is switched off.

use aya_ebpf::Global;
use lb_common::flow::State;

/// Cookie of the node's network namespace; 0: not known.
#[unsafe(no_mangle)]
pub static NODE_NETNS: Global<u64> = Global::new(0);

/// Sockets of all namespaces are served.
#[unsafe(no_mangle)]
pub static SERVES_PODS: Global<u8> = Global::new(0);

/// Which packets without a flow may begin one (`lb_common::tables::Admission`).
#[unsafe(no_mangle)]
pub static ADMISSION: Global<u8> = Global::new(0);

/// Backends see this node in place of all clients (`--masquerade-all`).
#[unsafe(no_mangle)]
pub static MASQUERADE_ALL: Global<u8> = Global::new(0);

/// The kernel has `bpf_set_retval` for socket hooks.
#[unsafe(no_mangle)]
pub static HAVE_SET_RETVAL: Global<u8> = Global::new(1);

/// The kernel has `bpf_ktime_get_coarse_ns`.
#[unsafe(no_mangle)]
pub static HAVE_COARSE_CLOCK: Global<u8> = Global::new(1);

/// The kernel knows `BPF_F_IPV6`.
#[unsafe(no_mangle)]
pub static HAVE_CSUM_IPV6: Global<u8> = Global::new(1);

/// UDP port at which nodes take packets of each other; 0: there are no tunnels.
#[unsafe(no_mangle)]
pub static TUNNEL_PORT: Global<u16> = Global::new(0);

/// Packets may be sent into tunnels, too.
#[unsafe(no_mangle)]
pub static SENDS_TUNNELLED: Global<u8> = Global::new(1);

/// After how long without a packet, in ns, a flow is over, by the number of its state.
#[unsafe(no_mangle)]
pub static TIMEOUTS: [u64; State::ALL.len()] = [0; State::ALL.len()];

/// TCP to a backend that is no endpoint any more is answered with a RST.
#[unsafe(no_mangle)]
pub static RESETS_REMOVED: Global<u8> = Global::new(0);
