//! The one table of BPF maps: names, types, sizes. `lb-ebpf` declares its maps with these numbers, the
//! agent compares pinned maps with them before it uses them again.

use core::mem::size_of;

use crate::abi::{
    Addr4, Addr6, AddressInfo, Affinity, AffinityKey, Backend, Counter, Edge, EdgeSourceKey, Flow, FlowKey,
    Fragment, FragmentKey, MemberKey, Network, OwnMac, OwnerName, Place, PrefixKey, RefusalKey, Routing,
    Sampling, Service, ServiceKey, SocketKey, SocketPeer, Source, Usage,
};
use crate::reason;

/// Version of every key and value layout; names the pin directory (`v1`).
pub const LAYOUT_VERSION: u32 = 1;

/// Kinds of BPF maps we use, with the kernel's numbers (`enum bpf_map_type`).
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapKind {
    Hash = 1,
    Array = 2,
    PerCpuHash = 5,
    PerCpuArray = 6,
    LruHash = 9,
    LpmTrie = 11,
    RingBuf = 27,
}

/// What decides the size of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Capacity {
    /// Always this many entries.
    Fixed(u32),
    /// `--max-flows`.
    Flows,
    /// [`max_pending`] of `--max-flows`.
    PendingFlows,
    /// `--max-services`.
    Services,
    /// `--max-backends`.
    Backends,
    /// [`MAX_ADDRESSES`], and one for each of `--max-backends`.
    Addresses,
    /// [`SLOTS_PER_BACKEND`] for each of `--max-backends`.
    Slots,
}

/// What one map must look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapSpec {
    /// Name of the map, of its pin, and of its symbol in the object.
    pub name: &'static str,
    pub kind: MapKind,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    pub capacity: Capacity,
    /// `BPF_F_*` flags of `BPF_MAP_CREATE`.
    pub flags: u32,
}

/// `BPF_F_NO_PREALLOC`: memory only for entries that exist. For maps that only the agent writes.
pub const NO_PREALLOC: u32 = 1;

/// Maglev wants many slots for each backend.
pub const SLOTS_PER_BACKEND: u32 = 16;

/// Default of `--max-flows`.
pub const DEFAULT_MAX_FLOWS: u32 = 512 * 1024;
/// Default of `--max-services`: frontends per family.
pub const DEFAULT_MAX_SERVICES: u32 = 64 * 1024;
/// Default of `--max-backends`: per family.
pub const DEFAULT_MAX_BACKENDS: u32 = 256 * 1024;

/// Pending flows beside so many flows: an eighth, but room for what may open at a time beside a small table, too.
pub const fn max_pending(flows: u32) -> u32 {
    const FLOWS_PER_PENDING: u32 = 8;
    const LEAST: u32 = 4096;
    let share = flows / FLOWS_PER_PENDING;
    if share > LEAST { share } else { LEAST }
}

/// Datagrams in pieces that are remembered, per family.
pub const MAX_FRAGMENTS: u32 = 8 * 1024;
/// Sockets that know a translated peer.
pub const MAX_SOCKETS: u32 = 128 * 1024;
/// Addresses of the node and of Services, per family; those of backends come on top.
pub const MAX_ADDRESSES: u32 = 128 * 1024;
/// Networks that may ask for Services with source ranges, per family.
pub const MAX_SOURCES: u32 = 64 * 1024;
/// Clients remembered for session affinity, per family.
pub const MAX_AFFINITIES: u32 = 64 * 1024;
/// Backends in windows of Services with affinity, for both families.
pub const MAX_MEMBERS: u32 = 128 * 1024;
/// Services whose usage is counted one by one; the others share index 0.
pub const MAX_USAGES: u32 = 16 * 1024;
/// Pairs of a Service and a reason for which packets of it were refused.
pub const MAX_REFUSALS: u32 = 16 * 1024;
/// Bytes of samples that wait for their reader: a power of two, and whole pages.
pub const SAMPLES_BYTES: u32 = 256 * 1024;
/// Networks a node knows, per family.
pub const MAX_NETWORKS: u32 = 8;
/// External edges of a node.
pub const MAX_EDGES: u32 = 256;
/// Devices whose Ethernet address is compared with frames': a power of two.
pub const MAX_MACS: u32 = 1024;
/// Words of `ADDRESS_FILTER`, each the bits of 64 hashes: a power of two.
pub const FILTER_WORDS: u32 = 16 * 1024;
/// Further sources of all of them (`--source-addresses`).
pub const MAX_EDGE_SOURCES: u32 = 4096;

#[expect(clippy::cast_possible_truncation, reason = "sizes of map keys and values are far below 4 GiB")]
const fn spec<K, V>(name: &'static str, kind: MapKind, capacity: Capacity, flags: u32) -> MapSpec {
    MapSpec {
        name,
        kind,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        capacity,
        flags,
    }
}

/// Every pinned map.
pub const MAPS: [MapSpec; 34] = [
    spec::<ServiceKey<Addr4>, Service>("SERVICES4", MapKind::Hash, Capacity::Services, NO_PREALLOC),
    spec::<ServiceKey<Addr6>, Service>("SERVICES6", MapKind::Hash, Capacity::Services, NO_PREALLOC),
    spec::<u32, Backend<Addr4>>("BACKENDS4", MapKind::Array, Capacity::Backends, 0),
    spec::<u32, Backend<Addr6>>("BACKENDS6", MapKind::Array, Capacity::Backends, 0),
    spec::<u32, u32>("SLOTS", MapKind::Array, Capacity::Slots, 0),
    spec::<Addr4, AddressInfo>("ADDRESSES4", MapKind::Hash, Capacity::Addresses, NO_PREALLOC),
    spec::<Addr6, AddressInfo>("ADDRESSES6", MapKind::Hash, Capacity::Addresses, NO_PREALLOC),
    spec::<u32, u64>("ADDRESS_FILTER", MapKind::Array, Capacity::Fixed(FILTER_WORDS), 0),
    spec::<u32, Edge>("EDGES", MapKind::Hash, Capacity::Fixed(MAX_EDGES), NO_PREALLOC),
    spec::<ServiceKey<Addr4>, Place<Addr4>>("PLACES4", MapKind::Hash, Capacity::Backends, NO_PREALLOC),
    spec::<ServiceKey<Addr6>, Place<Addr6>>("PLACES6", MapKind::Hash, Capacity::Backends, NO_PREALLOC),
    spec::<u32, OwnMac>("MACS", MapKind::Array, Capacity::Fixed(MAX_MACS), 0),
    spec::<EdgeSourceKey, Edge>(
        "EDGE_SOURCES",
        MapKind::Hash,
        Capacity::Fixed(MAX_EDGE_SOURCES),
        NO_PREALLOC,
    ),
    spec::<FlowKey<Addr4>, Flow<Addr4>>("FLOWS4", MapKind::LruHash, Capacity::Flows, 0),
    spec::<FlowKey<Addr6>, Flow<Addr6>>("FLOWS6", MapKind::LruHash, Capacity::Flows, 0),
    spec::<FlowKey<Addr4>, Flow<Addr4>>("PENDING4", MapKind::LruHash, Capacity::PendingFlows, 0),
    spec::<FlowKey<Addr6>, Flow<Addr6>>("PENDING6", MapKind::LruHash, Capacity::PendingFlows, 0),
    spec::<FragmentKey<Addr4>, Fragment>("FRAGMENTS4", MapKind::LruHash, Capacity::Fixed(MAX_FRAGMENTS), 0),
    spec::<FragmentKey<Addr6>, Fragment>("FRAGMENTS6", MapKind::LruHash, Capacity::Fixed(MAX_FRAGMENTS), 0),
    spec::<SocketKey, SocketPeer>("SOCKETS", MapKind::LruHash, Capacity::Fixed(MAX_SOCKETS), 0),
    spec::<PrefixKey<Source<Addr4>>, u32>(
        "SOURCES4",
        MapKind::LpmTrie,
        Capacity::Fixed(MAX_SOURCES),
        NO_PREALLOC,
    ),
    spec::<PrefixKey<Source<Addr6>>, u32>(
        "SOURCES6",
        MapKind::LpmTrie,
        Capacity::Fixed(MAX_SOURCES),
        NO_PREALLOC,
    ),
    spec::<AffinityKey<Addr4>, Affinity>("AFFINITY4", MapKind::LruHash, Capacity::Fixed(MAX_AFFINITIES), 0),
    spec::<AffinityKey<Addr6>, Affinity>("AFFINITY6", MapKind::LruHash, Capacity::Fixed(MAX_AFFINITIES), 0),
    spec::<MemberKey, u32>("MEMBERS", MapKind::Hash, Capacity::Fixed(MAX_MEMBERS), NO_PREALLOC),
    spec::<u32, Network<Addr4>>("NETWORKS4", MapKind::Array, Capacity::Fixed(MAX_NETWORKS), 0),
    spec::<u32, Network<Addr6>>("NETWORKS6", MapKind::Array, Capacity::Fixed(MAX_NETWORKS), 0),
    spec::<u32, OwnerName>("NAMES", MapKind::Hash, Capacity::Services, NO_PREALLOC),
    spec::<u32, Usage>("USAGE", MapKind::PerCpuArray, Capacity::Fixed(MAX_USAGES), 0),
    spec::<u32, Counter>("COUNTERS", MapKind::PerCpuArray, Capacity::Fixed(reason::COUNTERS), 0),
    spec::<RefusalKey, u64>("REFUSALS", MapKind::PerCpuHash, Capacity::Fixed(MAX_REFUSALS), NO_PREALLOC),
    spec::<u32, Routing>("ROUTING", MapKind::Array, Capacity::Fixed(1), 0),
    spec::<u32, Sampling>("SAMPLING", MapKind::Array, Capacity::Fixed(1), 0),
    // A ring buffer has neither keys nor values; what lies in it is a `Sample`.
    spec::<(), ()>("SAMPLES", MapKind::RingBuf, Capacity::Fixed(SAMPLES_BYTES), 0),
];

/// Names of the load-time globals; each is a variable of `lb-ebpf` that the agent sets at load, so that
/// the verifier removes what is switched off.
pub mod globals {
    /// `u64`: network namespace cookie of the node; 0: the kernel does not tell it.
    pub const NODE_NETNS: &str = "NODE_NETNS";
    /// `u8`: sockets of all namespaces are served (`--socket-lb=all`); otherwise only the node's.
    pub const SERVES_PODS: &str = "SERVES_PODS";
    /// `u8`: which packets without a flow may begin one ([`crate::tables::Admission`]).
    pub const ADMISSION: &str = "ADMISSION";
    /// `u8`: backends see this node in place of all clients (`--masquerade-all`).
    pub const MASQUERADE_ALL: &str = "MASQUERADE_ALL";
    /// `u8`: TCP to a backend that is no endpoint any more is answered with a RST (`--tcp-to-removed-backend`).
    pub const RESETS_REMOVED: &str = "RESETS_REMOVED";
    /// `u16`: UDP port at which nodes take packets of each other (`--tunnel-port`); 0: there is no direct server return.
    pub const TUNNEL_PORT: &str = "TUNNEL_PORT";
    /// `u8`: packets may be sent into tunnels, too: the kernel compares the length that `bpf_fib_lookup` is told with
    /// the MTU also at tc (5.12, commit e1850ea9bd9e).
    pub const SENDS_TUNNELLED: &str = "SENDS_TUNNELLED";
    /// `[u64; 8]`: after how long (ns) a flow is over, by [`State`](crate::flow::State).
    pub const TIMEOUTS: &str = "TIMEOUTS";
    /// `u8`: the kernel has `bpf_set_retval` (5.18, commit b44123b4a3dc) for socket hooks.
    pub const HAVE_SET_RETVAL: &str = "HAVE_SET_RETVAL";
    /// `u8`: the kernel has `bpf_ktime_get_coarse_ns` (5.11, commit d05512618056).
    pub const HAVE_COARSE_CLOCK: &str = "HAVE_COARSE_CLOCK";
    /// `u8`: the kernel knows `BPF_F_IPV6` for `bpf_l4_csum_replace` (6.16, commit ead7f9b8de65).
    pub const HAVE_CSUM_IPV6: &str = "HAVE_CSUM_IPV6";
    /// `u8`: aya-log's level: 0 off (the verifier removes every line), 1 error to 5 trace.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
}

/// Names of the programs in the object, and the hook each is for.
pub mod programs {
    /// External edge, XDP.
    pub const XDP_NIC: &str = "xdp_nic";
    /// External edge, tc ingress: what XDP left, or everything where there is no XDP.
    pub const TC_NIC_IN: &str = "tc_nic_in";
    /// External edge, tc egress.
    pub const TC_NIC_OUT: &str = "tc_nic_out";
    /// Pod edge (host side of the veth), tc ingress: packets from the pod.
    pub const TC_POD_IN: &str = "tc_pod_in";
    /// Pod edge, tc egress: packets to the pod.
    pub const TC_POD_OUT: &str = "tc_pod_out";
    /// Garbage collection: the program that the kernel runs for each entry of a flow table, and the table.
    pub const SWEEPS: [(&str, &str); 4] = [
        ("sweep_flows4", "FLOWS4"),
        ("sweep_pending4", "PENDING4"),
        ("sweep_flows6", "FLOWS6"),
        ("sweep_pending6", "PENDING6"),
    ];
    /// Socket edge: (program, attach type as the kernel names it).
    pub const SOCKETS: [&str; 8] = [
        "sock_connect4",
        "sock_connect6",
        "sock_sendmsg4",
        "sock_sendmsg6",
        "sock_recvmsg4",
        "sock_recvmsg6",
        "sock_getpeer4",
        "sock_getpeer6",
    ];
}
