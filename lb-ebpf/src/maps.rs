//! The maps, and the pipeline's view of them.

use core::cell::Cell;
use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use lb_common::abi::{
    AddressInfo, Affinity, AffinityKey, Backend, Counter, Edge, EdgeSourceKey, Flow, FlowKey, Fragment,
    FragmentKey, MemberKey, Network, OwnMac, OwnerName, Place, RefusalKey, Routing, Sample, Sampling,
    Service, ServiceKey, SocketKey, SocketPeer, Source, Usage,
};
use lb_common::maps::{
    DEFAULT_MAX_BACKENDS, DEFAULT_MAX_FLOWS, DEFAULT_MAX_SERVICES, FILTER_WORDS, MAX_ADDRESSES,
    MAX_AFFINITIES, MAX_EDGE_SOURCES, MAX_EDGES, MAX_FRAGMENTS, MAX_MACS, MAX_MEMBERS, MAX_NETWORKS,
    MAX_REFUSALS, MAX_SOCKETS, MAX_SOURCES, MAX_USAGES, NO_PREALLOC, SAMPLES_BYTES, SLOTS_PER_BACKEND,
    max_pending,
};
use lb_common::reason::{COUNTERS as COUNTER_COUNT, counter_index};
use lb_common::tables::{Admission, Event, FlowTable};
use lb_common::{Addr4, Addr6, Hook, Reason, Tables, V4, V6, hash, service};

use crate::globals::{
    ADMISSION, HAVE_COARSE_CLOCK, MASQUERADE_ALL, RESETS_REMOVED, SENDS_TUNNELLED, TIMEOUTS, TUNNEL_PORT,
};

const SERVICE_COUNT: usize = DEFAULT_MAX_SERVICES as usize;
const BACKEND_COUNT: usize = DEFAULT_MAX_BACKENDS as usize;
const SLOT_COUNT: usize = (DEFAULT_MAX_BACKENDS * SLOTS_PER_BACKEND) as usize;
const ADDRESS_COUNT: usize = (MAX_ADDRESSES + DEFAULT_MAX_BACKENDS) as usize;
const FLOW_COUNT: usize = DEFAULT_MAX_FLOWS as usize;
const PENDING_COUNT: usize = max_pending(DEFAULT_MAX_FLOWS) as usize;
const WRITTEN_BY_AGENT: usize = NO_PREALLOC as usize;

#[btf_map]
static SERVICES4: HashMap<ServiceKey<Addr4>, Service, SERVICE_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static SERVICES6: HashMap<ServiceKey<Addr6>, Service, SERVICE_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static BACKENDS4: Array<Backend<Addr4>, BACKEND_COUNT> = Array::new();
#[btf_map]
static BACKENDS6: Array<Backend<Addr6>, BACKEND_COUNT> = Array::new();
#[btf_map]
static SLOTS: Array<u32, SLOT_COUNT> = Array::new();
#[btf_map]
static ADDRESSES4: HashMap<Addr4, AddressInfo, ADDRESS_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static ADDRESSES6: HashMap<Addr6, AddressInfo, ADDRESS_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static EDGES: HashMap<u32, Edge, { MAX_EDGES as usize }, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static PLACES4: HashMap<ServiceKey<Addr4>, Place<Addr4>, BACKEND_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static PLACES6: HashMap<ServiceKey<Addr6>, Place<Addr6>, BACKEND_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static MACS: Array<OwnMac, { MAX_MACS as usize }> = Array::new();
#[btf_map]
static ADDRESS_FILTER: Array<u64, { FILTER_WORDS as usize }> = Array::new();
#[btf_map]
static EDGE_SOURCES: HashMap<EdgeSourceKey, Edge, { MAX_EDGE_SOURCES as usize }, WRITTEN_BY_AGENT> =
    HashMap::new();
#[btf_map]
static FLOWS4: LruHashMap<FlowKey<Addr4>, Flow<Addr4>, FLOW_COUNT> = LruHashMap::new();
#[btf_map]
static FLOWS6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>, FLOW_COUNT> = LruHashMap::new();
#[btf_map]
static PENDING4: LruHashMap<FlowKey<Addr4>, Flow<Addr4>, PENDING_COUNT> = LruHashMap::new();
#[btf_map]
static PENDING6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>, PENDING_COUNT> = LruHashMap::new();
#[btf_map]
static FRAGMENTS4: LruHashMap<FragmentKey<Addr4>, Fragment, { MAX_FRAGMENTS as usize }> = LruHashMap::new();
#[btf_map]
static FRAGMENTS6: LruHashMap<FragmentKey<Addr6>, Fragment, { MAX_FRAGMENTS as usize }> = LruHashMap::new();
#[btf_map]
static SOCKETS: LruHashMap<SocketKey, SocketPeer, { MAX_SOCKETS as usize }> = LruHashMap::new();
#[btf_map]
static SOURCES4: LpmTrie<Source<Addr4>, u32, { MAX_SOURCES as usize }, WRITTEN_BY_AGENT> = LpmTrie::new();
#[btf_map]
static SOURCES6: LpmTrie<Source<Addr6>, u32, { MAX_SOURCES as usize }, WRITTEN_BY_AGENT> = LpmTrie::new();
#[btf_map]
static AFFINITY4: LruHashMap<AffinityKey<Addr4>, Affinity, { MAX_AFFINITIES as usize }> = LruHashMap::new();
#[btf_map]
static AFFINITY6: LruHashMap<AffinityKey<Addr6>, Affinity, { MAX_AFFINITIES as usize }> = LruHashMap::new();
#[btf_map]
static MEMBERS: HashMap<MemberKey, u32, { MAX_MEMBERS as usize }, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static NETWORKS4: Array<Network<Addr4>, { MAX_NETWORKS as usize }> = Array::new();
#[btf_map]
static NETWORKS6: Array<Network<Addr6>, { MAX_NETWORKS as usize }> = Array::new();
/// No program uses it: the agent writes it, for people.
#[btf_map]
static NAMES: HashMap<u32, OwnerName, SERVICE_COUNT, WRITTEN_BY_AGENT> = HashMap::new();
#[btf_map]
static USAGE: PerCpuArray<Usage, { MAX_USAGES as usize }> = PerCpuArray::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { COUNTER_COUNT as usize }> = PerCpuArray::new();
#[btf_map]
static REFUSALS: PerCpuHashMap<RefusalKey, u64, { MAX_REFUSALS as usize }, { NO_PREALLOC as usize }> =
    PerCpuHashMap::new();
#[btf_map]
static ROUTING: Array<Routing, 1> = Array::new();
#[btf_map]
static SAMPLING: Array<Sampling, 1> = Array::new();
#[btf_map]
static SAMPLES: RingBuf<(), { SAMPLES_BYTES as usize }> = RingBuf::new();

/// Counts one packet, or one call of a socket hook.
#[inline(always)]
pub fn count(hook: Hook, reason: Reason, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter_index(hook, reason)) {
        // SAFETY: this CPU's own value; programs of one CPU that interrupt each other may lose a count, no more.
        unsafe {
            (*counter).packets = (*counter).packets.wrapping_add(1);
            (*counter).bytes = (*counter).bytes.wrapping_add(u64::from(bytes));
        }
    }
}

/// Counts what goes through a Service; those that have no counter of their own share that of index 0.
#[inline(always)]
fn use_service(service: u32, event: Event) {
    let index = if service < MAX_USAGES { service } else { 0 };
    if let Some(usage) = USAGE.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        unsafe {
            match event {
                Event::Connection => (*usage).connections = (*usage).connections.wrapping_add(1),
                Event::Packet(bytes) => {
                    (*usage).packets = (*usage).packets.wrapping_add(1);
                    (*usage).bytes = (*usage).bytes.wrapping_add(u64::from(bytes));
                }
                Event::Refused(reason) => {
                    (*usage).refused = (*usage).refused.wrapping_add(1);
                    refuse(RefusalKey { service, reason: reason as u32 });
                }
            }
        }
    }
}

/// Counts what a Service was asked for in vain. If there is no room for more reasons, the Service's own count has it.
#[inline(never)]
fn refuse(key: RefusalKey) {
    if let Some(count) = REFUSALS.get_ptr_mut(key) {
        // SAFETY: as in `count`.
        unsafe { *count = (*count).wrapping_add(1) };
    } else {
        let _ = REFUSALS.insert(key, 1, u64::from(BPF_NOEXIST));
    }
}

/// The kernel's maps.
pub struct Kernel;

/// The flow in a cell, to be copied into a map at once.
#[inline(always)]
fn value<A: Copy>(flow: &Cell<Flow<A>>) -> &Flow<A> {
    // SAFETY: the cell is on this program's stack, or a map value whose concurrent change the copy may or may not see.
    unsafe { &*flow.as_ptr() }
}

/// Flags of the networks that have an address, which is passed as it lies in memory.
///
/// A "global" function, as [`crc32c_remainder`](lb_common::crc32c::crc32c_remainder) is, and for the same reason: the
/// verifier follows the list once.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn network_flags4(addr: u32) -> u32 {
    service::networks::<V4>(&Addr4 { octets: addr.to_ne_bytes() }, |index| NETWORKS4.get(index))
}

/// The same of an IPv6 address, in two halves.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn network_flags6(first: u64, last: u64) -> u32 {
    let octets = (u128::from(first) | u128::from(last) << 64).to_le_bytes();
    service::networks::<V6>(&Addr6 { octets }, |index| NETWORKS6.get(index))
}

#[inline(always)]
fn networks4(addr: &Addr4) -> u32 {
    network_flags4(u32::from_ne_bytes(addr.octets))
}

#[inline(always)]
fn networks6(addr: &Addr6) -> u32 {
    let all = u128::from_le_bytes(addr.octets);
    network_flags6(all as u64, (all >> 64) as u64)
}

/// Whether `ADDRESS_FILTER` has a bit.
#[inline(always)]
fn is_in_filter((word, bit): (u32, u64)) -> bool {
    ADDRESS_FILTER.get(word).is_none_or(|bits| bits & bit != 0)
}

/// The maps of one family differ in their names alone.
macro_rules! tables {
    (
        $family:ty, $addr:ty, $services:ident, $backends:ident, $addresses:ident, $flows:ident, $pending:ident,
        $sources:ident, $affinity:ident, $networks:expr, $fragments:ident, $places:ident
    ) => {
        impl Tables<$family> for Kernel {
            type Entry = &'static Cell<Flow<$addr>>;

            #[inline(always)]
            fn flow(&self, table: FlowTable, key: &FlowKey<$addr>) -> Option<Self::Entry> {
                let entry = match table {
                    FlowTable::Established => $flows.get_ptr_mut(key),
                    FlowTable::Pending => $pending.get_ptr_mut(key),
                }?;
                // SAFETY: a map value stays mapped while the program runs; a `Cell` asks for no more. Under LRU pressure
                // the slot may be given to another flow meanwhile: what is read is checked nowhere to be of this flow
                // for longer than one packet.
                Some(unsafe { &*entry.cast::<Cell<Flow<$addr>>>() })
            }

            #[inline(always)]
            fn put_flow(
                &self,
                table: FlowTable,
                key: &FlowKey<$addr>,
                flow: &Cell<Flow<$addr>>,
            ) -> Result<(), Reason> {
                match table {
                    FlowTable::Established => $flows.insert(key, value(flow), u64::from(BPF_ANY)),
                    FlowTable::Pending => $pending.insert(key, value(flow), u64::from(BPF_ANY)),
                }
                .map_err(|_| Reason::FlowTableFull)
            }

            #[inline(always)]
            fn add_flow(&self, table: FlowTable, key: &FlowKey<$addr>, flow: &Cell<Flow<$addr>>) -> bool {
                match table {
                    FlowTable::Established => $flows.insert(key, value(flow), u64::from(BPF_NOEXIST)),
                    FlowTable::Pending => $pending.insert(key, value(flow), u64::from(BPF_NOEXIST)),
                }
                .is_ok()
            }

            #[inline(always)]
            fn remove_flow(&self, table: FlowTable, key: &FlowKey<$addr>) {
                // That it is gone already is as good.
                let _ = match table {
                    FlowTable::Established => $flows.remove(key),
                    FlowTable::Pending => $pending.remove(key),
                };
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$addr>) -> Option<Fragment> {
                // SAFETY: the value is copied at once.
                unsafe { $fragments.get(key) }.copied()
            }

            #[inline(always)]
            fn put_fragment(&self, key: &FragmentKey<$addr>, fragment: &Fragment) {
                // If it fails, the datagram is lost; its sender sends it again.
                let _ = $fragments.insert(key, fragment, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn address(&self, addr: &$addr) -> Option<AddressInfo> {
                // SAFETY: the value is copied at once.
                unsafe { $addresses.get(addr) }.copied()
            }

            #[inline(always)]
            fn may_know(&self, addr: &$addr) -> bool {
                is_in_filter(hash::filter_bit::<$family>(addr))
            }

            #[inline(always)]
            fn may_be_service(&self, addr: &$addr) -> bool {
                is_in_filter(hash::neighbourhood_bit::<$family>(addr))
            }

            #[inline(always)]
            fn service(&self, key: &ServiceKey<$addr>) -> Option<Service> {
                // SAFETY: the value is copied at once; the agent replaces entries as a whole.
                unsafe { $services.get(key) }.copied()
            }

            #[inline(always)]
            fn is_source(&self, key: &Source<$addr>) -> bool {
                $sources.get(&Key::new(Source::<$addr>::BITS, *key)).is_some()
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$addr>) -> Option<Affinity> {
                // SAFETY: the value is copied at once.
                unsafe { $affinity.get(key) }.copied()
            }

            #[inline(always)]
            fn put_affinity(&self, key: &AffinityKey<$addr>, affinity: &Affinity) {
                // If it fails, the client may be given another backend next time: no connection is lost for that.
                let _ = $affinity.insert(key, affinity, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn is_member(&self, key: &MemberKey) -> bool {
                MEMBERS.get_ptr(key).is_some()
            }

            #[inline(always)]
            fn networks(&self, addr: &$addr) -> u32 {
                $networks(addr)
            }

            #[inline(always)]
            fn count(&self, service: u32, event: Event) {
                use_service(service, event);
            }

            #[inline(always)]
            fn is_sampling(&self) -> bool {
                SAMPLING.get(0).is_some_and(|sampling| {
                    sampling.until != 0 && Tables::<$family>::now(self) < sampling.until
                })
            }

            #[inline(always)]
            fn put_sample(&self, sample: &Sample) {
                if SAMPLES.output_untyped::<Sample>(sample, 0).is_err()
                    && let Some(sampling) = SAMPLING.get_ptr_mut(0)
                {
                    // SAFETY: a map value; CPUs that lose one at the same time may count one.
                    unsafe { (*sampling).lost = (*sampling).lost.wrapping_add(1) };
                }
            }

            #[inline(always)]
            fn admission(&self) -> Admission {
                match ADMISSION.load() {
                    0 => Admission::All,
                    1 => Admission::Opening,
                    _ => Admission::None,
                }
            }

            #[inline(always)]
            fn slot(&self, index: u32) -> Option<u32> {
                SLOTS.get(index).copied()
            }

            #[inline(always)]
            fn backend(&self, id: u32) -> Option<Backend<$addr>> {
                $backends.get(id).copied()
            }

            #[inline(always)]
            fn edge(&self, ifindex: u32) -> Option<Edge> {
                // SAFETY: the value is copied at once.
                unsafe { EDGES.get(ifindex) }.copied()
            }

            #[inline(always)]
            fn place(&self, key: &ServiceKey<$addr>) -> Option<Place<$addr>> {
                // SAFETY: the value is copied at once.
                unsafe { $places.get(key) }.copied()
            }

            #[inline(always)]
            fn tunnel_port(&self) -> u16 {
                TUNNEL_PORT.load()
            }

            #[inline(always)]
            fn sends_tunnelled(&self) -> bool {
                SENDS_TUNNELLED.load() != 0
            }

            #[inline(always)]
            fn own_mac(&self, index: u32) -> Option<OwnMac> {
                MACS.get(index).copied()
            }

            #[inline(always)]
            fn edge_source(&self, key: &EdgeSourceKey) -> Option<Edge> {
                // SAFETY: the value is copied at once.
                unsafe { EDGE_SOURCES.get(key) }.copied()
            }

            #[inline(always)]
            fn socket(&self, key: &SocketKey) -> Option<SocketPeer> {
                // SAFETY: the value is copied at once.
                unsafe { SOCKETS.get(key) }.copied()
            }

            #[inline(always)]
            fn put_socket(&self, key: &SocketKey, peer: &SocketPeer) {
                // If it fails, the process sees the backend's address: no connection is lost for that.
                let _ = SOCKETS.insert(key, peer, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn masquerades_all(&self) -> bool {
                MASQUERADE_ALL.load() != 0
            }

            #[inline(always)]
            fn resets_removed(&self) -> bool {
                RESETS_REMOVED.load() != 0
            }

            #[inline(always)]
            fn timeout(&self, state: u8) -> u64 {
                // SAFETY: an element of a static; volatile, because the agent sets it and the compiler must not know better.
                TIMEOUTS.get(state as usize).map_or(0, |timeout| unsafe { read_volatile(timeout) })
            }

            #[inline(always)]
            fn routing(&self) -> Routing {
                ROUTING.get(0).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn tick(&self) -> u16 {
                // The JIT makes a load of it (kernel commit 5576b991e9c1).
                // SAFETY: a helper without arguments.
                unsafe { (bpf_jiffies64() >> 6) as u16 }
            }

            #[inline(always)]
            fn now(&self) -> u64 {
                // SAFETY: helpers without arguments.
                unsafe {
                    if HAVE_COARSE_CLOCK.load() != 0 { bpf_ktime_get_coarse_ns() } else { bpf_ktime_get_ns() }
                }
            }

            #[inline(always)]
            fn random(&self) -> u32 {
                // SAFETY: a helper without arguments.
                unsafe { bpf_get_prandom_u32() }
            }
        }
    };
}

tables!(
    V4, Addr4, SERVICES4, BACKENDS4, ADDRESSES4, FLOWS4, PENDING4, SOURCES4, AFFINITY4, networks4,
    FRAGMENTS4, PLACES4
);
tables!(
    V6, Addr6, SERVICES6, BACKENDS6, ADDRESSES6, FLOWS6, PENDING6, SOURCES6, AFFINITY6, networks6,
    FRAGMENTS6, PLACES6
);
