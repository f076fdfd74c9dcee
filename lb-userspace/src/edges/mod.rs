//! Follows the devices and addresses of the node, keeps programs on the edges among them, and the map
//! `EDGES` true.
//!
//! Netlink messages only say that something changed. What is done about it is always the same: read all
//! devices, classify them, and repair the difference. So a lost message (`ENOBUFS`) needs nothing special,
//! and a restarted agent does what it always does. A burst of messages is answered once: that takes at most a
//! tenth of a core, however many come, and half of one while there are new devices to serve.

mod check;
mod classify;
mod dump;
mod macs;
mod mirror;
mod sources;
mod survey;
mod xdp_features;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapData};
use futures::StreamExt;
use ipnet::IpNet;
use lb_common::abi::{self, Addr4, Addr6, EdgeSourceKey, OwnMac, edge_flags};
use lb_common::maps::MAX_EDGES;
use lb_common::wire::Mac;
use nix::time::{ClockId, clock_gettime};
use rtnetlink::MulticastGroup;
use serde::Serialize;
use tokio::sync::{oneshot, watch};

pub use check::Reattached;
pub use classify::{Address, DEFAULT_POD_DEVICES, Device, Role, Rules, Why, classify};
pub use mirror::{EDGE_SOURCES, EDGES, Repairs};
pub use survey::{Surveyed, survey};

use self::check::Doubts;
use self::classify::ways_to_pods;
use self::macs::Macs;
use self::mirror::Mirror;
use self::sources::further_sources;
use self::xdp_features::{Netdev, XdpFeatures};
use crate::datapath::node::StateFile;
use crate::datapath::{AttachError, Hooks, Place, XdpKind, device_exists};

/// How often everything is looked at without a reason, for what netlink does not tell: a link that somebody detached.
const PERIOD: Duration = Duration::from_secs(10);
/// When something that failed is tried again without a reason.
const RETRY: Duration = Duration::from_mins(1);

/// `--xdp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum XdpMode {
    /// Native where the driver has it and what it sends arrives; else tc.
    #[default]
    Auto,
    Native,
    Generic,
    Off,
}

/// What the follower needs.
pub struct Config {
    pub hooks: Hooks,
    /// The map `EDGES`.
    pub map: HashMap<MapData, u32, abi::Edge>,
    /// The map `EDGE_SOURCES`.
    pub sources: HashMap<MapData, EdgeSourceKey, abi::Edge>,
    /// The map `MACS`.
    pub macs: Array<MapData, OwnMac>,
    /// `--source-addresses`.
    pub source_networks: Vec<IpNet>,
    pub rules: Rules,
    pub xdp: XdpMode,
    /// `--masquerade-all`: the map has the ways to pods, too.
    pub masquerade_all: bool,
    /// The cgroup that has the socket programs, if any has.
    pub sockets: Option<PathBuf>,
    pub state: StateFile,
    pub reattached: Reattached,
    pub repairs: Repairs,
}

/// The node's devices as the datapath sees them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct View {
    /// Every address of this node.
    pub addresses: Vec<LocalAddress>,
    /// Every device that is an edge.
    pub edges: Vec<EdgeView>,
}

/// An address of this node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct LocalAddress {
    pub addr: IpAddr,
    pub device: String,
    /// On the loopback device and of loopback scope: only this node's processes can ask for it.
    pub loopback: bool,
    /// Reachable from other nodes as far as its scope says.
    pub global: bool,
}

/// An edge and how it is served.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EdgeView {
    pub ifindex: u32,
    pub device: String,
    /// `external` or `pod`.
    pub role: &'static str,
    /// `tcx` or `clsact`.
    pub tc: &'static str,
    /// How XDP runs here, if it does.
    pub xdp: Option<XdpKind>,
    /// Why XDP does not run here, or what failed.
    pub note: Option<String>,
}

/// The running follower; it stops when this is dropped, and leaves every program on its hook.
#[derive(Debug)]
pub struct Edges {
    view: watch::Receiver<Option<Arc<View>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Edges {
    /// Starts a thread in the caller's network namespace: attaching XDP may take a driver a second, which
    /// nobody else shall wait for.
    pub fn spawn(config: Config) -> io::Result<Self> {
        let (view_sender, view) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("edges".into()).spawn(move || {
            if let Err(error) = runtime.block_on(follow(config, &view_sender, stopped)) {
                tracing::error!(%error, "devices cannot be followed; new pods are not served");
            }
        })?;
        Ok(Self { view, stop: Some(stop), thread: Some(thread) })
    }

    /// `None` until every device was looked at once. Closed when the follower has failed.
    pub fn view(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.view.clone()
    }
}

impl Drop for Edges {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

async fn follow(
    config: Config,
    view: &watch::Sender<Option<Arc<View>>>,
    mut stop: oneshot::Receiver<()>,
) -> io::Result<()> {
    let mut groups = vec![MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    if !config.hooks.tcx() {
        // Filters are removed by netlink, and links are not.
        groups.push(MulticastGroup::Tc);
    }
    let (events, _, mut changes) = rtnetlink::new_multicast_connection(&groups)?;
    // Requests have a socket of their own, whose answers no burst of messages can push out.
    let (requests, netlink, _) = rtnetlink::new_connection()?;
    tokio::spawn(events);
    tokio::spawn(requests);
    let mut follower = Follower {
        hooks: config.hooks,
        map: Mirror::new(EDGES, config.map, &config.repairs),
        sources: Mirror::new(EDGE_SOURCES, config.sources, &config.repairs),
        macs: Macs::new(config.macs),
        source_networks: config.source_networks,
        rules: config.rules,
        xdp: config.xdp,
        masquerade_all: config.masquerade_all,
        sockets: config.sockets,
        sockets_failed: None,
        state: config.state,
        reattached: config.reattached,
        netlink,
        attached: BTreeMap::new(),
        served_more: false,
        failures: BTreeMap::new(),
        doubts: Doubts::default(),
        netdev: Netdev::open()
            .inspect_err(|error| tracing::debug!(%error, "the kernel does not tell XDP features (6.3)"))
            .ok(),
        swept: false,
        told_before: BTreeSet::new(),
        told: BTreeMap::new(),
    };
    loop {
        // What was said so far is answered by what is read now.
        while let Ok((message, _)) = changes.try_recv() {
            follower.doubts.heed(&message);
        }
        let started = cpu_time();
        let mut taken = false;
        match dump::devices(&follower.netlink).await {
            Ok(devices) => {
                taken = follower.check(&devices, &mut changes).await;
                let now = Arc::new(follower.settle(&devices).await);
                view.send_if_modified(|shown| {
                    let differs = shown.as_ref() != Some(&now);
                    *shown = Some(now);
                    differs
                });
            }
            Err(error) => tracing::warn!(%error, "cannot read the devices of this node"),
        }
        let least = if taken { check::PATIENCE } else { Duration::from_millis(2) };
        // Not the time itself: to attach a program is to wait for the kernel, most of all.
        let rest = if mem::take(&mut follower.served_more) { 1 } else { 9 };
        let pause = (cpu_time().saturating_sub(started) * rest).clamp(least, Duration::from_secs(1));
        tokio::select! {
            _ = &mut stop => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        tokio::select! {
            _ = &mut stop => return Ok(()),
            change = changes.next() => match change {
                Some((message, _)) => follower.doubts.heed(&message),
                None => return Err(io::Error::other("the netlink socket was closed")),
            },
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

/// What this thread has used of a processor.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

struct Follower {
    hooks: Hooks,
    map: Mirror<u32, abi::Edge>,
    sources: Mirror<EdgeSourceKey, abi::Edge>,
    macs: Macs,
    source_networks: Vec<IpNet>,
    rules: Rules,
    xdp: XdpMode,
    masquerade_all: bool,
    sockets: Option<PathBuf>,
    /// Why the socket programs could not be put back.
    sockets_failed: Option<String>,
    state: StateFile,
    reattached: Reattached,
    netlink: rtnetlink::Handle,
    /// What this process put on a hook.
    attached: BTreeMap<(u32, Place), Attached>,
    /// Some of it since this was asked last.
    served_more: bool,
    /// What could not be put on a hook, and when it is worth trying again.
    failures: BTreeMap<(u32, Place), Failure>,
    /// What may not be on its hook any more.
    doubts: Doubts,
    /// Who knows the drivers' XDP features; `None`: the kernel does not tell.
    netdev: Option<Netdev>,
    /// What predecessors left behind is gone.
    swept: bool,
    /// Programs before ours that were logged.
    told_before: BTreeSet<(Place, Vec<String>)>,
    /// What was logged about a device.
    told: BTreeMap<u32, String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Attached {
    Xdp(XdpKind),
    Tc,
}

#[derive(Clone, Debug)]
struct Failure {
    message: String,
    device: Device,
    since: Instant,
}

impl Follower {
    /// Brings hooks and map in line with `devices`.
    async fn settle(&mut self, devices: &[Device]) -> View {
        let roles = classify(devices, &self.rules);
        let mut wanted = BTreeSet::new();
        let (mut entries, mut sources) = (BTreeMap::new(), BTreeMap::new());
        let mut unserved = BTreeSet::new();
        let mut edges = Vec::new();
        for device in devices {
            let role = roles.get(&device.ifindex).copied().unwrap_or(Role::None(Why::NotListed));
            self.tell(device, role);
            match role {
                Role::None(Why::Down) => {
                    // Down is most often on the way up again; what is attached stays.
                    let stays = self.attached.keys().filter(|(ifindex, _)| *ifindex == device.ifindex);
                    let before = wanted.len();
                    wanted.extend(stays);
                    let entry = self.map.get(&device.ifindex).filter(|_| wanted.len() > before);
                    entries.extend(entry.map(|entry| (device.ifindex, entry)));
                    let indices = 0..entry.map_or(0, |entry: abi::Edge| entry.sources4.max(entry.sources6));
                    for key in indices.map(|n| EdgeSourceKey { ifindex: device.ifindex, index: n.into() }) {
                        sources.extend(self.sources.get(&key).map(|source| (key, source)));
                    }
                }
                Role::None(_) => {}
                Role::Pod => {
                    let note = self.attach_tc(device, [Place::PodIn, Place::PodOut], &mut wanted).await;
                    unserved.extend(note.as_ref().map(|_| device.ifindex));
                    edges.push(self.edge_view(device, "pod", None, note));
                }
                Role::External { addr4, addr6 } => {
                    self.macs.set(device.ifindex, own_mac(device));
                    let features = self.netdev.as_ref().and_then(|it| it.features(device.ifindex).ok());
                    if self.is_xdp_next(device, features) {
                        self.announce_xdp(device.ifindex, edge_entry(addr4, addr6, 0));
                    }
                    let tc_note = self.attach_tc(device, [Place::NicIn, Place::NicOut], &mut wanted).await;
                    let (xdp, xdp_note) = self.attach_xdp(device, features, &mut wanted);
                    let mut flags = if xdp.is_some() { edge_flags::XDP_FIRST } else { 0 };
                    if xdp_transmits(xdp, device, features) {
                        flags |= edge_flags::XDP_TRANSMIT;
                    }
                    let further = further_sources(device, addr4, addr6, &self.source_networks);
                    let mut entry = edge_entry(addr4, addr6, flags);
                    (entry.sources4, entry.sources6) = further.counts();
                    sources.extend(further.entries(device.ifindex));
                    entries.insert(device.ifindex, entry);
                    edges.push(self.edge_view(device, "external", xdp, tc_note.or(xdp_note)));
                }
            }
        }
        if self.masquerade_all {
            // Flows to the pods that have no room keep their source.
            let room = (MAX_EDGES as usize).saturating_sub(entries.len());
            let ways = ways_to_pods(devices, &roles, &unserved).into_iter().take(room);
            entries.extend(ways.map(|(i, (addr4, addr6))| (i, edge_entry(addr4, addr6, edge_flags::POD))));
        }
        // tc believes in XDP for as long as it is there.
        let mut until_detached = entries.clone();
        for (ifindex, entry) in &mut until_detached {
            let before = self.map.get(ifindex).map_or(0, |entry| entry.flags);
            entry.flags |= before & edge_flags::XDP_FIRST;
        }
        // An edge counts its further sources: they come before it, and go after it.
        self.sources.extend(&sources);
        self.map.extend(&until_detached);
        self.map.retain(&until_detached);
        self.detach_all_but(&wanted).await;
        self.map.extend(&entries);
        self.sources.retain(&sources);
        self.failures.retain(|(ifindex, _), _| roles.contains_key(ifindex));
        self.told.retain(|ifindex, _| roles.contains_key(ifindex));
        View { addresses: local_addresses(devices), edges }
    }

    async fn attach_tc(
        &mut self,
        device: &Device,
        places: [Place; 2],
        wanted: &mut BTreeSet<(u32, Place)>,
    ) -> Option<String> {
        let mut note = None;
        for place in places {
            let key = (device.ifindex, place);
            wanted.insert(key);
            if self.attached.contains_key(&key) {
                continue;
            }
            if let Some(failure) = self.failed_lately(key, device) {
                note = Some(failure);
                continue;
            }
            let result = if self.hooks.tcx() {
                self.hooks.attach_tcx(device.ifindex, place).map(drop)
            } else {
                self.attach_clsact(device, place).await
            };
            match result {
                Ok(()) => {
                    self.attached.insert(key, Attached::Tc);
                    self.served_more = true;
                    self.failures.remove(&key);
                    tracing::debug!(device = device.name, program = place.program(), "attached");
                    self.tell_order(device, place);
                }
                Err(error) => note = Some(self.fail(key, device, &error)),
            }
        }
        note
    }

    async fn attach_clsact(&mut self, device: &Device, place: Place) -> Result<(), AttachError> {
        let made = self.hooks.attach_clsact(&self.netlink, device.ifindex, place).await?;
        if made && let Err(error) = self.state.update(|state| state.clsact.extend([device.ifindex])) {
            tracing::warn!(device = device.name, %error, "cleanup will leave the clsact qdisc of this device");
        }
        Ok(())
    }

    /// How XDP runs on a device; if it does not, why.
    fn attach_xdp(
        &mut self,
        device: &Device,
        features: Option<XdpFeatures>,
        wanted: &mut BTreeSet<(u32, Place)>,
    ) -> (Option<XdpKind>, Option<String>) {
        let kind = match xdp_kind(self.xdp, device, features) {
            Ok(kind) => kind,
            Err(why) => return (None, Some(why.into())),
        };
        let key = (device.ifindex, Place::Xdp);
        match self.attached.get(&key) {
            Some(Attached::Xdp(attached)) if *attached == kind => {
                wanted.insert(key);
                return (Some(kind), None);
            }
            _ => {}
        }
        if let Some(failure) = self.failed_lately(key, device) {
            return (None, Some(failure));
        }
        match self.hooks.attach_xdp(device.ifindex, kind, device.xdp) {
            Ok(_) => {
                wanted.insert(key);
                self.attached.insert(key, Attached::Xdp(kind));
                self.failures.remove(&key);
                tracing::info!(device = device.name, kind = ?kind, "XDP attached");
                (Some(kind), None)
            }
            Err(error) => (None, Some(self.fail(key, device, &error))),
        }
    }

    fn failed_lately(&self, key: (u32, Place), device: &Device) -> Option<String> {
        let failure = self.failures.get(&key)?;
        let same = failure.device == *device && failure.since.elapsed() < RETRY;
        same.then(|| failure.message.clone())
    }

    /// One warning for each failure, however often it comes back.
    fn fail(&mut self, key: (u32, Place), device: &Device, error: &AttachError) -> String {
        let message = error.to_string();
        let known = self.failures.get(&key).is_some_and(|failure| failure.message == message);
        if !device_exists(key.0) {
            tracing::debug!(device = device.name, error = message, "it has left meanwhile");
        } else if key.1 == Place::Xdp && self.xdp == XdpMode::Auto {
            if !known {
                tracing::info!(device = device.name, reason = message, "no XDP here; tc does it");
            }
        } else if !known && key.1 == Place::Xdp {
            tracing::warn!(device = device.name, error = message, "XDP cannot run here; tc does it");
        } else if !known {
            tracing::warn!(device = device.name, error = message, "an edge is not served");
        }
        let failure = Failure { message: message.clone(), device: device.clone(), since: Instant::now() };
        self.failures.insert(key, failure);
        message
    }

    /// Detaches what is no edge any more, and at first what predecessors left behind.
    async fn detach_all_but(&mut self, wanted: &BTreeSet<(u32, Place)>) {
        let tcx = self.hooks.tcx();
        let mut links: BTreeSet<(u32, Place)> = BTreeSet::new();
        let mut filters: BTreeSet<(u32, Place)> = BTreeSet::new();
        for (key, attached) in &self.attached {
            let of_kind = if *attached == Attached::Tc && !tcx { &mut filters } else { &mut links };
            of_kind.insert(*key);
        }
        links.retain(|key| !wanted.contains(key));
        filters.retain(|key| !wanted.contains(key));
        if !self.swept {
            let linked = |key: &(u32, Place)| wanted.contains(key) && (tcx || key.1 == Place::Xdp);
            let filtered = |key: &(u32, Place)| wanted.contains(key) && !tcx;
            match (self.hooks.pinned(), self.hooks.filters(&self.netlink).await) {
                (Ok(pinned), Ok(found)) => {
                    links.extend(pinned.iter().map(|(place, i)| (*i, *place)).filter(|key| !linked(key)));
                    filters.extend(found.iter().map(|(place, i)| (*i, *place)).filter(|key| !filtered(key)));
                    self.swept = true;
                }
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%error, "cannot see what an earlier agent left behind");
                }
            }
        }
        for key in links {
            match self.hooks.detach(key.0, key.1) {
                Ok(_) => {
                    self.attached.remove(&key);
                    tracing::debug!(ifindex = key.0, program = key.1.program(), "detached");
                }
                Err(error) => tracing::warn!(%error, "cannot detach"),
            }
        }
        for key in filters {
            match self.hooks.detach_clsact(&self.netlink, key.0, key.1).await {
                Ok(()) => {
                    if !tcx {
                        self.attached.remove(&key);
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot remove a tc filter"),
            }
        }
    }

    /// Whether XDP is about to run on a device, or does.
    fn is_xdp_next(&self, device: &Device, features: Option<XdpFeatures>) -> bool {
        xdp_kind(self.xdp, device, features).is_ok()
            && self.failed_lately((device.ifindex, Place::Xdp), device).is_none()
    }

    /// Before XDP translates the first packet, tc must know that it comes second.
    fn announce_xdp(&mut self, ifindex: u32, entry: abi::Edge) {
        let mut entry = self.map.get(&ifindex).unwrap_or(entry);
        entry.flags |= edge_flags::XDP_FIRST;
        self.map.set(ifindex, entry);
    }

    fn edge_view(
        &self,
        device: &Device,
        role: &'static str,
        xdp: Option<XdpKind>,
        note: Option<String>,
    ) -> EdgeView {
        EdgeView {
            ifindex: device.ifindex,
            device: device.name.clone(),
            role,
            tc: if self.hooks.tcx() { "tcx" } else { "clsact" },
            xdp,
            note,
        }
    }

    /// Each decision about a device is logged once.
    fn tell(&mut self, device: &Device, role: Role) {
        let text = match role {
            Role::External { addr4, addr6 } => format!("external edge, sources {addr4} {addr6}"),
            Role::Pod => "pod edge".to_owned(),
            Role::None(why) => format!("no edge: {why}"),
        };
        let line = format!("{}: {text}", device.name);
        if self.told.get(&device.ifindex) != Some(&line) {
            match role {
                Role::External { .. } => tracing::info!(device = device.name, "{text}"),
                Role::Pod | Role::None(_) => tracing::debug!(device = device.name, "{text}"),
            }
            self.told.insert(device.ifindex, line);
        }
    }
}

/// How XDP shall run on a device, or why it shall not.
fn xdp_kind(mode: XdpMode, device: &Device, features: Option<XdpFeatures>) -> Result<XdpKind, &'static str> {
    match (mode, features) {
        (XdpMode::Off, _) => Err("--xdp=off"),
        (XdpMode::Generic, _) => Ok(XdpKind::Generic),
        (XdpMode::Auto, Some(features)) if !features.basic => Err("the driver has no XDP"),
        // `veth_xdp_flush` wakes a peer that runs an XDP program. To any other, what XDP sends is lost, or lies
        // there for seconds (GRO); and which it is cannot be seen from here.
        (XdpMode::Auto, _) if device.kind == "veth" => Err(
            "a veth delivers what XDP sends only to a peer with an XDP program; --xdp=native if it has one",
        ),
        // With an offload of theirs, drivers take tags off before XDP sees a frame: it would send the answers of all
        // VLANs into none. tc sees tags wherever they are.
        (XdpMode::Auto, _) if device.vlans => Err(
            "VLAN devices stand on it; --xdp=native if its driver leaves tags to XDP (`ethtool -K DEVICE rxvlan off`)",
        ),
        (XdpMode::Native | XdpMode::Auto, _) => Ok(XdpKind::Native),
    }
}

/// Whether XDP programs of other devices may send through this one. Without knowledge tc does it, and for a veth.
fn xdp_transmits(xdp: Option<XdpKind>, device: &Device, features: Option<XdpFeatures>) -> bool {
    xdp == Some(XdpKind::Native)
        && device.kind != "veth"
        && features.is_some_and(|features| features.transmit)
}

fn edge_entry(addr4: Ipv4Addr, addr6: Ipv6Addr, flags: u32) -> abi::Edge {
    let (addr4, addr6) = (Addr4 { octets: addr4.octets() }, Addr6 { octets: addr6.octets() });
    abi::Edge { addr4, addr6, flags, ..abi::Edge::default() }
}

/// The one Ethernet address that frames for this node have at a device; zeroes where there may be more: a bond balances
/// with those of its ports, and what comes in by a bridge's port may be for the bridge.
fn own_mac(device: &Device) -> Mac {
    let one = device.master.is_none() && !matches!(device.kind.as_str(), "bond" | "team");
    Mac { octets: device.mac.filter(|_| one).unwrap_or_default() }
}

/// Sorted, without duplicates.
fn local_addresses(devices: &[Device]) -> Vec<LocalAddress> {
    let mut addresses: Vec<LocalAddress> = devices
        .iter()
        .flat_map(|device| {
            device.addresses.iter().map(|address| LocalAddress {
                addr: address.addr,
                device: device.name.clone(),
                loopback: address.addr.is_loopback(),
                global: address.global,
            })
        })
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_runs_where_it_can_send() {
        let nic = Device { name: "eth0".into(), ..Device::default() };
        let veth = Device { kind: "veth".into(), ..nic.clone() };
        let trunk = Device { vlans: true, ..nic.clone() };
        let all = Some(XdpFeatures { basic: true, transmit: true });
        let basic = Some(XdpFeatures { basic: true, transmit: false });
        let none = Some(XdpFeatures { basic: false, transmit: false });
        let native = Ok(XdpKind::Native);
        for (device, features, expected) in [
            (&nic, all, true),
            (&nic, basic, true),
            (&nic, none, false),
            (&nic, None, true),
            (&veth, all, false),
            (&veth, basic, false),
            (&veth, None, false),
            (&trunk, all, false),
            (&trunk, None, false),
        ] {
            let chosen = xdp_kind(XdpMode::Auto, device, features);
            assert_eq!(chosen.is_ok(), expected, "{} {features:?}", device.kind);
            assert_eq!(xdp_kind(XdpMode::Native, device, features), native);
            assert_eq!(xdp_kind(XdpMode::Generic, device, features), Ok(XdpKind::Generic));
            assert!(xdp_kind(XdpMode::Off, device, features).is_err());
        }
        assert!(xdp_transmits(Some(XdpKind::Native), &nic, all));
        assert!(!xdp_transmits(Some(XdpKind::Native), &veth, all));
        assert!(!xdp_transmits(Some(XdpKind::Native), &nic, basic));
        assert!(!xdp_transmits(Some(XdpKind::Native), &nic, None));
        assert!(!xdp_transmits(Some(XdpKind::Generic), &nic, all));
        assert!(!xdp_transmits(None, &nic, all));
    }
}
