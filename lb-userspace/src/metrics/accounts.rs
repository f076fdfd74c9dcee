//! Whose counts are whose: `USAGE` counts by id, ids change hands, and only so many Services have metrics
//! of their own. No exported number ever goes backwards while its Service exists.

use std::collections::BTreeMap;

use lb_common::abi::Usage;
use lb_common::maps::MAX_USAGES;

use crate::entries::ServiceName;
use crate::owner::Owner;

/// The books.
#[derive(Debug)]
pub(super) struct Accounts {
    limit: usize,
    own: usize,
    open: BTreeMap<Owner, Account>,
    /// What Services without metrics of their own counted, gone ones included.
    others: Usage,
    /// Of index 0, which Services beyond [`MAX_USAGES`] share.
    shared_seen: Usage,
}

#[derive(Debug, Default)]
struct Account {
    id: u32,
    /// It has metrics of its own, and this is what they say.
    own: Option<Usage>,
    /// What the map said when it was last looked at.
    seen: Usage,
}

impl Accounts {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, own: 0, open: BTreeMap::new(), others: Usage::default(), shared_seen: Usage::default() }
    }

    /// The id under which the Service is counted.
    pub(super) fn id(&self, name: &Owner) -> Option<u32> {
        self.open.get(name).map(|account| account.id)
    }

    /// The Service is counted under `id` from now on, from 0 or from what the map has.
    pub(super) fn assign(&mut self, name: &Owner, id: u32) {
        let account = self.open.entry(name.clone()).or_default();
        account.id = id;
        account.seen = Usage::default();
    }

    /// The map says `now` of the Service.
    pub(super) fn credit(&mut self, name: &Owner, id: u32, now: Usage) {
        // Meanwhile the id may have become another's.
        let Some(account) = self.open.get_mut(name).filter(|account| account.id == id && id < MAX_USAGES)
        else {
            return;
        };
        add(account.own.as_mut().unwrap_or(&mut self.others), account.seen, now);
        account.seen = now;
    }

    /// The map says `now` of all Services that share index 0.
    pub(super) fn credit_shared(&mut self, now: Usage) {
        add(&mut self.others, self.shared_seen, now);
        self.shared_seen = now;
    }

    /// The Service is gone.
    pub(super) fn close(&mut self, name: &Owner) {
        if self.open.remove(name).is_some_and(|account| account.own.is_some()) {
            self.own -= 1;
        }
    }

    /// Services and Pods that are counted one by one, with their ids.
    pub(super) fn counted(&self) -> Vec<(Owner, u32)> {
        let counted = self.open.iter().filter(|(_, account)| account.id < MAX_USAGES);
        counted.map(|(name, account)| (name.clone(), account.id)).collect()
    }

    /// Free places go to the Services, not Pods, with the most connections, for as long as these exist: one that came
    /// and went would let the sum of the others go backwards.
    pub(super) fn promote(&mut self, read: &[(Owner, u32, Usage)]) {
        let mut free = self.limit.saturating_sub(self.own);
        if free == 0 {
            return;
        }
        let waits = |name: &Owner| {
            name.service().is_some() && self.open.get(name).is_some_and(|account| account.own.is_none())
        };
        let mut waiting: Vec<_> = read.iter().filter(|(name, _, _)| waits(name)).collect();
        waiting.sort_by(|(a, _, x), (b, _, y)| y.connections.cmp(&x.connections).then_with(|| a.cmp(b)));
        for (name, id, _) in waiting {
            if free == 0 {
                return;
            }
            if let Some(account) = self.open.get_mut(name).filter(|account| account.id == *id) {
                account.own = Some(Usage::default());
                self.own += 1;
                free -= 1;
            }
        }
    }

    /// Namespace, name and counts of every Service with metrics of its own, then of all others together.
    pub(super) fn rows(&self) -> Vec<(ServiceName, Usage)> {
        let own =
            self.open.iter().filter_map(|(name, account)| Some((name.service()?.clone(), account.own?)));
        let others = ServiceName { namespace: "".into(), name: "(other)".into() };
        own.chain([(others, self.others)]).collect()
    }
}

/// Adds what was counted between `seen` and `now`. A map that says less has been made anew.
fn add(total: &mut Usage, seen: Usage, now: Usage) {
    let since = |seen: u64, now: u64| if now >= seen { now - seen } else { now };
    total.connections += since(seen.connections, now.connections);
    total.packets += since(seen.packets, now.packets);
    total.bytes += since(seen.bytes, now.bytes);
    total.refused += since(seen.refused, now.refused);
}
