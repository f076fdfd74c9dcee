//! Who may have a frontend: of the Services that claim it the oldest, then the first by name. And which
//! number a Service has in the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::{Desired, Reconciler, Retired, Service};
use crate::entries::{Compiled, Frontend, FrontendKey, Protocol};
use crate::owner::Owner;

/// Who has to be looked at again when a Service changes its claims.
#[derive(Default)]
pub(super) struct Claimed {
    /// They may get a frontend that the Service gave up.
    pub(super) heirs: BTreeSet<Owner>,
    /// They claim a frontend that the Service claims now, too.
    pub(super) rivals: BTreeSet<Owner>,
}

impl Reconciler {
    /// Notes which frontends the Service claims.
    pub(super) fn claim(&mut self, name: &Owner, desired: &Desired) -> Claimed {
        let mut claimed = Claimed::default();
        let mut gone: Vec<(FrontendKey, i64)> = vec![];
        if let Some(old) = self.services.get(name) {
            let stays = |key: &&FrontendKey| {
                old.created == desired.created && desired.compiled.frontends.contains_key(key)
            };
            let keys = old.frontends.iter().map(|(key, _)| key);
            gone.extend(keys.filter(|key| !stays(key)).map(|key| (*key, old.created)));
        }
        for (key, created) in gone {
            if let Some(claims) = self.claims.get_mut(&key) {
                claims.retain(|(when, who)| (*when, who) != (created, name));
                claimed.heirs.extend(claims.iter().map(|(_, other)| other.clone()));
                if claims.is_empty() {
                    self.claims.remove(&key);
                }
            }
        }
        for key in desired.compiled.frontends.keys() {
            let claims = self.claims.entry(*key).or_default();
            let claim = (desired.created, name.clone());
            if let Err(place) = claims.binary_search(&claim) {
                claims.insert(place, claim);
                claimed.rivals.extend(claims.iter().map(|(_, other)| other.clone()));
            }
        }
        claimed.rivals.remove(name);
        claimed
    }

    pub(super) fn owner(&self, key: &FrontendKey) -> Option<&Owner> {
        self.claims.get(key).and_then(|claims| claims.first()).map(|(_, name)| name)
    }

    /// A number for a new Service: the one its frontends have in the maps already, if nobody else has it.
    pub(super) fn identify(&mut self, name: &Owner, compiled: &Compiled) -> u32 {
        let unclaimed = |key: &FrontendKey| {
            let installed = self.installed.get(key)?;
            installed.owner.is_none().then_some(installed.entry.id)
        };
        let own = compiled.frontends.keys().filter(|key| self.owner(key) == Some(name));
        let found = own.filter_map(unclaimed).find(|id| self.ids.is_unclaimed(*id));
        self.ids.take(found)
    }

    /// Sees to it that every port has a number: the one its frontends have in the maps already, if nobody else has it.
    pub(super) fn number_ports(&mut self, service: &mut Service, wanted: &BTreeMap<FrontendKey, Frontend>) {
        let mut new: BTreeMap<(u16, Protocol), Option<u32>> = BTreeMap::new();
        for (key, frontend) in wanted {
            let port = (frontend.port, key.protocol);
            if !service.ports.contains_key(&port) {
                let found = self.installed.get(key).filter(|installed| installed.owner.is_none());
                let found = found.map(|installed| installed.entry.port);
                let known = new.entry(port).or_default();
                *known = known.or(found.filter(|id| self.ports.is_unclaimed(*id)));
            }
        }
        for (port, found) in new {
            let found = found.filter(|id| self.ports.is_unclaimed(*id));
            service.ports.insert(port, self.ports.take(found));
        }
    }

    /// Gives back the numbers of ports that have no frontend any more.
    pub(super) fn release_ports(
        &mut self,
        service: &mut Service,
        wanted: &BTreeMap<FrontendKey, Frontend>,
        now: Instant,
    ) {
        let ports: BTreeSet<_> = wanted.iter().map(|(key, frontend)| (frontend.port, key.protocol)).collect();
        let installed = service.keys.iter().filter_map(|key| self.installed.get(key));
        let used: BTreeSet<u32> = installed.map(|installed| installed.entry.port).collect();
        let mut gone = vec![];
        service.ports.retain(|port, id| {
            let stays = ports.contains(port) || used.contains(id);
            if !stays {
                gone.push(*id);
            }
            stays
        });
        for id in gone {
            self.retire(Retired::Port(id), now);
        }
    }
}

/// Numbers of Services, or of their ports: small, given out again after the grace time.
#[derive(Debug, Default)]
pub(super) struct ServiceIds {
    /// Found in the maps, and not yet anybody's.
    pub(super) found: BTreeSet<u32>,
    /// Below `last`, and nobody's.
    free: BTreeSet<u32>,
    last: u32,
}

impl ServiceIds {
    /// In the maps at the start.
    pub(super) fn adopt(&mut self, id: u32) {
        if id == 0 {
            return;
        }
        self.found.insert(id);
        self.last = self.last.max(id);
    }

    /// Whether a Service may have the number that its frontends had at the start.
    pub(super) fn is_unclaimed(&self, id: u32) -> bool {
        id != 0 && self.found.contains(&id)
    }

    pub(super) fn take(&mut self, found: Option<u32>) -> u32 {
        if let Some(id) = found {
            self.found.remove(&id);
            return id;
        }
        self.free.pop_first().unwrap_or_else(|| {
            self.last += 1;
            self.last
        })
    }

    pub(super) fn give(&mut self, id: u32) {
        self.free.insert(id);
    }
}
