//! Tier 2: the loaded programs against the pipeline on the host, packet by packet.
//!
//! Both get the same maps and the same packets; bytes, verdicts, flow entries and counters must be the same. What
//! the pipeline does with a packet is tested on the host (`lb-common/tests`); here, that the kernel does
//! just that. Needs root; each test has a network namespace and maps of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap, RingBuf};
use fairlead::datapath::test_run::{Input, test_run};
use fairlead::datapath::{Datapath, Options, Place, Sizes};
use fairlead::sys::netns;
use lb_common::abi::{
    Affinity, AffinityKey, Counter, Flow, FlowKey, Fragment, FragmentKey, Network, OwnMac, RefusalKey,
    Sample, Sampling, Side, Source, Usage, edge_flags,
};
use lb_common::hash::{filter_bit, neighbourhood_bit};
use lb_common::host::{HostPacket, HostRoute, HostTables};
use lb_common::maps::{MAPS, MAX_MACS, MAX_NETWORKS};
use lb_common::packet::NETWORK;
use lb_common::pipeline::{Verdict, process};
use lb_common::reason::{Action, counter_index};
use lb_common::tables::FlowTable;
use lb_common::testing::{
    RECEIVER, Segment, TestFamily, at, cluster, fragments, icmp_error, ports, read, reassemble, sctp, udp,
};
use lb_common::tunnel;
use lb_common::wire::Mac;
use lb_common::wire::sctp_chunk::{ABORT, INIT, INIT_ACK, SHUTDOWN_COMPLETE};
use lb_common::wire::tcp_flags::{ACK, FIN, RST, SYN};
use lb_common::{Family, Hook, Reason, V4, V6};

#[path = "packets/frames.rs"]
mod frames;
#[path = "packets/hops.rs"]
mod hops;
#[path = "packets/preserved.rs"]
mod preserved;
#[path = "packets/tunnel.rs"]
mod tunnels;

/// The node's device and the Ethernet addresses on its link.
const DEVICE: &str = "up0";
const DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
const MTU: u32 = 1500;

/// Packets of a conversation in which everything comes up.
const CONVERSATION: usize = 40_000;

/// A program, and what the host calls the same place.
type Program = (Place, Side, Hook);

/// The programs of the node.
const PLACES: [Program; 5] = [
    (Place::Xdp, Side::NicIn, Hook::Xdp),
    (Place::NicIn, Side::NicIn, Hook::NicIn),
    (Place::NicOut, Side::NicOut, Hook::NicOut),
    (Place::PodIn, Side::PodIn, Hook::PodIn),
    (Place::PodOut, Side::PodOut, Hook::PodOut),
];

/// The program of a place.
fn program(place: Place) -> Program {
    PLACES.into_iter().find(|program| program.0 == place).expect("every place is in it")
}

/// A family and its maps in the kernel.
trait KernelFamily: TestFamily<Addr: Pod> {
    /// The last character of the maps' names.
    const SUFFIX: &'static str;
    /// The length of a host's prefix.
    const HOST: u8;
    /// The next hop of everything that is not here.
    const ROUTER: &'static str;
}

impl KernelFamily for V4 {
    const SUFFIX: &'static str = "4";
    const HOST: u8 = 32;
    const ROUTER: &'static str = "192.0.2.254";
}

impl KernelFamily for V6 {
    const SUFFIX: &'static str = "6";
    const HOST: u8 = 128;
    const ROUTER: &'static str = "2001:db8::fe";
}

/// Runs a test in a network namespace that has the small cluster's node in it.
fn on_node(test: impl FnOnce(u32) + Send + 'static) {
    let thread = thread::spawn(move || {
        netns::enter_new().expect("a network namespace; tier 2 needs root");
        ip("link set lo up");
        ip(&format!("link add {DEVICE} address {} type veth peer name up1", mac(DEVICE_MAC)));
        ip("link set up1 up");
        ip(&format!("link set {DEVICE} mtu {MTU} up"));
        for sysctl in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/{sysctl}"), "1").expect("a sysctl of a namespace of ours");
        }
        uplink::<V4>();
        uplink::<V6>();
        let index = nix::net::if_::if_nametoindex(DEVICE).expect("the device just made");
        test(index);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// As many packets, or fewer by this factor where machines are emulated.
fn fewer(packets: usize) -> usize {
    packets / std::env::var("FAIRLEAD_FEWER").map_or(1, |by| by.parse().expect("FAIRLEAD_FEWER is a number"))
}

fn uplink<F: KernelFamily>() {
    let nodad = if F::HOST == 128 { "nodad" } else { "" };
    ip(&format!("addr add {}/{} dev {DEVICE} {nodad}", F::NODE, F::HOST));
    ip(&format!("neigh add {} lladdr {} nud permanent dev {DEVICE}", F::ROUTER, mac(ROUTER_MAC)));
    ip(&format!("route add {}/{} dev {DEVICE}", F::ROUTER, F::HOST));
    ip(&format!("route add default via {} dev {DEVICE}", F::ROUTER));
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn mac(octets: [u8; 6]) -> String {
    octets.map(|o| format!("{o:02x}")).join(":")
}

/// What programs are loaded with: `--masquerade-all`, and `--tunnel-port`.
type Loaded = (bool, u16);

/// Programs that no test uses at the moment: the kernel verifies them for longer than most tests take.
static IDLE: Mutex<Vec<(Loaded, Datapath)>> = Mutex::new(vec![]);

/// Programs with maps that no other test uses meanwhile.
struct Kernel {
    loaded: Loaded,
    datapath: Option<Datapath>,
}

impl Deref for Kernel {
    type Target = Datapath;

    fn deref(&self) -> &Datapath {
        self.datapath.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Kernel {
    /// What a failed test leaves is nobody's.
    fn drop(&mut self) {
        if let (false, Some(datapath)) = (thread::panicking(), self.datapath.take()) {
            IDLE.lock().expect("no test fails here").push((self.loaded, datapath));
        }
    }
}

fn map<F: KernelFamily>(datapath: &Datapath, name: &str) -> MapData {
    let full = format!("{name}{}", F::SUFFIX);
    let spec = MAPS.iter().find(|spec| spec.name == name || spec.name == full).expect("a map of ours");
    datapath.map_data(spec).expect("its handle")
}

fn hash<F: KernelFamily, K: Pod, V: Pod>(datapath: &Datapath, name: &str) -> HashMap<MapData, K, V> {
    HashMap::try_from(Map::HashMap(map::<F>(datapath, name))).expect("a hash of these types")
}

/// Writes what the host's maps hold into the kernel's.
fn mirror<F: KernelFamily>(tables: &HostTables<F>, datapath: &Datapath)
where
    lb_common::abi::ServiceKey<F::Addr>: Pod,
    lb_common::abi::Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
{
    let mut services = hash::<F, _, _>(datapath, "SERVICES");
    for (key, value) in &tables.services {
        services.insert(*key, *value, 0).expect("room");
    }
    let mut addresses = hash::<F, _, _>(datapath, "ADDRESSES");
    for (key, value) in &tables.addresses {
        addresses.insert(*key, *value, 0).expect("room");
    }
    let mut filter = Array::try_from(Map::Array(map::<F>(datapath, "ADDRESS_FILTER"))).expect("an array");
    let mut bits: BTreeMap<u32, u64> = BTreeMap::new();
    let addresses = tables.addresses.keys().map(filter_bit::<F>);
    // None is wider than its neighbourhood.
    let networks = tables.networks.iter().map(|network| neighbourhood_bit::<F>(&network.addr));
    for (word, bit) in addresses.chain(networks) {
        *bits.entry(word).or_default() |= bit;
    }
    for (word, bits) in bits {
        filter.set(word, bits, 0).expect("room");
    }
    let mut edges = hash::<F, _, _>(datapath, "EDGES");
    for (key, value) in &tables.edges {
        edges.insert(*key, *value, 0).expect("room");
    }
    let mut macs = Array::try_from(Map::Array(map::<F>(datapath, "MACS"))).expect("an array of addresses");
    for (place, own) in &tables.own_macs {
        macs.set(*place, *own, 0).expect("room");
    }
    let mut places = hash::<F, _, _>(datapath, "PLACES");
    for (key, value) in &tables.places {
        places.insert(*key, *value, 0).expect("room");
    }
    let mut backends =
        Array::try_from(Map::Array(map::<F>(datapath, "BACKENDS"))).expect("an array of backends");
    for (key, value) in &tables.backends {
        backends.set(*key, *value, 0).expect("room");
    }
    let mut slots = Array::try_from(Map::Array(map::<F>(datapath, "SLOTS"))).expect("an array of slots");
    for (key, value) in &tables.slots {
        slots.set(*key, *value, 0).expect("room");
    }
    let mut sources = LpmTrie::try_from(Map::LpmTrie(map::<F>(datapath, "SOURCES"))).expect("a trie");
    for source in &tables.sources {
        sources.insert(&Key::new(source.prefix_len, source.data), 1u32, 0).expect("room");
    }
    let mut members = hash::<F, _, _>(datapath, "MEMBERS");
    for member in &tables.members {
        members.insert(*member, 1u32, 0).expect("room");
    }
    let mut networks = Array::try_from(Map::Array(map::<F>(datapath, "NETWORKS"))).expect("an array");
    for (index, network) in (0..).zip(&tables.networks) {
        networks.set(index, *network, 0).expect("room");
    }
}

/// Which backend each client was given last.
fn affinities<F: KernelFamily>(datapath: &Datapath) -> BTreeMap<AffinityKey<F::Addr>, Affinity>
where
    AffinityKey<F::Addr>: Pod,
{
    let map = HashMap::try_from(Map::LruHashMap(map::<F>(datapath, "AFFINITY"))).expect("a hash of clients");
    map.iter().map(|entry| entry.expect("an entry")).collect()
}

/// The datagrams that came in pieces.
fn remembered<F: KernelFamily>(datapath: &Datapath) -> BTreeMap<FragmentKey<F::Addr>, Fragment>
where
    FragmentKey<F::Addr>: Pod,
{
    let map =
        HashMap::try_from(Map::LruHashMap(map::<F>(datapath, "FRAGMENTS"))).expect("a hash of datagrams");
    map.iter().map(|entry| entry.expect("an entry")).collect()
}

/// What went through each Service of the small cluster.
fn usage<F: KernelFamily>(datapath: &Datapath) -> BTreeMap<u32, Usage> {
    let map: PerCpuArray<_, Usage> =
        PerCpuArray::try_from(Map::PerCpuArray(map::<F>(datapath, "USAGE"))).expect("the usage");
    let mut usage = BTreeMap::new();
    for service in 0..32 {
        let mut sum = Usage::default();
        for cpu in map.get(&service, 0).expect("a counter").iter() {
            sum.connections += cpu.connections;
            sum.packets += cpu.packets;
            sum.bytes += cpu.bytes;
            sum.refused += cpu.refused;
        }
        if sum != Usage::default() {
            usage.insert(service, sum);
        }
    }
    usage
}

/// What clients of each Service were refused for.
fn refusals<F: KernelFamily>(datapath: &Datapath) -> BTreeMap<RefusalKey, u64> {
    let map = Map::PerCpuHashMap(map::<F>(datapath, "REFUSALS"));
    let map: PerCpuHashMap<_, RefusalKey, u64> = map.try_into().expect("a hash of counts");
    let entries = map.iter().map(|entry| entry.expect("an entry"));
    entries.map(|(key, counts)| (key, counts.iter().sum())).collect()
}

/// Has the programs tell of every packet that is lost.
fn samples<F: KernelFamily>(datapath: &Datapath) -> RingBuf<MapData> {
    let mut switch = Array::try_from(Map::Array(map::<F>(datapath, "SAMPLING"))).expect("an array");
    switch.set(0, Sampling { until: u64::MAX, lost: 0 }, 0).expect("a switch");
    Map::RingBuf(map::<F>(datapath, "SAMPLES")).try_into().expect("a ring buffer")
}

/// The entries of a flow table in the kernel.
fn flows<F: KernelFamily>(datapath: &Datapath, table: FlowTable) -> BTreeMap<FlowKey<F::Addr>, Flow<F::Addr>>
where
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let name = match table {
        FlowTable::Established => "FLOWS",
        FlowTable::Pending => "PENDING",
    };
    let map = HashMap::try_from(Map::LruHashMap(map::<F>(datapath, name))).expect("a hash of flows");
    map.iter().map(|entry| entry.expect("an entry")).collect()
}

fn counters<F: KernelFamily>(datapath: &Datapath) -> Vec<(Hook, Reason, u64)> {
    let map: PerCpuArray<_, Counter> =
        PerCpuArray::try_from(Map::PerCpuArray(map::<F>(datapath, "COUNTERS"))).expect("the counters");
    let mut counts = Vec::new();
    for hook in Hook::ALL {
        for reason in Reason::ALL {
            let values = map.get(&counter_index(hook, reason), 0).expect("a counter");
            let packets = values.iter().map(|counter| counter.packets).sum();
            if packets > 0 {
                counts.push((hook, reason, packets));
            }
        }
    }
    counts
}

/// The host's pipeline and the kernel's programs, side by side.
struct Pair<F: KernelFamily> {
    host: HostTables<F>,
    kernel: Kernel,
    device: u32,
    counts: BTreeMap<(Hook, Reason), u64>,
    samples: RingBuf<MapData>,
    since_5_15: bool,
}

impl<F: KernelFamily> Pair<F>
where
    lb_common::abi::ServiceKey<F::Addr>: Pod,
    lb_common::abi::Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    /// `masquerades`: `--masquerade-all`, with these flags of the one way out.
    fn new(device: u32, masquerades: Option<u32>) -> Self {
        Self::with(device, masquerades, |_| {})
    }

    /// With these changes to the small cluster.
    fn with(device: u32, masquerades: Option<u32>, change: impl FnOnce(&mut HostTables<F>)) -> Self {
        let mut host = cluster::<F>(device);
        change(&mut host);
        let kernel = Self::programs((masquerades.is_some(), host.tunnel_port));
        host.masquerades_all = masquerades.is_some();
        host.sends_tunnelled = kernel.features().checks_mtu;
        let edge = host.edges.entry(device).or_default();
        edge.flags |= masquerades.unwrap_or(0);
        let own = OwnMac { ifindex: device, mac: Mac { octets: RECEIVER }, pad: 0 };
        host.own_macs.insert(device % MAX_MACS, own);
        for edge in host.edges.values_mut().filter(|_| fastrand::bool()) {
            edge.flags |= edge_flags::XDP_FIRST;
        }
        mirror(&host, &kernel);
        // Before 5.15 XDP programs cannot be run as on a device.
        let try_xdp = Input { ifindex: device, ..Input::new(&[0; 64]) };
        let since_5_15 = test_run(kernel.programs(), Place::Xdp, try_xdp).is_ok();
        if !since_5_15 {
            eprintln!("not tested on this kernel: XDP, and that clients are told the MTU as it is");
        }
        // Other tests may have counted before.
        let counts =
            counters::<F>(&kernel).into_iter().map(|(hook, reason, n)| ((hook, reason), n)).collect();
        host.usage.replace(usage::<F>(&kernel));
        host.refusals.replace(refusals::<F>(&kernel));
        host.samples.replace(Some(vec![]));
        let samples = samples::<F>(&kernel);
        Self { host, kernel, device, counts, samples, since_5_15 }
    }

    /// Programs with maps in which nothing of the family is left; what is counted goes on.
    fn programs(loaded: Loaded) -> Kernel {
        let mut idle = IDLE.lock().expect("no test fails here");
        let found = idle.iter().position(|(other, _)| *other == loaded).map(|at| idle.swap_remove(at).1);
        drop(idle);
        if let Some(datapath) = found {
            Self::empty(&datapath);
            return Kernel { loaded, datapath: Some(datapath) };
        }
        let (masquerade_all, tunnel_port) = loaded;
        let sizes = Sizes { flows: Some(128 * 1024), services: Some(1024), backends: Some(1024) };
        let options = Options { sizes, masquerade_all, tunnel_port, ..Options::default() };
        Kernel { loaded, datapath: Some(Datapath::isolated(&options).expect("the programs load")) }
    }

    /// Takes everything of the family out of the maps. Slots that no window has, and bits of the filter, say nothing by themselves.
    fn empty(datapath: &Datapath) {
        use lb_common::abi;
        fn clear<F: KernelFamily, K: Pod, V: Pod>(datapath: &Datapath, name: &str) {
            let data = map::<F>(datapath, name);
            let is_lru =
                data.info().is_ok_and(|info| matches!(info.map_type(), Ok(aya::maps::MapType::LruHash)));
            let map = if is_lru { Map::LruHashMap(data) } else { Map::HashMap(data) };
            let mut map: HashMap<_, K, V> = HashMap::try_from(map).expect("a hash of these types");
            let keys: Vec<K> = map.keys().map(|key| key.expect("a key")).collect();
            for key in keys {
                map.remove(&key).expect("it was there");
            }
        }
        clear::<F, abi::ServiceKey<F::Addr>, abi::Service>(datapath, "SERVICES");
        clear::<F, F::Addr, abi::AddressInfo>(datapath, "ADDRESSES");
        clear::<F, u32, abi::Edge>(datapath, "EDGES");
        clear::<F, abi::ServiceKey<F::Addr>, abi::Place<F::Addr>>(datapath, "PLACES");
        clear::<F, abi::MemberKey, u32>(datapath, "MEMBERS");
        clear::<F, AffinityKey<F::Addr>, Affinity>(datapath, "AFFINITY");
        clear::<F, FragmentKey<F::Addr>, Fragment>(datapath, "FRAGMENTS");
        clear::<F, FlowKey<F::Addr>, Flow<F::Addr>>(datapath, "FLOWS");
        clear::<F, FlowKey<F::Addr>, Flow<F::Addr>>(datapath, "PENDING");
        let trie = LpmTrie::<_, Source<F::Addr>, u32>::try_from(Map::LpmTrie(map::<F>(datapath, "SOURCES")));
        let mut trie = trie.expect("a trie");
        let keys: Vec<_> = trie.keys().map(|key| key.expect("a key")).collect();
        for key in keys {
            trie.remove(&key).expect("it was there");
        }
        let mut networks = Array::try_from(Map::Array(map::<F>(datapath, "NETWORKS"))).expect("an array");
        for index in 0..MAX_NETWORKS {
            networks.set(index, Network::<F::Addr>::default(), 0).expect("room");
        }
        let mut backends = Array::try_from(Map::Array(map::<F>(datapath, "BACKENDS"))).expect("an array");
        for id in 0..1024 {
            backends.set(id, abi::Backend::<F::Addr>::default(), 0).expect("room");
        }
        let mut routing = Array::try_from(Map::Array(map::<F>(datapath, "ROUTING"))).expect("an array");
        routing.set(0, abi::Routing::default(), 0).expect("room");
    }

    /// What can be run here.
    fn places(&self) -> &'static [Program] {
        if self.since_5_15 { &PLACES } else { &PLACES[1..] }
    }

    /// Sends a packet through both and compares. Returns what became of it.
    fn send(&mut self, (place, side, hook): Program, frame: &[u8]) -> (Verdict, Reason, Vec<u8>) {
        self.host.now.set(monotonic());
        let route = HostRoute::Out { ifindex: self.device, mtu: MTU };
        let mut packet = HostPacket::new(frame, self.device)
            .with_route(route)
            .with_local::<F>(&F::wire(at(F::NODE, 0).ip()));
        if place == Place::Xdp {
            packet = packet.with_hook_behind();
        }
        let taken_out = match side {
            Side::NicIn if is_family::<F>(frame) => tunnel::unwrap::<F, _, _>(&mut packet, &self.host),
            _ => Ok(false),
        };
        let (verdict, reason) = match taken_out {
            Err(reason) => (Verdict::Drop, reason),
            Ok(_) if is_family::<F>(frame) => process::<F, _, _>(&mut packet, &self.host, side),
            Ok(_) => (Verdict::Pass, Reason::NotIp),
        };
        *self.counts.entry((hook, reason)).or_default() += 1;

        let input = Input { ifindex: self.device, ..Input::new(frame) };
        let output = test_run(self.kernel.programs(), place, input)
            .unwrap_or_else(|e| panic!("{place:?}: {e}: {frame:02x?}"));
        let context = || {
            let counters = counters::<F>(&self.kernel);
            let out = &output.frame;
            format!(
                "{place:?} {verdict:?} {reason:?}\n in {frame:02x?}\nout {out:02x?}\n{:?}\n{counters:?}",
                self.counts
            )
        };
        assert_eq!(output.verdict, words(place, verdict), "{}", context());
        let mut want = packet.bytes();
        if place == Place::Xdp && verdict == Verdict::Forward {
            // XDP writes the link header that tc leaves to the kernel.
            want[..6].copy_from_slice(&ROUTER_MAC);
            want[6..12].copy_from_slice(&DEVICE_MAC);
        }
        if reason == Reason::PacketTooBig && !self.since_5_15 {
            // Before 5.12 the kernel does not say which MTU.
            let told = NETWORK + F::HEADER_LEN + 6;
            assert_eq!(output.frame[told..told + 2], 1280_u16.to_be_bytes(), "{}", context());
            want.clone_from(&output.frame);
        }
        assert_eq!(output.frame, want, "{}", context());
        let want_told = self.host.samples.replace(Some(vec![])).unwrap_or_default();
        let want_told = want_told.into_iter().map(|sample| Sample { time: 0, hook: hook as u8, ..sample });
        let mut told = vec![];
        while let Some(bytes) = self.samples.next() {
            let sample = fairlead::drops::decode(&bytes).expect("a sample");
            assert!(sample.time <= monotonic(), "{sample:?}");
            told.push(Sample { time: 0, ..sample });
        }
        assert_eq!(told, want_told.collect::<Vec<_>>(), "{place:?} {verdict:?} {reason:?} {frame:02x?}");
        (verdict, reason, want)
    }

    /// Sends the fragments of a packet; if all of them in order are translated, the whole must be sound.
    fn send_in_pieces(&mut self, place: (Place, Side, Hook), pieces: &[Vec<u8>]) -> Vec<Reason> {
        let (reasons, carried): (Vec<_>, Vec<_>) = pieces
            .iter()
            .map(|piece| self.send(place, piece))
            .map(|(_, reason, bytes)| (reason, bytes))
            .unzip();
        let is_carried = |reason: &Reason| matches!(reason.action(), Action::Carry);
        if reasons.iter().all(is_carried)
            && let Ok(sent) = reassemble(pieces)
        {
            let whole = reassemble(&carried).unwrap_or_else(|e| panic!("{e}: {sent:02x?}"));
            read(&whole).unwrap_or_else(|e| panic!("{e}: {sent:02x?}"));
        }
        reasons
    }

    /// Compares the flow tables, what is known of clients, and all that is counted.
    fn settle(&self) {
        for table in [FlowTable::Established, FlowTable::Pending] {
            let clean = |flows: BTreeMap<FlowKey<F::Addr>, Flow<F::Addr>>| -> BTreeMap<_, _> {
                flows.into_iter().map(|(key, flow)| (key, Flow { last_seen: 0, tick: 0, ..flow })).collect()
            };
            let (host, kernel) = (clean(self.host.entries(table)), clean(flows::<F>(&self.kernel, table)));
            assert_eq!(host, kernel, "{table:?}");
        }
        let clean = |clients: BTreeMap<AffinityKey<F::Addr>, Affinity>| -> BTreeMap<_, _> {
            clients.into_iter().map(|(key, known)| (key, Affinity { last_seen: 0, ..known })).collect()
        };
        assert_eq!(clean(self.host.affinity.borrow().clone()), clean(affinities::<F>(&self.kernel)));
        let clean = |datagrams: BTreeMap<FragmentKey<F::Addr>, Fragment>| -> BTreeMap<_, _> {
            datagrams.into_iter().map(|(key, first)| (key, Fragment { last_seen: 0, ..first })).collect()
        };
        assert_eq!(clean(self.host.fragments.borrow().clone()), clean(remembered::<F>(&self.kernel)));
        assert_eq!(*self.host.usage.borrow(), usage::<F>(&self.kernel));
        assert_eq!(*self.host.refusals.borrow(), refusals::<F>(&self.kernel));
        let host: Vec<_> = self.counts.iter().map(|((hook, reason), n)| (*hook, *reason, *n)).collect();
        assert_eq!(host, counters::<F>(&self.kernel));
    }
}

fn is_family<F: TestFamily>(frame: &[u8]) -> bool {
    frame[12..14] == F::ETHER_TYPE.to_be_bytes()
}

/// A verdict as the hook says it.
fn words(place: Place, verdict: Verdict) -> u32 {
    match (place, verdict) {
        (Place::Xdp, Verdict::Pass) => 2,
        (Place::Xdp, Verdict::Drop) => 1,
        // The way out is the device the packet came in through: XDP_TX.
        (Place::Xdp, Verdict::Forward | Verdict::SendBack) => 3,
        (_, Verdict::Pass) => u32::MAX,
        (_, Verdict::Drop) => 2,
        (_, Verdict::Forward | Verdict::SendBack) => 7,
    }
}

fn monotonic() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
    u64::try_from(now.tv_sec()).expect("after boot") * 1_000_000_000
        + u64::try_from(now.tv_nsec()).expect("below a second")
}

/// SCTP's chunk of a packet that neither begins nor ends anything.
const DATA: u8 = 0;

/// Packets of a small world in which everything meets everything.
struct Traffic {
    random: fastrand::Rng,
}

impl Traffic {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.usize(..of.len())]
    }

    fn end<F: TestFamily>(&mut self) -> SocketAddr {
        let addr = self.pick(&[F::CLIENT, F::NODE, F::VIP, F::UNALLOCATED, F::POD, F::OTHER_POD, F::FAR_POD]);
        let port = self.pick(&[
            ports::WEB,
            ports::WEB_NODE,
            ports::FAR,
            ports::FAR_NODE,
            ports::EMPTY,
            ports::LOCAL_NODE,
            ports::DNS,
            ports::DNS_NODE,
            ports::FAR_DNS_NODE,
            ports::FAR_SIGNAL,
            ports::FAR_SIGNAL_NODE,
            ports::MANY,
            ports::MANY_NODE,
            ports::GATED,
            ports::GATED_NODE,
            ports::STICKY,
            ports::STICKY_NODE,
            ports::TARGET,
            ports::TARGET_UDP,
            ports::TARGET_SCTP,
            40000,
            40001,
        ]);
        at(addr, port)
    }

    fn packet<F: TestFamily>(&mut self) -> Vec<u8> {
        let (src, dst) = (self.end::<F>(), self.end::<F>());
        // Longer than the MTU in the end, and odd lengths.
        let len = self.pick(&[0, 0, 1, 2, 7, 64, 333, 1200, 1600]);
        let payload: Vec<u8> = (0..len).map(|_| self.random.u8(..)).collect();
        match self.random.u8(..8) {
            0 | 1 => {
                let mut datagram = udp(src, dst, &payload);
                if self.random.u8(..8) == 0 {
                    // What Services cannot have.
                    let at = if F::HEADER_LEN == 40 { NETWORK + 6 } else { NETWORK + 9 };
                    datagram[at] = self.pick(&[F::ICMP, 47, 50]);
                }
                return datagram;
            }
            2 | 3 => {
                let kind = self.pick(&[INIT, INIT, INIT_ACK, ABORT, SHUTDOWN_COMPLETE, DATA, DATA]);
                return sctp(src, dst, kind, &payload);
            }
            _ => {}
        }
        let flags = self.pick(&[SYN, SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK, 0]);
        let ttl = self.pick(&[60, 60, 60, 60, 2, 1, 0]);
        // Often what the other end expects: that decides about RSTs.
        let numbers = [1000, 1000, 2000, 2000, self.random.u32(..)];
        Segment {
            seq: self.pick(&numbers),
            ack: self.pick(&numbers),
            ttl,
            payload,
            ..Segment::new(src, dst, flags)
        }
        .build()
    }

    /// The packet in pieces that may be too small for its header, mostly in their order.
    fn pieces(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let (id, size) = (self.random.u32(..3), self.pick(&[8, 24, 64, 600, 600]));
        let mut pieces = fragments(frame, id, size);
        if self.random.u8(..4) == 0 {
            self.random.shuffle(&mut pieces);
        }
        pieces
    }

    /// The answer to a packet, as its receiver would send it, or somebody on the way who cannot take it on.
    fn answer<F: TestFamily>(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let seen = read(frame).ok()?;
        let (src, dst) = seen.ends();
        if self.random.u8(..4) == 0 {
            let kind = self.pick(&[F::TOO_BIG, F::PORT_UNREACHABLE, F::TIME_EXCEEDED]);
            let speaker = self.pick(&[dst.ip(), at(F::UNALLOCATED, 0).ip()]);
            let packet = &frame[NETWORK..];
            let quoted = self.pick(&[F::HEADER_LEN + 8, F::HEADER_LEN + 20, F::HEADER_LEN + 7, packet.len()]);
            return Some(icmp_error(speaker, src.ip(), kind, &packet[..quoted.min(packet.len())]));
        }
        match seen {
            lb_common::testing::Seen::Tcp { .. } => {
                let flags = self.pick(&[SYN | ACK, ACK, FIN | ACK, RST]);
                Some(Segment::new(dst, src, flags).build())
            }
            lb_common::testing::Seen::Udp { .. } => Some(udp(dst, src, b"answer")),
            lb_common::testing::Seen::Sctp { .. } => {
                let kind = self.pick(&[INIT_ACK, DATA, ABORT]);
                Some(sctp(dst, src, kind, b"answer"))
            }
            lb_common::testing::Seen::Icmp { .. } => None,
        }
    }
}

/// Where the answer is met to a packet that was translated at `place`.
fn where_answers_come(
    place: (Place, Side, Hook),
    verdict: Verdict,
    masquerades: Option<u32>,
) -> (Place, Side, Hook) {
    let answer = match place.0 {
        // What is behind the way out answers there; how it goes on from there, the other end is told by the same way.
        Place::Xdp | Place::NicIn if verdict == Verdict::Forward && masquerades == Some(edge_flags::POD) => {
            Place::PodIn
        }
        Place::PodIn if verdict == Verdict::Forward && masquerades == Some(0) => Place::NicIn,
        _ if verdict != Verdict::Pass => place.0,
        Place::Xdp | Place::NicIn => Place::NicOut,
        Place::NicOut => Place::NicIn,
        Place::PodIn => Place::PodOut,
        Place::PodOut => Place::PodIn,
    };
    program(answer)
}

/// Random conversations at every hook, which share their flows: what goes in at one place is answered at another.
fn conversations<F: KernelFamily>(device: u32, seed: u64, packets: usize, masquerades: Option<u32>)
where
    lb_common::abi::ServiceKey<F::Addr>: Pod,
    lb_common::abi::Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let mut pair = Pair::<F>::new(device, masquerades);
    let mut traffic = Traffic { random: fastrand::Rng::with_seed(seed) };
    let mut reasons = std::collections::BTreeSet::new();
    let (mut next, mut errors) = (None, 0);
    for n in 0..packets {
        // An answer mostly comes where it is expected.
        let anywhere = traffic.pick(pair.places());
        let (frame, expected) = next.take().unwrap_or_else(|| (traffic.packet::<F>(), anywhere));
        let place = traffic.pick(&[expected, expected, anywhere]);
        if frame.len() > 200 && traffic.random.u8(..3) == 0 {
            reasons.extend(pair.send_in_pieces(place, &traffic.pieces(&frame)));
            continue;
        }
        let (verdict, reason, out) = pair.send(place, &frame);
        reasons.insert(reason);
        if matches!(reason, Reason::Translated | Reason::Forwarded | Reason::Hairpinned) {
            assert_ne!(verdict, Verdict::Drop);
            let seen = read(&out).unwrap_or_else(|e| panic!("seed {seed}, packet {n}: {e}: {out:02x?}"));
            errors += usize::from(matches!(seen, lb_common::testing::Seen::Icmp { .. }));
            if traffic.random.u8(..3) > 0 {
                next = traffic
                    .answer::<F>(&out)
                    .map(|frame| (frame, where_answers_come(place, verdict, masquerades)));
            }
        }
        if n % 2000 == 1999 {
            pair.settle();
        }
    }
    pair.settle();
    if packets < CONVERSATION {
        // What is rare may not have come up.
        return;
    }
    assert!(errors > packets / 1000, "only {errors} ICMP errors were translated");
    for reason in [
        Reason::NotOurs,
        Reason::Translated,
        Reason::Forwarded,
        Reason::Hairpinned,
        Reason::NoEndpoints,
        Reason::NoLocalEndpoints,
        Reason::UnknownPort,
        Reason::SourceNotAllowed,
        Reason::NoSuchService,
        Reason::StrayReset,
        Reason::TtlExceeded,
        Reason::PacketTooBig,
        Reason::Fragment,
        Reason::StrayFragment,
        Reason::UnservedProtocol,
        Reason::Direct,
    ] {
        assert!(reasons.contains(&reason), "{reason:?} was never the case: this test tests nothing of it");
    }
}

#[test]
fn programs_do_what_the_host_does_in_ipv4() {
    on_node(|device| conversations::<V4>(device, 4, fewer(CONVERSATION), None));
}

#[test]
fn programs_do_what_the_host_does_in_ipv6() {
    on_node(|device| conversations::<V6>(device, 6, fewer(CONVERSATION), None));
}

#[test]
fn programs_masquerade_as_the_host_does_in_ipv4() {
    on_node(|device| {
        conversations::<V4>(device, 41, fewer(20_000), Some(0));
        conversations::<V4>(device, 42, fewer(20_000), Some(edge_flags::POD));
    });
}

#[test]
fn programs_masquerade_as_the_host_does_in_ipv6() {
    on_node(|device| {
        conversations::<V6>(device, 61, fewer(20_000), Some(0));
        conversations::<V6>(device, 62, fewer(20_000), Some(edge_flags::POD));
    });
}

/// Damages a frame in one of the ways that hostile or broken senders do.
fn damage(random: &mut fastrand::Rng, frame: &mut Vec<u8>) {
    match random.u8(..6) {
        // Truncated anywhere behind the link header.
        0 => frame.truncate(random.usize(NETWORK..=frame.len())),
        // Any byte of the network header: versions, lengths, fragments, protocols, options, addresses.
        1 => {
            let at = random.usize(NETWORK..frame.len().min(NETWORK + 40));
            frame[at] = random.u8(..);
        }
        // Any byte at all, several times.
        2 => {
            for _ in 0..random.u8(1..8) {
                let at = random.usize(NETWORK..frame.len());
                frame[at] = random.u8(..);
            }
        }
        // Another kind of frame.
        3 => frame[12..14].copy_from_slice(
            &[0x0806u16, 0x8100, 0x88a8, 0x86dd, 0x0800, 0x8847][random.usize(..6)].to_be_bytes(),
        ),
        // Extension headers and odd protocols in place of TCP.
        4 => {
            let at = if frame[12] == 8 { NETWORK + 9 } else { NETWORK + 6 };
            if let Some(byte) = frame.get_mut(at) {
                *byte = [0, 43, 44, 50, 51, 58, 59, 60, 1, 4, 41, 47, 132, 136][random.usize(..14)];
            }
        }
        // Nothing but noise.
        _ => {
            for byte in &mut frame[NETWORK..] {
                *byte = random.u8(..);
            }
        }
    }
}

/// A hundred thousand damaged packets at each hook: whatever the host makes of them, the kernel makes too, and what is
/// not a sound packet of a flow stays untouched.
fn damaged<F: KernelFamily>(device: u32, seed: u64, packets: usize)
where
    lb_common::abi::ServiceKey<F::Addr>: Pod,
    lb_common::abi::Backend<F::Addr>: Pod,
    lb_common::abi::Place<F::Addr>: Pod,
    AffinityKey<F::Addr>: Pod,
    FragmentKey<F::Addr>: Pod,
    Network<F::Addr>: Pod,
    Source<F::Addr>: Pod,
    FlowKey<F::Addr>: Pod,
    Flow<F::Addr>: Pod,
{
    let mut pair = Pair::<F>::new(device, None);
    let mut traffic = Traffic { random: fastrand::Rng::with_seed(seed) };
    for place in pair.places().iter().copied() {
        let mut left_alone = 0;
        for _ in 0..packets {
            let mut frame = traffic.packet::<F>();
            damage(&mut traffic.random, &mut frame);
            let other = [V4::ETHER_TYPE, V6::ETHER_TYPE].map(u16::to_be_bytes);
            if other.iter().any(|kind| frame[12..14] == *kind) && !is_family::<F>(&frame) {
                // The other family's test has these.
                frame[12] = 0x99;
            }
            if place.0 != Place::Xdp && frame.len() < NETWORK + F::HEADER_LEN {
                // BPF_PROG_TEST_RUN has no socket buffer with less than an IP header.
                frame.resize(NETWORK + F::HEADER_LEN, 0);
            }
            let (verdict, reason, out) = pair.send(place, &frame);
            if !matches!(reason, Reason::Translated | Reason::Forwarded | Reason::Hairpinned)
                && verdict == Verdict::Pass
            {
                assert_eq!(frame, out);
                left_alone += 1;
            }
        }
        assert!(left_alone > packets / 2, "{place:?}: {left_alone} of {packets}");
        pair.settle();
    }
}

#[test]
fn damaged_packets_change_nothing_in_ipv4() {
    on_node(|device| damaged::<V4>(device, 44, fewer(50_000)));
}

#[test]
fn damaged_packets_change_nothing_in_ipv6() {
    on_node(|device| damaged::<V6>(device, 66, fewer(50_000)));
}
