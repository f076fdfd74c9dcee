//! Bringing one Service into the maps: first a plan that finds a place for everything, or says that there is
//! none; then the operations, which cannot fail any more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Instant;

use ipnet::IpNet;
use lb_common::abi::{self, service_flags};

use super::{Batch, Choices, Content, Installed, Reconciler, Retired, Service, Steps, Window, maglev};
use crate::entries::{Algorithm, Family, Frontend, FrontendKey, Op, WhenEmpty};
use crate::finding::Finding;
use crate::owner::Owner;

/// When frontends that a Service lost are removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Removals {
    Now,
    /// It is looked at once more in the same batch.
    Later,
}

/// Does not fit; nothing was changed.
struct NoRoom(Finding);

/// Where everything of one Service goes.
#[derive(Default)]
struct Plan {
    windows: Vec<(Place, abi::Window)>,
    entries: BTreeMap<FrontendKey, abi::Service>,
    /// Windows of those with affinity.
    sticky: BTreeSet<u32>,
    /// Who may ask for the restricted ones.
    sources: BTreeSet<IpNet>,
}

struct Place {
    family: Family,
    choices: Choices,
    /// The window is new; otherwise it is in the maps.
    fresh: bool,
}

impl Reconciler {
    pub(super) fn install(&mut self, name: &Owner, removals: Removals, now: Instant, batch: &mut Batch) {
        let Some(mut service) = self.services.remove(name) else { return };
        self.visited += 1;
        let mut steps = Steps::default();
        let wanted = self.wanted(name, &service.frontends, &mut steps);
        self.unfit.remove(name);
        let mut removed: Vec<FrontendKey> = vec![];
        if removals == Removals::Now {
            removed.extend(service.keys.iter().filter(|key| !wanted.contains_key(key)));
        }
        self.number_ports(&mut service, &wanted);
        let planned = self.plan(&service, &wanted, &removed, None).or_else(|no_room| {
            self.unfit.insert(name.clone());
            // A list needs fewer slots than a table.
            let plan =
                self.plan(&service, &wanted, &removed, Some(Algorithm::Random)).map_err(|_| no_room)?;
            steps.findings.push(Finding::ListInsteadOfTable);
            Ok(plan)
        });
        match planned {
            Ok(plan) => self.carry_out(name, &mut service, plan, &removed, now, &mut steps),
            Err(NoRoom(finding)) => {
                steps.findings.push(finding);
                self.make_do(name, &mut service, &wanted, &removed, now, &mut steps);
            }
        }
        self.release_ports(&mut service, &wanted, now);
        if service.keys.is_empty() {
            steps.retire.extend(self.names.remove(service.id));
        } else {
            steps.names.extend(self.names.set(service.id, name));
        }
        self.services.insert(name.clone(), service);
        let mut touched = std::mem::take(&mut steps.touched);
        touched.append(&mut self.note_backends());
        steps.backends.extend(self.places.take_ops());
        let findings = self.settle_addresses(touched, &mut steps.addresses);
        if !findings.is_empty() {
            self.unfit.insert(name.clone());
        }
        steps.findings.extend(findings);
        batch.findings.insert(name.clone(), std::mem::take(&mut steps.findings));
        steps.into_batch(batch);
    }

    /// The frontends that are the Service's own.
    fn wanted(
        &self,
        name: &Owner,
        frontends: &[(FrontendKey, Frontend)],
        steps: &mut Steps,
    ) -> BTreeMap<FrontendKey, Frontend> {
        let mut wanted = BTreeMap::new();
        for (key, frontend) in frontends {
            match self.owner(key) {
                Some(owner) if owner != name => {
                    steps.findings.push(Finding::Taken { key: *key, owner: owner.clone() });
                }
                _ => {
                    wanted.insert(*key, frontend.clone());
                }
            }
        }
        wanted
    }

    /// Finds a place for everything. Takes the slots it needs, and changes nothing else.
    fn plan(
        &mut self,
        service: &Service,
        wanted: &BTreeMap<FrontendKey, Frontend>,
        removed: &[FrontendKey],
        algorithm: Option<Algorithm>,
    ) -> Result<Plan, NoRoom> {
        self.room_for_frontends(wanted, removed)?;
        let mut plan = Plan::default();
        let node_allowed = self.admit(service, wanted, &mut plan)?;
        for (key, frontend) in wanted {
            let algorithm = algorithm.unwrap_or(frontend.algorithm);
            let mut entry = abi::Service {
                id: service.id,
                flags: if algorithm == Algorithm::Maglev { service_flags::MAGLEV } else { 0 },
                kind: frontend.kind.number(),
                affinity: frontend.affinity,
                port: service.ports.get(&(frontend.port, key.protocol)).copied().unwrap_or_default(),
                ..abi::Service::default()
            };
            if frontend.source_kept {
                entry.flags |= service_flags::SOURCE_KEPT;
            }
            if frontend.dsr {
                entry.flags |= service_flags::DSR;
            }
            if frontend.restricted {
                entry.flags |= service_flags::SOURCE_RANGES;
                if node_allowed.contains(&Family::of(key.addr)) {
                    entry.flags |= service_flags::NODE_ALLOWED;
                }
            }
            for (target, window, drop) in [
                (&frontend.internal, &mut entry.internal, service_flags::INTERNAL_DROP),
                (&frontend.external, &mut entry.external, service_flags::EXTERNAL_DROP),
            ] {
                if target.backends.is_empty() {
                    if target.when_empty == WhenEmpty::Drop {
                        entry.flags |= drop;
                    }
                    continue;
                }
                let choices = Choices { algorithm, backends: target.backends.clone() };
                *window = match self.place(service, *key, &choices, &mut plan) {
                    Ok(window) => window,
                    Err(no_room) => {
                        self.abandon(&plan);
                        return Err(no_room);
                    }
                };
            }
            if entry.affinity > 0 {
                let windows = [entry.internal, entry.external];
                plan.sticky.extend(windows.iter().filter(|window| window.len > 0).map(|window| window.base));
            }
            plan.entries.insert(*key, entry);
        }
        if let Err(no_room) = self.room_for_backends(&plan).and_then(|()| self.room_for_members(&plan)) {
            self.abandon(&plan);
            return Err(no_room);
        }
        Ok(plan)
    }

    /// Who may ask for the restricted frontends, and of which families the node itself may. Packets of its own that
    /// come back to a load-balancer IP have that as source: where the node may ask, they may.
    fn admit(
        &self,
        service: &Service,
        wanted: &BTreeMap<FrontendKey, Frontend>,
        plan: &mut Plan,
    ) -> Result<BTreeSet<Family>, NoRoom> {
        let mut node_allowed = BTreeSet::new();
        for (family, ranges) in &service.sources {
            let restricted = wanted.iter().filter(|(_, frontend)| frontend.restricted);
            let mut addrs = restricted.map(|(key, _)| key.addr).filter(|addr| Family::of(*addr) == *family);
            let Some(first) = addrs.next() else { continue };
            plan.sources.extend(ranges);
            if self.addresses.is_node_within(ranges) {
                node_allowed.insert(*family);
                plan.sources.extend([first].into_iter().chain(addrs).map(IpNet::from));
            }
        }
        match self.sources.lacks(service.id, &plan.sources) {
            None => Ok(node_allowed),
            Some((need, free)) => {
                let limit = self.sources.limit().into();
                Err(NoRoom(Finding::NoRoomFor { what: "source ranges", need, free, limit }))
            }
        }
    }

    fn abandon(&mut self, plan: &Plan) {
        for (_, window) in plan.windows.iter().filter(|(place, _)| place.fresh) {
            self.space.give(window.base, window.len);
        }
    }

    /// A window with this content: one that this plan or the Service has already, or a new one.
    fn place(
        &mut self,
        service: &Service,
        key: FrontendKey,
        choices: &Choices,
        plan: &mut Plan,
    ) -> Result<abi::Window, NoRoom> {
        let family = Family::of(key.addr);
        let known =
            plan.windows.iter().find(|(place, _)| place.family == family && place.choices == *choices);
        if let Some((_, window)) = known {
            return Ok(*window);
        }
        let (window, fresh) = if let Some(window) = self.find_window(service, key, choices) {
            (window, false)
        } else {
            let len = choices.slots();
            let base = self.space.take(len).ok_or_else(|| {
                NoRoom(Finding::DoesNotFit {
                    what: "slots in a row",
                    need: len.into(),
                    free: self.space.available(),
                    limit: self.limits.slots.into(),
                    flag: "--max-backends",
                })
            })?;
            (abi::Window { base, len }, true)
        };
        plan.windows.push((Place { family, choices: choices.clone(), fresh }, window));
        Ok(window)
    }

    /// A window in the maps that has this content, among those the Service's frontends refer to.
    fn find_window(&self, service: &Service, key: FrontendKey, choices: &Choices) -> Option<abi::Window> {
        let of = |key: &FrontendKey| {
            let entry = self.installed.get(key)?.entry;
            Some([entry.internal, entry.external])
        };
        let own = of(&key).into_iter().flatten();
        let others = service.keys.iter().filter_map(of).flatten();
        own.chain(others).filter(|window| window.len > 0).find(|window| {
            self.windows.get(&window.base).is_some_and(|have| {
                have.family == Family::of(key.addr) && have.len == window.len && self.matches(have, choices)
            })
        })
    }

    fn matches(&self, window: &Window, choices: &Choices) -> bool {
        match &window.content {
            Content::Known(known) => known == choices,
            Content::Slots(slots) => {
                if window.len != choices.slots() || window.ids.len() != choices.backends.len() {
                    return false;
                }
                let ids = choices.backends.iter().map(|b| self.backends(window.family).id(b));
                let Some(ids) = ids.collect::<Option<Vec<_>>>() else { return false };
                choices.fill(&ids) == *slots
            }
            Content::Foreign => false,
        }
    }

    fn room_for_frontends(
        &self,
        wanted: &BTreeMap<FrontendKey, Frontend>,
        removed: &[FrontendKey],
    ) -> Result<(), NoRoom> {
        for family in [Family::V4, Family::V6] {
            let new = wanted.keys().filter(|key| !self.installed.contains_key(key));
            let new = count(new.filter(|key| Family::of(key.addr) == family));
            let old = count(removed.iter().filter(|key| Family::of(key.addr) == family));
            let held = match family {
                Family::V4 => self.installed.len() as u64 - u64::from(self.installed_v6),
                Family::V6 => self.installed_v6.into(),
            };
            let free = u64::from(self.limits.services).saturating_sub(held);
            if new > free + old {
                return Err(NoRoom(Finding::DoesNotFit {
                    what: "frontends",
                    need: new,
                    free,
                    limit: self.limits.services.into(),
                    flag: "--max-services",
                }));
            }
        }
        Ok(())
    }

    fn room_for_backends(&self, plan: &Plan) -> Result<(), NoRoom> {
        for family in [Family::V4, Family::V6] {
            let backends = self.backends(family);
            let fresh = plan.windows.iter().filter(|(place, _)| place.fresh && place.family == family);
            let new: BTreeSet<_> = fresh
                .flat_map(|(place, _)| &*place.choices.backends)
                .filter(|backend| backends.id(backend).is_none())
                .collect();
            let (need, free) = (new.len() as u64, u64::from(backends.available()));
            if need > free {
                return Err(NoRoom(Finding::DoesNotFit {
                    what: "backends",
                    need,
                    free,
                    limit: backends.limit().into(),
                    flag: "--max-backends",
                }));
            }
        }
        Ok(())
    }

    fn room_for_members(&self, plan: &Plan) -> Result<(), NoRoom> {
        let sticky = plan.windows.iter().filter(|(_, window)| plan.sticky.contains(&window.base));
        let need = sticky.map(|(place, window)| {
            place.choices.backends.len().saturating_sub(self.members.of_window(window.base)) as u64
        });
        let (need, free) = (need.sum(), self.members.available());
        if need > free {
            let limit = self.members.limit().into();
            return Err(NoRoom(Finding::NoRoomFor { what: "backends with affinity", need, free, limit }));
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        name: &Owner,
        service: &mut Service,
        plan: Plan,
        removed: &[FrontendKey],
        now: Instant,
        steps: &mut Steps,
    ) {
        // References to windows that frontends gave up.
        let mut left = vec![];
        for key in removed {
            service.remove_key(key);
            left.extend(self.uninstall(*key, steps));
        }
        let sources = self.sources.set(service.id, plan.sources);
        steps.sources.extend(sources.before);
        if !sources.after.is_empty() {
            steps.retire.extend(sources.after);
            self.retire(Retired::Room, now);
        }
        for (place, window) in plan.windows {
            self.fill_window(place, window, now, steps);
            if plan.sticky.contains(&window.base)
                && let Some(have) = self.windows.get(&window.base)
            {
                steps.windows.extend(self.members.set(window.base, have.ids.iter().copied().collect()));
            }
        }
        for (key, entry) in plan.entries {
            for window in [entry.internal, entry.external].iter().filter(|window| window.len > 0) {
                if let Some(window) = self.windows.get_mut(&window.base) {
                    window.refs += 1;
                }
            }
            if let Some(old) = self.installed.get(&key).map(|installed| installed.entry) {
                left.extend([old.internal, old.external]);
                if old != entry {
                    steps.frontends.push(Op::SetFrontend { key, entry });
                }
            } else {
                steps.frontends.push(Op::SetFrontend { key, entry });
            }
            self.replace(key, entry, name, service, steps);
        }
        let touched = self.keep(service, &left);
        self.leave_windows(left, now, steps);
        for (family, id) in touched {
            self.settle_backend(family, id, now, &mut steps.retire);
        }
    }

    /// There is no room: what is there stays as it is, except for frontends that are not wanted any more.
    fn make_do(
        &mut self,
        name: &Owner,
        service: &mut Service,
        wanted: &BTreeMap<FrontendKey, Frontend>,
        removed: &[FrontendKey],
        now: Instant,
        steps: &mut Steps,
    ) {
        let mut left = vec![];
        for key in removed {
            service.remove_key(key);
            left.extend(self.uninstall(*key, steps));
        }
        self.leave_windows(left, now, steps);
        for key in wanted.keys() {
            if self.installed.get(key).is_some_and(|installed| installed.owner.is_none()) {
                self.own(*key, name, service, steps);
            }
        }
    }

    /// Sees to it that a window of the plan is in the maps and its backends are active.
    fn fill_window(&mut self, place: Place, window: abi::Window, now: Instant, steps: &mut Steps) {
        let Place { family, choices, fresh } = place;
        if fresh {
            let backends = self.backends_mut(family);
            let ids: Vec<u32> = choices.backends.iter().filter_map(|b| backends.assign(*b)).collect();
            debug_assert_eq!(ids.len(), choices.backends.len(), "there was room for all of them");
            for id in &ids {
                backends.enter_window(*id);
            }
            steps.windows.push(Op::WriteSlots { base: window.base, slots: choices.fill(&ids) });
            let content = Content::Known(choices);
            self.windows.insert(window.base, Window { len: window.len, family, refs: 0, ids, content });
        } else if let Some(have) = self.windows.get_mut(&window.base) {
            if matches!(have.content, Content::Known(_)) {
                return;
            }
            have.content = Content::Known(choices);
        }
        let ids = self.windows.get(&window.base).map(|window| window.ids.clone()).unwrap_or_default();
        for id in ids {
            self.settle_backend(family, id, now, &mut steps.backends);
        }
    }

    /// `entry` is what the maps have at `key` from now on, and it is the Service's.
    fn replace(
        &mut self,
        key: FrontendKey,
        entry: abi::Service,
        name: &Owner,
        service: &mut Service,
        steps: &mut Steps,
    ) {
        self.disown(key);
        if self.installed.insert(key, Installed { entry, owner: None }).is_none() {
            self.count_installed(key, 1);
        }
        self.own(key, name, service, steps);
    }

    /// The frontend in the maps is the Service's from now on.
    fn own(&mut self, key: FrontendKey, name: &Owner, service: &mut Service, steps: &mut Steps) {
        let Some(installed) = self.installed.get_mut(&key) else { return };
        installed.owner = Some(name.clone());
        service.add_key(key);
        self.addresses.add_frontend(key.addr, installed.entry.kind);
        steps.touched.insert(key.addr);
    }

    /// Keeps what the Service wants kept, of the backends that it chose until now. Answers the backends
    /// concerned.
    fn keep(&mut self, service: &mut Service, left: &[abi::Window]) -> BTreeSet<(Family, u32)> {
        let mut touched = BTreeSet::new();
        let left = left.iter().filter(|window| window.len > 0);
        let left: BTreeSet<u32> = left.map(|window| window.base).collect();
        let left = left.iter().filter_map(|base| self.windows.get(base));
        let chosen: BTreeSet<(Family, u32)> =
            left.flat_map(|window| window.ids.iter().map(|id| (window.family, *id))).collect();
        let old = std::mem::take(&mut service.kept);
        for (backend, keep) in &service.to_keep {
            let family = Family::of(backend.addr.ip());
            let backends = self.backends_mut(family);
            let id = backends.id(backend);
            let id = id.filter(|id| old.contains_key(backend) || chosen.contains(&(family, *id)));
            if let Some(id) = id.or_else(|| backends.adopt_orphan(backend)) {
                backends.keep(id, *keep);
                service.kept.insert(*backend, *keep);
                touched.insert((family, id));
            }
        }
        for (backend, keep) in old {
            let family = Family::of(backend.addr.ip());
            let backends = self.backends_mut(family);
            if let Some(id) = backends.id(&backend) {
                backends.let_go(id, keep);
                touched.insert((family, id));
            }
        }
        touched
    }
}

impl Choices {
    /// How many slots they take.
    fn slots(&self) -> u32 {
        match self.algorithm {
            Algorithm::Random => u32::try_from(self.backends.len()).unwrap_or(u32::MAX),
            Algorithm::Maglev => maglev::table_len(self.backends.len()),
        }
    }

    /// The slots, if `ids` are those of the backends.
    pub(super) fn fill(&self, ids: &[u32]) -> Vec<u32> {
        match self.algorithm {
            Algorithm::Random => ids.to_vec(),
            Algorithm::Maglev => {
                let addrs: Vec<SocketAddr> = self.backends.iter().map(|backend| backend.addr).collect();
                maglev::table(&addrs).into_iter().filter_map(|i| ids.get(i as usize).copied()).collect()
            }
        }
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> u64 {
    items.count() as u64
}
