//! From events to map operations: model, compile, reconcile, apply.

mod queue;
mod restored;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use lb_common::abi::address_flags;
use tracing::field::display;

use self::queue::{Queue, Waiting};
use self::restored::Restored;
use super::check::{Check, Slice};
use super::lifeline::Lifeline;
use crate::compile::{Facts, compile, compile_pod};
use crate::datapath::{ApplyError, MapError, Maps};
use crate::entries::{HealthCheck, Op};
use crate::events::Events;
use crate::finding::Finding;
use crate::health::{Health, HealthPorts};
use crate::metrics::{Metrics, News, Size};
use crate::model::{Model, Node, Touched};
use crate::owner::Owner;
use crate::reconcile::{Batch, Desired, Reconciler};
use crate::source::{Event, Kind, Unlisted};

/// How long windows and ids that fell out of use stay untouched. A packet holds on to them for
/// microseconds.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// How long a Service is left alone that the maps refused, the first time and at most.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_AT_MOST: Duration = Duration::from_mins(5);

/// Findings of one Service that are told one by one.
const TOLD: usize = 10;

/// Repairs that are told one by one, of one round over the maps.
const REPAIRS_TOLD: usize = 10;

/// How much was done; tests compare it with the size of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Services compiled.
    pub compiled: u64,
    /// Map operations carried out.
    pub ops: u64,
    /// Times that the maps were read back.
    pub read: u64,
}

/// The maps refused a Service.
#[derive(Clone, Copy, Debug)]
struct Refused {
    again: Instant,
    pause: Duration,
}

/// Keeps the maps as the model says.
#[expect(clippy::struct_excessive_bools, reason = "independent facts about what is known and written")]
pub struct Agent<M> {
    model: Model,
    facts: Facts,
    maps: M,
    reconciler: Reconciler,
    health: Health,
    ports: HealthPorts,
    metrics: Metrics,
    events: Option<Events>,
    unlisted: Unlisted,
    /// As long as the model is what was kept.
    restored: Option<Restored>,
    /// Kinds that the source cannot be asked about, and since when there are any.
    silent: BTreeSet<Kind>,
    silent_since: Option<Timestamp>,
    lifeline: Option<Lifeline>,
    /// Grows with every change of the model.
    revision: u64,
    /// How many objects of a kind cannot be read.
    unreadable: BTreeMap<Option<Kind>, usize>,
    /// Flags of the node's own addresses; `None`: not known yet.
    addresses: Option<BTreeMap<IpAddr, u32>>,
    /// The addresses are not what the maps have.
    addresses_changed: bool,
    /// `--cluster-cidr`; none: those that the Node object names.
    pod_networks: Option<Vec<IpNet>>,
    /// Every ServiceCIDR has been told once.
    cidrs_listed: bool,
    /// The networks are not what the maps have.
    networks_changed: bool,
    /// Services and Pods to compile again.
    pending: BTreeSet<Owner>,
    /// What they come to, on its way to the maps.
    queue: Queue,
    /// Those that the maps refused, and when to try again.
    refused: BTreeMap<Owner, Refused>,
    /// The same by time.
    retries: BTreeSet<(Instant, Owner)>,
    /// What is stale has not been removed yet.
    unfinished: bool,
    /// Everything has been written once since the maps were read.
    loaded: bool,
    /// The maps may not be what `reconciler` thinks: read them again, not before this time.
    doubtful: Option<Instant>,
    /// Looks whether somebody else has changed the maps.
    check: Option<Check>,
    /// Repairs since the round over the maps began.
    repairs: usize,
    /// What was said of each Service and Pod.
    said: BTreeMap<Owner, BTreeSet<Finding>>,
    stats: Stats,
}

impl<M: Maps> Agent<M> {
    /// Takes over the maps as they are. Nothing is written before [`Agent::settle`].
    pub fn new(facts: Facts, mut maps: M, health: Health) -> Result<Self, MapError> {
        let reconciler = Reconciler::adopt(maps.read()?, maps.limits(), GRACE);
        Ok(Self {
            model: Model::new(facts.node_name.clone()),
            facts,
            maps,
            reconciler,
            metrics: Metrics::new(&health),
            ports: HealthPorts::new(health.clone()),
            health,
            events: None,
            unlisted: Unlisted::default(),
            restored: None,
            silent: BTreeSet::new(),
            silent_since: None,
            lifeline: None,
            revision: 0,
            unreadable: BTreeMap::new(),
            addresses: None,
            addresses_changed: false,
            pod_networks: Some(vec![]),
            cidrs_listed: false,
            networks_changed: false,
            pending: BTreeSet::new(),
            queue: Queue::default(),
            refused: BTreeMap::new(),
            retries: BTreeSet::new(),
            unfinished: true,
            loaded: false,
            doubtful: None,
            check: None,
            repairs: 0,
            said: BTreeMap::new(),
            stats: Stats { read: 1, ..Stats::default() },
        })
    }

    /// Notes what it does in these metrics.
    pub fn observe(&mut self, metrics: Metrics) {
        metrics.note_found(self.reconciler.unclaimed_ids());
        self.metrics = metrics;
    }

    /// Tells the API server, too, what is wrong with Services.
    pub fn report(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// The API server is asked at this address: if it is a Service's, it keeps endpoints.
    pub fn reach_by(&mut self, addr: SocketAddr) {
        self.lifeline = Some(Lifeline::new(addr));
    }

    /// Compares the maps with what they should hold, all of them once in a period, and mends them.
    pub fn check_maps_every(&mut self, period: Duration, now: Instant) {
        self.check = (!period.is_zero()).then(|| Check::every(period, now));
    }

    /// Takes an event. `true`: the Node object changed.
    pub fn take(&mut self, event: Event, now: Instant) -> bool {
        match event {
            Event::Answers(kind, answers) => {
                self.note_answers(kind, answers);
                false
            }
            event if self.restored.is_some() => self.set_aside(event, now),
            event => self.believe(event, now),
        }
    }

    fn note_answers(&mut self, kind: Kind, answers: bool) {
        if answers {
            self.silent.remove(&kind);
        } else if Kind::ALL.contains(&kind) {
            self.silent.insert(kind);
        }
        let since = self.silent_since.unwrap_or_else(Timestamp::now);
        self.silent_since = (!self.silent.is_empty()).then_some(since);
        self.note_freshness();
    }

    fn note_node(&mut self) {
        self.facts.zone = self.model.node().and_then(|node| node.zone.clone());
        let leaving = |node: &Node| node.deleting || node.to_be_deleted;
        self.health.note_node(self.model.node().map(leaving));
    }

    fn believe(&mut self, event: Event, now: Instant) -> bool {
        match event {
            Event::Changed(change) => {
                let news = News::from(&change);
                let touched = self.model.apply(change);
                self.networks_changed |= touched.service_cidrs || touched.node;
                self.addresses_changed |= touched.peers;
                self.revision += u64::from(touched != Touched::default());
                if touched.node {
                    self.note_node();
                }
                let mut owners = touched.owners().peekable();
                if owners.peek().is_some() {
                    self.metrics.work().note_change(news);
                    if self.loaded {
                        self.health.note_waiting(now);
                    }
                }
                self.pending.extend(owners);
                touched.node
            }
            Event::Listed(kind) => {
                if kind == Kind::ServiceCidrs && !self.cidrs_listed {
                    self.cidrs_listed = true;
                    self.networks_changed = true;
                    self.revision += 1;
                }
                self.unlisted.note(kind);
                false
            }
            Event::Refused(kind) => {
                self.unlisted.note(kind);
                false
            }
            Event::Unreadable(kind, count) => {
                let before = self.unreadable.insert(kind, count).unwrap_or_default();
                self.metrics.work().note_findings(before, count);
                false
            }
            // Taken already.
            Event::Answers(..) => false,
        }
    }

    /// These are the node's own addresses, with their flags.
    pub fn set_addresses(&mut self, flags: BTreeMap<IpAddr, u32>) {
        if self.addresses.as_ref() != Some(&flags) {
            self.addresses = Some(flags);
            self.addresses_changed = true;
        }
    }

    /// Answers load balancers on these addresses.
    pub fn listen_on(&mut self, addresses: BTreeSet<IpAddr>) {
        self.ports.listen_on(addresses);
    }

    /// Pods have their addresses in these networks, on other nodes too; none: in those that the Node object names.
    pub fn set_pod_networks(&mut self, networks: Option<Vec<IpNet>>) {
        self.pod_networks = networks;
        self.networks_changed = true;
    }

    /// The Node object of this node.
    pub fn node(&self) -> Option<&Node> {
        self.model.node()
    }

    /// What has not been listed yet.
    pub fn unlisted(&self) -> &Unlisted {
        &self.unlisted
    }

    /// What is wrong, and with whom.
    pub fn findings(&self) -> impl Iterator<Item = (&Owner, &Finding)> {
        self.said.iter().flat_map(|(owner, findings)| findings.iter().map(move |finding| (owner, finding)))
    }

    /// What was told to whoever asks how the agent is.
    pub fn health(&self) -> &Health {
        &self.health
    }

    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// How often the reconciler looked at a Service since the maps were read.
    pub fn visited(&self) -> u64 {
        self.reconciler.visited()
    }

    /// The maps, for tests.
    pub fn maps(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Brings the maps up to date, as far as everything is known that they depend on.
    pub fn settle(&mut self, now: Instant) {
        if self.addresses.is_none() || !(self.unlisted.is_empty() || self.is_due(now)) {
            return;
        }
        self.begin_with_kept();
        let (before, start) = (self.stats, Instant::now());
        let mut patience = 3;
        while let Err(error) = self.try_to_settle(now) {
            patience -= 1;
            let again = if patience > 0 { now } else { now + RETRY };
            self.doubtful = Some(again);
            tracing::error!(%error, "the maps refused; they are read again and repaired");
            if patience == 0 {
                self.health.note_waiting(now);
                return;
            }
        }
        if let Err(error) = self.check_maps(now) {
            tracing::error!(%error, "the maps cannot be checked; they are read again and repaired");
            self.doubtful = Some(now + RETRY);
        }
        let (services, operations) = (self.stats.compiled - before.compiled, self.stats.ops - before.ops);
        if services > 0 || operations > 0 {
            tracing::debug!(services, operations, took = ?start.elapsed(), "settled");
            self.metrics.work().note_sync(start.elapsed());
        }
        let size = Size {
            services: self.reconciler.services() as u64,
            frontends: self.reconciler.frontends() as u64,
            unfit: self.reconciler.unfit() as u64,
            maps: self.reconciler.fill(),
        };
        let complete = self.doubtful.is_none() && self.refused.is_empty() && self.unlisted.is_empty();
        self.metrics.note_settled(size, complete);
        self.note_freshness();
    }

    /// When [`Agent::settle`] has something to do without an event.
    pub fn next_wake(&self) -> Option<Instant> {
        self.addresses.as_ref()?;
        match &self.restored {
            Some(restored) if !restored.written => return Some(restored.due),
            None if !self.unlisted.is_empty() => return None,
            _ => {}
        }
        let retry = self.retries.first().map(|(again, _)| *again);
        let check = self.check.as_ref().filter(|_| self.is_certain()).map(Check::due);
        let wakes = [self.doubtful, self.reconciler.next_expiry(), self.ports.next_retry(), retry, check];
        wakes.into_iter().flatten().min()
    }

    fn try_to_settle(&mut self, now: Instant) -> Result<(), Trouble> {
        if let Some(again) = self.doubtful {
            if now < again {
                return Ok(());
            }
            self.read_again()?;
        }
        if !self.loaded {
            self.announce_all();
        }
        if self.addresses_changed || !self.loaded {
            self.settle_addresses(now)?;
        }
        if self.networks_changed || !self.loaded {
            self.settle_networks(now)?;
        }
        let batch = self.reconciler.expire(now);
        self.carry_out(batch, None, now)?;
        while self.retries.first().is_some_and(|(again, _)| *again <= now) {
            self.pending.extend(self.retries.pop_first().map(|(_, name)| name));
        }
        while let Some(name) = self.pending.pop_first() {
            self.settle_service(&name, now)?;
            if self.queue.is_full() {
                self.flush(now)?;
            }
        }
        self.flush(now)?;
        for name in self.ports.settle(now).into_iter().map(Owner::Service) {
            let told = self.said.get(&name).into_iter().flatten().cloned().collect();
            self.say(&name, told);
        }
        self.loaded = true;
        // What is stale may be of a Service that was refused.
        if self.unfinished && self.refused.is_empty() && self.unlisted.is_empty() {
            let ops = self.reconciler.finish(now);
            self.apply(&ops, None, now)?;
            self.unfinished = false;
        }
        if !self.health.is_synced() {
            let (services, frontends) = (self.reconciler.services(), self.reconciler.frontends());
            tracing::info!(services, frontends, operations = self.stats.ops, "ready");
        }
        self.health.note_synced();
        Ok(())
    }

    /// The maps are what the reconciler thinks, and nothing else is in them: unless somebody else writes there.
    fn is_certain(&self) -> bool {
        self.loaded && !self.unfinished && self.doubtful.is_none()
    }

    /// Compares the next slice of the maps with what they should hold.
    fn check_maps(&mut self, now: Instant) -> Result<(), Trouble> {
        let certain = self.is_certain();
        let Some(check) = self.check.as_mut().filter(|check| check.due() <= now) else { return Ok(()) };
        if !certain {
            check.begin_again(now);
            return Ok(());
        }
        let start = Instant::now();
        let Slice { ops, entries, round } =
            check.slice(&self.reconciler, &mut self.maps, now).map_err(Trouble::Read)?;
        for op in &ops {
            self.tell_repair(op);
        }
        self.apply(&ops, None, now)?;
        self.metrics.work().note_check(entries, start.elapsed());
        if let Some(took) = round {
            if self.repairs > REPAIRS_TOLD {
                tracing::warn!("and {} more entries of the maps", self.repairs - REPAIRS_TOLD);
            }
            self.repairs = 0;
            self.metrics.work().note_check_round(took);
        }
        Ok(())
    }

    fn tell_repair(&mut self, op: &Op) {
        let map = op.map();
        self.metrics.work().note_repair(map);
        self.repairs += 1;
        if self.repairs > REPAIRS_TOLD {
            return;
        }
        let owner = self.reconciler.whose(op);
        let service = owner.and_then(Owner::service).map(display);
        let pod = owner.and_then(Owner::pod).map(display);
        let entry = op.subject();
        if self.reconciler.holds(op) {
            tracing::warn!(map, service, pod, "{entry}: somebody removed or changed it; it is written again");
        } else {
            tracing::warn!(map, "{entry}: somebody put it there, and nobody wants it; it is removed");
        }
    }

    fn settle_service(&mut self, name: &Owner, now: Instant) -> Result<(), Trouble> {
        if self.refused.get(name).is_some_and(|refused| refused.again > now) {
            return Ok(());
        }
        let Some((desired, mut findings)) = self.desired(name) else {
            self.accept(name);
            let said = self.said.remove(name).map_or(0, |findings| findings.len());
            self.metrics.work().note_findings(said, 0);
            self.metrics.forget_service(name);
            self.want_health(name, None);
            let batch = self.reconciler.remove_service(name, now);
            self.flush(now)?;
            return self.carry_out(batch, Some(name), now);
        };
        if desired.compiled.frontends.is_empty() {
            self.metrics.forget_service(name);
            self.want_health(name, None);
            let batch = self.reconciler.remove_service(name, now);
            self.flush(now)?;
            self.carry_out(batch, Some(name), now)?;
            self.accept(name);
            self.say(name, findings);
            return Ok(());
        }
        let health = desired.compiled.health;
        if let Some(service) = name.service() {
            self.metrics.note_policies(service, &desired.compiled);
        }
        let mut batch = self.reconciler.set_service(name, desired, now);
        // Before the maps have it, so that nothing is counted for whoever had its number before.
        if let Some(id) = self.reconciler.service_id(name) {
            self.metrics.note_service(name, id);
        }
        findings.extend(batch.findings.remove(name).unwrap_or_default());
        self.say(name, findings);
        self.say_of_others(batch.findings);
        let waiting = Waiting { owner: name.clone(), health };
        if !self.queue.takes(&batch.ops) {
            self.flush(now)?;
            self.apply(&batch.ops, Some(name), now)?;
            self.note_settled(waiting);
            return Ok(());
        }
        self.queue.push(batch.ops, waiting);
        Ok(())
    }

    /// Carries out what waits.
    fn flush(&mut self, now: Instant) -> Result<(), Trouble> {
        let (ops, whose, waiting) = self.queue.take();
        let owner = |done: usize| Some(&waiting.get(*whose.get(done)?)?.owner);
        self.apply_of(&ops, owner, now)?;
        for waiting in waiting {
            self.note_settled(waiting);
        }
        Ok(())
    }

    /// The maps are as a Service or Pod wants them.
    fn note_settled(&mut self, Waiting { owner, health }: Waiting) {
        self.accept(&owner);
        self.want_health(&owner, health);
        if let Some(service) = owner.service() {
            self.metrics.work().note_programmed(service);
        }
    }

    /// What load balancers may ask about a Service.
    fn want_health(&mut self, name: &Owner, check: Option<HealthCheck>) {
        if let Some(service) = name.service() {
            self.ports.want(service, check);
        }
    }

    /// What an owner means; none: it is gone.
    fn desired(&mut self, name: &Owner) -> Option<(Desired, Vec<Finding>)> {
        let desired = self.compiled(name);
        let Some(lifeline) = &mut self.lifeline else { return desired };
        let (desired, former) = lifeline.keep(name, desired);
        self.metrics.note_held(lifeline.is_held());
        self.pending.extend(former);
        desired
    }

    fn compiled(&mut self, name: &Owner) -> Option<(Desired, Vec<Finding>)> {
        let (created, (compiled, findings)) = match name {
            Owner::Service(name) => {
                let service = self.model.service(name)?;
                let slices: Vec<_> = self.model.slices(name).collect();
                (service.created, compile(service, &slices, &self.facts))
            }
            Owner::Pod(name) => {
                let pod = self.model.pod(name)?;
                (pod.created, compile_pod(pod))
            }
        };
        self.stats.compiled += 1;
        Some((Desired { created, compiled }, findings))
    }

    /// Before the first Service is written, all of them say what they claim.
    fn announce_all(&mut self) {
        let held = self.lifeline.as_ref().and_then(Lifeline::owner).cloned();
        let names: BTreeSet<Owner> = self.model.owners().chain(held).collect();
        let names = names.into_iter().filter(|name| !self.refused.contains_key(name)).collect::<Vec<_>>();
        for name in names {
            if let Some((desired, _)) = self.desired(&name) {
                self.reconciler.announce(&name, &desired);
            }
            self.pending.insert(name);
        }
    }

    fn settle_addresses(&mut self, now: Instant) -> Result<(), Trouble> {
        let Some(mut addresses) = self.addresses.clone() else { return Ok(()) };
        if self.facts.mode.is_some() {
            for addr in self.model.peers().values().flatten() {
                addresses.entry(*addr).or_insert(address_flags::PEER);
            }
            let ops = self.reconciler.set_peers(self.model.peers().clone());
            self.apply(&ops, None, now)?;
        }
        let (ops, findings) = self.reconciler.set_node_addresses(&addresses);
        for finding in findings {
            tracing::warn!("this node: {finding}");
        }
        self.apply(&ops, None, now)?;
        let batch = self.reconciler.review_sources(now);
        self.carry_out(batch, None, now)?;
        self.addresses_changed = false;
        Ok(())
    }

    fn settle_networks(&mut self, now: Instant) -> Result<(), Trouble> {
        let services: Vec<IpNet> = self.model.service_cidrs().collect();
        let services = self.cidrs_listed.then_some(&services[..]);
        let of_node = || self.model.node().map(|node| node.pod_cidrs.clone()).unwrap_or_default();
        let pods = self.pod_networks.clone().unwrap_or_else(of_node);
        let (ops, findings) = self.reconciler.set_networks(&pods, services);
        for finding in findings {
            tracing::warn!("this node: {finding}");
        }
        self.apply(&ops, None, now)?;
        self.networks_changed = false;
        Ok(())
    }

    fn carry_out(&mut self, batch: Batch, name: Option<&Owner>, now: Instant) -> Result<(), Trouble> {
        self.apply(&batch.ops, name, now)?;
        self.say_of_others(batch.findings);
        Ok(())
    }

    /// Says what is wrong with Services that the change of another one concerns, too.
    fn say_of_others(&mut self, findings: BTreeMap<Owner, Vec<Finding>>) {
        for (name, findings) in findings {
            let told = self.said.get(&name).into_iter().flatten();
            let own = told.filter(|finding| !finding.is_of_maps()).cloned();
            let findings = own.chain(findings).collect();
            self.say(&name, findings);
        }
    }

    /// The Service or Pod is refused no longer; answers how long it was left alone.
    fn accept(&mut self, name: &Owner) -> Option<Duration> {
        let refused = self.refused.remove(name)?;
        self.retries.remove(&(refused.again, name.clone()));
        Some(refused.pause)
    }

    fn apply(&mut self, ops: &[Op], name: Option<&Owner>, now: Instant) -> Result<(), Trouble> {
        self.apply_of(ops, |_| name, now)
    }

    /// Carries out operations of several Services; `whose` tells whose each of them is.
    fn apply_of<'a>(
        &mut self,
        ops: &[Op],
        whose: impl Fn(usize) -> Option<&'a Owner>,
        now: Instant,
    ) -> Result<(), Trouble> {
        if ops.is_empty() {
            return Ok(());
        }
        match self.maps.apply(ops) {
            Ok(()) => {
                self.stats.ops += ops.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.stats.ops += error.done as u64;
                let name = whose(error.done);
                if let Some(name) = name {
                    let pause = self.accept(name).map_or(RETRY, |pause| (pause * 2).min(RETRY_AT_MOST));
                    self.refused.insert(name.clone(), Refused { again: now + pause, pause });
                    self.retries.insert((now + pause, name.clone()));
                }
                Err(Trouble::Apply { owner: name.cloned(), error })
            }
        }
    }

    /// The maps are not what was thought: begins afresh with what they are.
    fn read_again(&mut self) -> Result<(), Trouble> {
        let snapshot = self.maps.read().map_err(Trouble::Read)?;
        self.stats.read += 1;
        self.queue = Queue::default();
        self.reconciler = Reconciler::adopt(snapshot, self.maps.limits(), GRACE);
        self.metrics.note_found(self.reconciler.unclaimed_ids());
        self.doubtful = None;
        self.loaded = false;
        self.unfinished = true;
        Ok(())
    }

    /// Says what is wrong with a Service or Pod, as far as it is news.
    fn say(&mut self, name: &Owner, findings: Vec<Finding>) {
        let of_object = findings.into_iter().filter(|finding| !matches!(finding, Finding::HealthPort { .. }));
        let of_port = name.service().and_then(|service| self.ports.finding(service)).cloned();
        let findings: BTreeSet<Finding> = of_object.chain(of_port).collect();
        let (service, pod) = (name.service().map(display), name.pod().map(display));
        let known = self.said.remove(name).unwrap_or_default();
        let news: Vec<&Finding> = findings.difference(&known).collect();
        for finding in news.iter().take(TOLD) {
            tracing::warn!(service, pod, "{finding}");
            if let (Some(events), Some(name)) = (&mut self.events, name.service()) {
                events.tell(name, self.model.service(name).map_or("", |service| &service.uid), finding);
            }
        }
        if news.len() > TOLD {
            tracing::warn!(service, pod, "and {} more like these", news.len() - TOLD);
        }
        self.metrics.work().note_findings(known.len(), findings.len());
        if findings.is_empty() && !known.is_empty() {
            tracing::info!(service, pod, "nothing is wrong any more");
        }
        if !findings.is_empty() {
            self.said.insert(name.clone(), findings);
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{}{error}", owner.as_ref().map(|name| format!("{name}: ")).unwrap_or_default())]
    Apply { owner: Option<Owner>, error: ApplyError },
    #[error(transparent)]
    Read(MapError),
}

#[cfg(test)]
mod tests;
