//! An agent that starts with what was kept of an earlier one, and turns to what its source says once that is complete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;

use super::Agent;
use crate::datapath::Maps;
use crate::health::Freshness;
use crate::model::{Change, Objects};
use crate::owner::Owner;
use crate::source::{Event, Kind};

/// The model is what was kept: the source has not told everything.
#[derive(Debug)]
pub(super) struct Restored {
    /// So long the source may take before what was kept is written.
    pub(super) due: Instant,
    /// When it was kept.
    saved: Timestamp,
    pub(super) written: bool,
    /// What the source has told last about each subject. All of it counts at once: half of a list says nothing about the
    /// other half.
    told: BTreeMap<Subject, Event>,
}

/// What an event is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Subject {
    Object(Kind, Arc<str>, Arc<str>),
    /// Whether a kind has been listed, or may not be.
    List(Kind),
    Unreadable(Option<Kind>),
    Answers(Kind),
}

impl From<&Event> for Subject {
    fn from(event: &Event) -> Self {
        let named = |kind, name: &str| Self::Object(kind, Arc::default(), name.into());
        let spaced = |kind, namespace: &Arc<str>, name: &Arc<str>| {
            Self::Object(kind, Arc::clone(namespace), Arc::clone(name))
        };
        match event {
            Event::Changed(change) => match change {
                Change::Service(service) => {
                    spaced(Kind::Services, &service.name.namespace, &service.name.name)
                }
                Change::ServiceGone(name) => spaced(Kind::Services, &name.namespace, &name.name),
                Change::Slice(slice) => spaced(Kind::EndpointSlices, &slice.name.namespace, &slice.name.name),
                Change::SliceGone(name) => spaced(Kind::EndpointSlices, &name.namespace, &name.name),
                Change::Pod(pod) => spaced(Kind::Pods, &pod.name.namespace, &pod.name.name),
                Change::PodGone(name) => spaced(Kind::Pods, &name.namespace, &name.name),
                Change::Node(node) => named(Kind::Nodes, &node.name),
                Change::NodeGone(name) => named(Kind::Nodes, name),
                Change::ServiceCidr(name, _) | Change::ServiceCidrGone(name) => {
                    named(Kind::ServiceCidrs, name)
                }
            },
            Event::Listed(kind) | Event::Refused(kind) => Self::List(*kind),
            Event::Unreadable(kind, _) => Self::Unreadable(*kind),
            Event::Answers(kind, _) => Self::Answers(*kind),
        }
    }
}

impl<M: Maps> Agent<M> {
    /// Begins with what was kept at `saved`. If the source has not told everything at `due`, that is written; nothing is
    /// removed before it has.
    pub fn restore(&mut self, objects: &Objects, saved: Timestamp, due: Instant) {
        for change in objects.changes() {
            self.model.apply(change);
        }
        self.cidrs_listed = objects.service_cidrs.is_some();
        self.note_node();
        self.restored = Some(Restored { due, saved, written: false, told: BTreeMap::new() });
        self.note_freshness();
        // Its endpoints may be gone already when the source tells of them.
        let Some(addr) = self.lifeline.as_ref().map(|lifeline| lifeline.key().addr) else { return };
        let serves = |name: &Owner| {
            let service = name.service().and_then(|name| self.model.service(name));
            service.is_some_and(|service| service.cluster_ips.contains(&addr))
        };
        let owners: Vec<Owner> = self.model.owners().filter(serves).collect();
        for owner in owners {
            self.desired(&owner);
        }
    }

    /// Takes an event as long as what was kept counts. `true`: the Node object changed.
    pub(super) fn set_aside(&mut self, event: Event, now: Instant) -> bool {
        let Some(restored) = &mut self.restored else { return false };
        if let Event::Listed(kind) | Event::Refused(kind) = event {
            self.unlisted.note(kind);
        }
        let subject = Subject::from(&event);
        // Most of what is told is what was kept, and need not be in memory twice.
        if matches!(&event, Event::Changed(change) if self.model.has(change)) {
            restored.told.remove(&subject);
        } else {
            restored.told.insert(subject, event);
        }
        if !self.unlisted.is_empty() {
            return false;
        }
        let Some(restored) = self.restored.take() else { return false };
        let mut told: Vec<Event> = restored.told.into_values().collect();
        if told.contains(&Event::Refused(Kind::Pods)) {
            // As without anything kept: what nobody may know of is not served.
            let pods = self.model.owners().filter_map(|owner| owner.pod().cloned());
            told.extend(pods.map(|pod| Event::Changed(Change::PodGone(pod))));
        }
        let node = told.into_iter().fold(false, |node, event| self.believe(event, now) | node);
        if restored.written {
            let changed = self.pending.len();
            tracing::info!(changed, "everything has been listed; what was kept has been replaced");
        }
        node
    }

    /// How old what is served may be.
    pub fn freshness(&self) -> Freshness {
        match (&self.restored, self.silent_since) {
            (Some(restored), _) => Freshness::Kept(restored.saved),
            (None, Some(since)) => Freshness::Unanswered(since),
            (None, None) => Freshness::Current,
        }
    }

    /// Notes how old what is served may be.
    pub(super) fn note_freshness(&self) {
        self.health.note_freshness(self.freshness());
        self.metrics.note_stale(!self.unlisted.is_empty() || self.silent_since.is_some());
    }

    /// It is time to do without the source.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.restored.as_ref().is_some_and(|restored| restored.due <= now)
    }

    /// What was kept is about to be written.
    pub(super) fn begin_with_kept(&mut self) {
        let Some(restored) = self.restored.as_mut().filter(|restored| !restored.written) else { return };
        restored.written = true;
        let (saved, unlisted) = (restored.saved, &self.unlisted);
        tracing::warn!(%saved, %unlisted, "not everything has been listed yet: what was kept is served");
    }

    /// Whether what the model knows is worth keeping.
    pub fn is_complete(&self) -> bool {
        self.unlisted.is_empty() && !self.lifeline.as_ref().is_some_and(super::Lifeline::is_held)
    }

    /// What to keep, and its number.
    pub fn state(&self) -> Option<(Objects, u64)> {
        self.is_complete().then(|| (self.model.objects(self.cidrs_listed), self.revision))
    }

    /// Grows with every change of what there is to keep.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}
