//! What `SOURCES4/6` hold: who may ask for the restricted frontends of each Service.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::entries::{Family, Op};

/// The networks in the maps, by the number of the Service.
#[derive(Debug)]
pub(super) struct Sources {
    limit: u32,
    held: BTreeMap<u32, BTreeSet<IpNet>>,
    /// How many there are of each family.
    count: [u32; 2],
}

/// What has to be written: before the frontends that rely on it, and after them.
#[derive(Default)]
pub(super) struct Change {
    pub(super) before: Vec<Op>,
    pub(super) after: Vec<Op>,
}

impl Sources {
    /// `held`: what the maps hold already.
    pub(super) fn new(limit: u32, held: BTreeMap<u32, BTreeSet<IpNet>>) -> Self {
        let mut count = [0; 2];
        for net in held.values().flatten() {
            count[family(*net)] += 1;
        }
        Self { limit, held, count }
    }

    /// How many more of a family the Service needs, if there are too few: (needed, free).
    pub(super) fn lacks(&self, service: u32, wanted: &BTreeSet<IpNet>) -> Option<(u64, u64)> {
        let held = self.held.get(&service);
        [Family::V4, Family::V6].into_iter().find_map(|of| {
            let index = usize::from(of == Family::V6);
            let new = wanted.iter().filter(|net| family(**net) == index);
            let new = new.filter(|net| !held.is_some_and(|held| held.contains(*net))).count() as u64;
            let free = u64::from(self.limit.saturating_sub(self.count[index]));
            (new > free).then_some((new, free))
        })
    }

    /// These are the networks of the Service from now on.
    pub(super) fn set(&mut self, service: u32, wanted: BTreeSet<IpNet>) -> Change {
        let mut change = Change::default();
        let held = self.held.remove(&service).unwrap_or_default();
        for net in wanted.difference(&held) {
            self.count[family(*net)] += 1;
            change.before.push(Op::SetSource { service, net: *net });
        }
        for net in held.difference(&wanted) {
            self.count[family(*net)] -= 1;
            change.after.push(Op::RemoveSource { service, net: *net });
        }
        if !wanted.is_empty() {
            self.held.insert(service, wanted);
        }
        change
    }

    /// What the maps hold, after this Service and network, or from the Service on.
    pub(super) fn after(&self, service: u32, net: Option<IpNet>) -> impl Iterator<Item = Op> {
        let all = self.held.range(service..).flat_map(|(id, nets)| nets.iter().map(|net| (*id, *net)));
        let all = all.skip_while(move |(id, other)| *id == service && Some(*other) <= net);
        all.map(|(service, net)| Op::SetSource { service, net })
    }

    /// Whether the maps hold the network.
    pub(super) fn has(&self, service: u32, net: &IpNet) -> bool {
        self.held.get(&service).is_some_and(|nets| nets.contains(net))
    }

    /// Removes those of numbers that no Service has.
    pub(super) fn finish(&mut self, known: &BTreeSet<u32>) -> Vec<Op> {
        let stale: Vec<u32> = self.held.keys().filter(|id| !known.contains(id)).copied().collect();
        stale.into_iter().flat_map(|id| self.set(id, BTreeSet::new()).after).collect()
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }
}

fn family(net: IpNet) -> usize {
    usize::from(Family::of(net.addr()) == Family::V6)
}
