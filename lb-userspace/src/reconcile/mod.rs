//! Desired entries against what is in the maps -> an ordered list of map operations.
//!
//! The order keeps every packet from meeting a dangling reference: removed addresses and frontends first; then new
//! backends, their windows, the frontends that switch to them; then what nobody refers to any more. A window
//! is never written while a frontend refers to it. Windows and backend ids that became free are given out
//! again only after a grace time, so that a packet that read the old frontend finds what it expects.
//!
//! A Service here is whatever has frontends: one of Kubernetes, or a Pod with host ports ([`Owner`]).
//!
//! Only the Services of a change are looked at; nothing here walks all of them, except [`Reconciler::adopt`]
//! and [`Reconciler::finish`] at the start.

mod addresses;
mod adopt;
mod backends;
mod check;
mod claims;
mod install;
mod maglev;
mod members;
mod names;
mod networks;
mod places;
mod ranges;
mod sources;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::addresses::Addresses;
use self::adopt::NOWHERE;
use self::backends::{Backends, Settled};
pub use self::check::Spot;
use self::claims::{Claimed, ServiceIds};
use self::install::Removals;
use self::members::Members;
use self::names::Names;
pub use self::places::Peers;
use self::places::Places;
use self::ranges::Ranges;
use self::sources::Sources;
use crate::entries::{
    Algorithm, Backend, Compiled, Family, Frontend, FrontendKey, Keep, Limits, Op, Protocol, Snapshot,
};
use crate::finding::Finding;
use crate::owner::Owner;
use ipnet::IpNet;
use lb_common::abi;

/// What one Service should have in the maps.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// Seconds since 1970; of two Services that claim one frontend the older has it.
    pub created: i64,
    pub compiled: Compiled,
}

/// What [`Reconciler`] wants written, and what it has to say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Batch {
    /// To be carried out in this order.
    pub ops: Vec<Op>,
    /// Of every Service that was looked at.
    pub findings: BTreeMap<Owner, Vec<Finding>>,
}

/// The maps as they are, and who needs what in them.
#[derive(Debug)]
pub struct Reconciler {
    limits: Limits,
    grace: Duration,
    services: BTreeMap<Owner, Service>,
    /// Services that did not fit when last looked at.
    unfit: BTreeSet<Owner>,
    /// There is room since: they get another try.
    retry: Option<Retry>,
    /// Who claims a frontend, the first in line first.
    claims: BTreeMap<FrontendKey, Vec<(i64, Owner)>>,
    installed: BTreeMap<FrontendKey, Installed>,
    /// How many of `installed` are of IPv6.
    installed_v6: u32,
    windows: BTreeMap<u32, Window>,
    space: Ranges,
    backends: [Backends; 2],
    ids: ServiceIds,
    addresses: Addresses,
    /// Numbers of Service ports.
    ports: ServiceIds,
    members: Members,
    names: Names,
    /// `NETWORKS4` and `NETWORKS6` as they are.
    networks: [Vec<(IpNet, u32)>; 2],
    sources: Sources,
    places: Places,
    /// Services with source ranges: they care about the node's addresses.
    restricted: BTreeSet<Owner>,
    retired: VecDeque<(Instant, Retired)>,
    /// How often a Service was looked at.
    visited: u64,
}

#[derive(Debug)]
struct Service {
    id: u32,
    created: i64,
    /// What it should have, in the order of the keys. Slices instead of maps: most Services have one or two.
    frontends: Box<[(FrontendKey, Frontend)]>,
    /// Backends whose flows it wants kept.
    to_keep: Box<[(Backend, Keep)]>,
    /// Numbers of its ports that have frontends.
    ports: BTreeMap<(u16, Protocol), u32>,
    /// Who may ask for its restricted frontends.
    sources: BTreeMap<Family, BTreeSet<IpNet>>,
    /// Frontends of its own in the maps, sorted.
    keys: Vec<FrontendKey>,
    /// Backends whose flows are kept.
    kept: BTreeMap<Backend, Keep>,
}

impl Service {
    fn add_key(&mut self, key: FrontendKey) {
        if let Err(place) = self.keys.binary_search(&key) {
            self.keys.insert(place, key);
        }
    }

    fn remove_key(&mut self, key: &FrontendKey) {
        if let Ok(place) = self.keys.binary_search(key) {
            self.keys.remove(place);
        }
    }
}

#[derive(Debug)]
struct Installed {
    entry: abi::Service,
    /// None: found in the maps, not yet anybody's.
    owner: Option<Owner>,
}

/// A range of `SLOTS` that frontends refer to.
#[derive(Debug)]
struct Window {
    len: u32,
    family: Family,
    /// Scopes of frontends that refer to it.
    refs: u32,
    /// Each backend once.
    ids: Vec<u32>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Known(Choices),
    /// Found in the maps: these ids.
    Slots(Vec<u32>),
    /// Found in the maps, and not to be relied on.
    Foreign,
}

/// What decides the content of a window.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Choices {
    algorithm: Algorithm,
    backends: Arc<[Backend]>,
}

#[derive(Clone, Copy, Debug)]
enum Retired {
    Window {
        base: u32,
        len: u32,
    },
    Backend {
        family: Family,
        id: u32,
        retired: Instant,
    },
    ServiceId(u32),
    Port(u32),
    /// Room in a map that needs no grace.
    Room,
}

/// Which Services that did not fit are looked at again.
#[derive(Debug)]
struct Retry {
    /// So many.
    left: usize,
    /// Those behind this one, then from the first on.
    after: Option<Owner>,
    at: Instant,
}

/// Services that are looked at again at a time, and the pause until the next: full maps shall not keep changes waiting.
const TRIES: usize = 32;
const TRY_PAUSE: Duration = Duration::from_millis(100);

/// Operations of one Service, in the order they go to the maps.
#[derive(Default)]
struct Steps {
    remove: Vec<Op>,
    backends: Vec<Op>,
    windows: Vec<Op>,
    sources: Vec<Op>,
    names: Vec<Op>,
    frontends: Vec<Op>,
    addresses: Vec<Op>,
    retire: Vec<Op>,
    /// Addresses to settle when all is said.
    touched: BTreeSet<IpAddr>,
    findings: Vec<Finding>,
}

impl Steps {
    fn into_batch(self, batch: &mut Batch) {
        let Self { remove, backends, windows, sources, names, frontends, addresses, retire, .. } = self;
        // While a Service's address is there its ports answer, with a reject at least: with the address first all of
        // them go at once, and last they come.
        let (gone, known): (Vec<Op>, Vec<Op>) =
            addresses.into_iter().partition(|op| matches!(op, Op::RemoveAddress { .. }));
        for ops in [gone, remove, backends, windows, sources, names, frontends, known, retire] {
            batch.ops.extend(ops);
        }
    }
}

impl Reconciler {
    /// Takes over maps that hold `snapshot`. Nothing is written: what Services turn out to want stays, the
    /// rest goes with [`Self::finish`].
    pub fn adopt(snapshot: Snapshot, limits: Limits, grace: Duration) -> Self {
        let mut this = Self {
            limits,
            grace,
            services: BTreeMap::new(),
            unfit: BTreeSet::new(),
            retry: None,
            claims: BTreeMap::new(),
            installed: BTreeMap::new(),
            installed_v6: 0,
            windows: BTreeMap::new(),
            space: Ranges::new(limits.slots),
            backends: [
                Backends::new(Family::V4, limits.backends),
                Backends::new(Family::V6, limits.backends),
            ],
            ids: ServiceIds::default(),
            addresses: Addresses::new(limits.addresses, snapshot.addresses.clone()),
            ports: ServiceIds::default(),
            members: Members::new(limits.members, snapshot.members.clone()),
            names: Names::new(limits.services, snapshot.names.clone()),
            networks: snapshot.networks.clone(),
            sources: Sources::new(limits.sources, snapshot.sources.clone()),
            places: Places::new(snapshot.places.clone()),
            restricted: BTreeSet::new(),
            retired: VecDeque::new(),
            visited: 0,
        };
        this.adopt_windows(&snapshot);
        this.note_backends();
        for (key, mut entry) in snapshot.frontends {
            for window in [&mut entry.internal, &mut entry.external] {
                if !this.is_sound(*window) {
                    *window = NOWHERE;
                }
            }
            this.ids.adopt(entry.id);
            this.ports.adopt(entry.port);
            this.count_installed(key, 1);
            this.installed.insert(key, Installed { entry, owner: None });
        }
        this
    }

    /// Notes the frontends that a Service is going to claim. At the start all Services are announced before
    /// the first is set, so that none takes a frontend that turns out to be another's.
    pub fn announce(&mut self, name: &Owner, desired: &Desired) {
        self.claim(name, desired);
    }

    /// This is what the Service should have from now on.
    pub fn set_service(&mut self, name: &Owner, desired: Desired, now: Instant) -> Batch {
        let Claimed { heirs, rivals } = self.claim(name, &desired);
        let id = self.services.get(name).map(|service| service.id);
        let id = id.unwrap_or_else(|| self.identify(name, &desired.compiled));
        let Desired { created, compiled } = desired;
        let service = self.services.entry(name.clone()).or_insert_with(|| Service {
            id,
            created,
            frontends: Box::default(),
            to_keep: Box::default(),
            ports: BTreeMap::new(),
            sources: BTreeMap::new(),
            keys: Vec::new(),
            kept: BTreeMap::new(),
        });
        service.created = created;
        service.frontends = compiled.frontends.into_iter().collect();
        service.to_keep = compiled.kept.into_iter().collect();
        service.sources = compiled.sources;
        self.places.note_homes(compiled.homes);
        if service.sources.is_empty() {
            self.restricted.remove(name);
        } else {
            self.restricted.insert(name.clone());
        }
        let mut batch = Batch::default();
        // Whoever gets a frontend overwrites it before the other would remove it.
        for heir in &heirs {
            self.install(heir, Removals::Later, now, &mut batch);
        }
        self.install(name, Removals::Now, now, &mut batch);
        for other in heirs.union(&rivals) {
            self.install(other, Removals::Now, now, &mut batch);
        }
        batch
    }

    /// The Service is gone.
    pub fn remove_service(&mut self, name: &Owner, now: Instant) -> Batch {
        if !self.services.contains_key(name) {
            return Batch::default();
        }
        let mut batch = self.set_service(name, Desired::default(), now);
        if let Some(service) = self.services.remove(name) {
            self.retire(Retired::ServiceId(service.id), now);
        }
        self.unfit.remove(name);
        batch.findings.remove(name);
        batch
    }

    /// These are the node's own addresses with their flags ([`abi::address_flags`]). An address that does
    /// not fit is answered as a finding.
    pub fn set_node_addresses(&mut self, flags: &BTreeMap<IpAddr, u32>) -> (Vec<Op>, Vec<Finding>) {
        let changed = self.addresses.set_node(flags);
        let mut ops = vec![];
        let findings = self.settle_addresses(changed, &mut ops);
        (ops, findings)
    }

    /// These are the other nodes of the cluster, which tunnel packets to this one.
    pub fn set_peers(&mut self, peers: Peers) -> Vec<Op> {
        if !self.places.has_begun() {
            self.places.begin(self.backends.iter().flat_map(Backends::assigned));
        }
        self.places.set_peers(peers);
        self.places.take_ops()
    }

    /// Looks again at the Services that admit the node or not: to be called when its addresses have changed.
    pub fn review_sources(&mut self, now: Instant) -> Batch {
        let mut batch = Batch::default();
        for name in self.restricted.clone() {
            self.install(&name, Removals::Now, now, &mut batch);
        }
        batch
    }

    /// Every Service and node address has been set once: what the maps hold beyond that is stale.
    pub fn finish(&mut self, now: Instant) -> Vec<Op> {
        let mut steps = Steps::default();
        let stale: Vec<_> =
            self.installed.iter().filter(|(_, i)| i.owner.is_none()).map(|(key, _)| *key).collect();
        let mut left = vec![];
        for key in stale {
            left.extend(self.uninstall(key, &mut steps));
        }
        let touched = std::mem::take(&mut steps.touched).into_iter().chain(self.addresses.finish());
        let touched: BTreeSet<IpAddr> = touched.collect();
        // What lacks room was told with its Service.
        self.settle_addresses(touched, &mut steps.addresses);
        self.leave_windows(left, now, &mut steps);
        for family in [Family::V4, Family::V6] {
            for id in self.backends_mut(family).finish() {
                self.settle_backend(family, id, now, &mut steps.retire);
            }
        }
        self.places.finish();
        steps.retire.extend(self.places.take_ops());
        let known: BTreeSet<u32> = self.services.values().map(|service| service.id).collect();
        steps.retire.extend(self.sources.finish(&known));
        steps.retire.extend(self.names.finish());
        let retired = |base: u32| {
            self.retired
                .iter()
                .any(|(_, r)| matches!(r, Retired::Window { base: other, .. } if *other == base))
        };
        let windows = &self.windows;
        let is_window = |base: u32| windows.contains_key(&base) || retired(base);
        steps.retire.extend(self.members.finish(is_window));
        for id in std::mem::take(&mut self.ports.found) {
            self.retire(Retired::Port(id), now);
        }
        for id in std::mem::take(&mut self.ids.found) {
            self.retire(Retired::ServiceId(id), now);
        }
        let mut batch = Batch::default();
        steps.into_batch(&mut batch);
        batch.ops
    }

    /// Frees what has been out of use for the grace time, and gives Services that did not fit another try.
    pub fn expire(&mut self, now: Instant) -> Batch {
        let mut batch = Batch::default();
        let mut freed = false;
        while let Some((due, retired)) = self.retired.front().copied()
            && due <= now
        {
            self.retired.pop_front();
            freed = true;
            match retired {
                Retired::Window { base, len } => {
                    batch.ops.extend(self.members.set(base, BTreeSet::new()));
                    self.space.give(base, len);
                }
                Retired::Backend { family, id, retired } => {
                    batch.ops.extend(self.backends_mut(family).release(id, retired));
                }
                Retired::ServiceId(id) => self.ids.give(id),
                Retired::Port(id) => self.ports.give(id),
                Retired::Room => {}
            }
        }
        let touched = self.note_backends();
        batch.ops.extend(self.places.take_ops());
        // Nothing is added here that could lack room.
        self.settle_addresses(touched, &mut batch.ops);
        if freed && !self.unfit.is_empty() {
            let after = self.retry.take().and_then(|retry| retry.after);
            self.retry = Some(Retry { left: self.unfit.len(), after, at: now });
        }
        self.try_again(now, &mut batch);
        batch
    }

    /// Looks again at some of the Services that did not fit.
    fn try_again(&mut self, now: Instant, batch: &mut Batch) {
        let Some(Retry { left, after, .. }) = self.retry.take_if(|retry| retry.at <= now) else { return };
        let tries = TRIES.min(left).min(self.unfit.len());
        let behind = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut names: Vec<Owner> =
            self.unfit.range((behind, Bound::Unbounded)).take(tries).cloned().collect();
        names.extend(self.unfit.iter().take(tries - names.len()).cloned());
        for name in &names {
            self.install(name, Removals::Now, now, batch);
        }
        if left > tries && tries > 0 {
            self.retry = Some(Retry { left: left - tries, after: names.pop(), at: now + TRY_PAUSE });
        }
    }

    /// When [`Self::expire`] has something to do.
    pub fn next_expiry(&self) -> Option<Instant> {
        let due = self.retired.front().map(|(due, _)| *due);
        due.into_iter().chain(self.retry.as_ref().map(|retry| retry.at)).min()
    }

    /// Services that do not fit, whole or in part.
    pub fn unfit(&self) -> usize {
        self.unfit.len()
    }

    /// The Service that has this number in the maps.
    pub fn service_ids(&self) -> impl Iterator<Item = (u32, &Owner)> {
        self.services.iter().map(|(name, service)| (service.id, name))
    }

    /// The number of a Service in the maps.
    pub fn service_id(&self, name: &Owner) -> Option<u32> {
        self.services.get(name).map(|service| service.id)
    }

    /// Numbers that frontends in the maps have and no Service has claimed yet.
    pub fn unclaimed_ids(&self) -> BTreeSet<u32> {
        self.ids.found.clone()
    }

    /// Name, entries in use and entries there is room for, of the maps that are arrays.
    pub fn fill(&self) -> [(&'static str, u64, u64); 3] {
        let [v4, v6] = [Family::V4, Family::V6].map(|family| {
            let backends = self.backends(family);
            (backends.used().into(), backends.limit().into())
        });
        // Index 0 is nobody's.
        let slots = u64::from(self.limits.slots.saturating_sub(1)).saturating_sub(self.space.available());
        [("BACKENDS4", v4.0, v4.1), ("BACKENDS6", v6.0, v6.1), ("SLOTS", slots, self.limits.slots.into())]
    }

    /// How often a Service was looked at since the maps were read; tests compare it with the size of a change.
    pub fn visited(&self) -> u64 {
        self.visited
    }

    /// Services of Kubernetes known, for status.
    pub fn services(&self) -> usize {
        let pods = self.services.keys().rev().take_while(|owner| owner.pod().is_some());
        self.services.len() - pods.count()
    }

    /// Frontends in the maps.
    pub fn frontends(&self) -> usize {
        self.installed.len()
    }

    /// Slots that are not in use.
    pub fn free_slots(&self) -> u64 {
        self.space.available()
    }
}

/// What taking over, installing and finishing have in common.
impl Reconciler {
    /// The frontend in the maps is nobody's from now on. Its address is for the caller to settle.
    fn disown(&mut self, key: FrontendKey) {
        let Some(installed) = self.installed.get_mut(&key) else { return };
        let Some(owner) = installed.owner.take() else { return };
        self.addresses.remove_frontend(key.addr, installed.entry.kind);
        if let Some(owner) = self.services.get_mut(&owner) {
            owner.remove_key(&key);
        }
    }

    /// Removes a frontend; answers the windows it referred to.
    fn uninstall(&mut self, key: FrontendKey, steps: &mut Steps) -> [abi::Window; 2] {
        self.disown(key);
        steps.touched.insert(key.addr);
        let Some(installed) = self.installed.remove(&key) else { return Default::default() };
        self.count_installed(key, -1);
        steps.remove.push(Op::RemoveFrontend { key });
        [installed.entry.internal, installed.entry.external]
    }

    /// Gives up references to windows; those that nobody refers to any more are retired.
    fn leave_windows(&mut self, left: Vec<abi::Window>, now: Instant, steps: &mut Steps) {
        for window in left.into_iter().filter(|window| window.len > 0) {
            // A window that overlapped others when it was found is part of a larger one now.
            let Some((base, have)) = self.windows.range_mut(..=window.base).next_back() else { continue };
            if u64::from(window.base) >= u64::from(*base) + u64::from(have.len) {
                continue;
            }
            have.refs -= 1;
            if have.refs > 0 {
                continue;
            }
            let base = *base;
            let Some(gone) = self.windows.remove(&base) else { continue };
            self.retire(Retired::Window { base, len: gone.len }, now);
            for id in gone.ids {
                self.backends_mut(gone.family).leave_window(id);
                self.settle_backend(gone.family, id, now, &mut steps.retire);
            }
        }
    }

    fn settle_backend(&mut self, family: Family, id: u32, now: Instant, ops: &mut Vec<Op>) {
        match self.backends_mut(family).settle(id, now) {
            Settled::Nothing => {}
            Settled::Write(op) => ops.push(op),
            Settled::Retired(op) => {
                ops.extend(op);
                self.retire(Retired::Backend { family, id, retired: now }, now);
            }
        }
    }

    /// Has the addresses of backends that came or went say so; answers them.
    fn note_backends(&mut self) -> BTreeSet<IpAddr> {
        let mut touched = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            for (backend, id, came) in self.backends_mut(family).take_changes() {
                self.places.note(&backend, id, came);
                if came {
                    self.addresses.add_backend(&backend);
                } else {
                    self.addresses.remove_backend(&backend);
                }
                touched.insert(backend.addr.ip());
            }
        }
        touched
    }

    fn settle_addresses(
        &mut self,
        addrs: impl IntoIterator<Item = IpAddr>,
        ops: &mut Vec<Op>,
    ) -> Vec<Finding> {
        let mut findings = vec![];
        for addr in addrs {
            match self.addresses.settle(addr) {
                Ok(op) => ops.extend(op),
                Err(addresses::Full) => {
                    findings.push(Finding::AddressDoesNotFit { addr, limit: self.addresses.limit() });
                }
            }
        }
        findings
    }

    fn retire(&mut self, what: Retired, now: Instant) {
        self.retired.push_back((now + self.grace, what));
    }

    fn count_installed(&mut self, key: FrontendKey, change: i32) {
        if key.addr.is_ipv6() {
            self.installed_v6 = self.installed_v6.saturating_add_signed(change);
        }
    }

    fn backends(&self, family: Family) -> &Backends {
        &self.backends[usize::from(family == Family::V6)]
    }

    fn backends_mut(&mut self, family: Family) -> &mut Backends {
        &mut self.backends[usize::from(family == Family::V6)]
    }
}

#[cfg(test)]
mod tests;
