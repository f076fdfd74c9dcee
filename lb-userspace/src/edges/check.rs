//! Whether programs are still where they were put. Anybody with the rights may detach a link, delete a filter or its
//! qdisc, and a device's number may come to be another device's between two looks.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{Duration, Instant};

use futures::channel::mpsc::UnboundedReceiver;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::classify::Device;
use super::{Attached, Follower, PERIOD};
use crate::datapath::{Place, device_exists, program_names};

/// Whoever takes programs off again and again is answered so often.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// What the kernel has said is here after that long.
const DELIVERY: Duration = Duration::from_millis(20);

/// What netlink says, and from where.
type Changes<A> = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, A)>;

/// Programs that were put back on their hooks, counted by name.
#[derive(Clone, Debug)]
pub struct Reattached(Family<[(&'static str, &'static str); 1], Counter>);

impl Default for Reattached {
    fn default() -> Self {
        let family = Family::default();
        for program in program_names() {
            drop(family.get_or_create(&[("program", program)]));
        }
        Self(family)
    }
}

impl Reattached {
    /// The metric.
    pub fn family(&self) -> &Family<[(&'static str, &'static str); 1], Counter> {
        &self.0
    }

    fn note(&self, program: &'static str) {
        self.0.get_or_create(&[("program", program)]).inc();
    }
}

/// Why something may not be on its hook any more.
#[derive(Debug)]
pub(super) struct Doubts {
    /// Devices that left: another one may have the number.
    left: BTreeSet<u32>,
    /// A filter or a qdisc was deleted somewhere.
    filters: bool,
    /// When everything was checked.
    checked: Instant,
}

impl Default for Doubts {
    fn default() -> Self {
        Self { left: BTreeSet::new(), filters: false, checked: Instant::now() }
    }
}

impl Doubts {
    /// What netlink says may give rise to doubts.
    pub(super) fn heed(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>) {
        let NetlinkPayload::InnerMessage(message) = &message.payload else { return };
        match message {
            // A port that leaves its bridge is reported so, too.
            RouteNetlinkMessage::DelLink(link) if link.header.interface_family != AddressFamily::Bridge => {
                self.left.insert(link.header.index);
            }
            RouteNetlinkMessage::DelTrafficFilter(_) | RouteNetlinkMessage::DelQueueDiscipline(_) => {
                self.filters = true;
            }
            _ => {}
        }
    }
}

impl Follower {
    /// Forgets what is not on its hook any more, so that it is put there again. `true`: somebody took something off.
    pub(super) async fn check<A>(&mut self, devices: &[Device], changes: &mut Changes<A>) -> bool {
        let mut left = mem::take(&mut self.doubts.left);
        let filters = mem::take(&mut self.doubts.filters);
        let everything = self.doubts.checked.elapsed() >= PERIOD;
        let by_index: BTreeMap<u32, &Device> =
            devices.iter().map(|device| (device.ifindex, device)).collect();
        let reused = left.iter().any(|ifindex| by_index.contains_key(ifindex));
        if !everything && !filters && !reused {
            return false;
        }
        let found = if self.hooks.tcx() { None } else { self.find_filters().await };
        let mut lost = Vec::new();
        for (key, attached) in &self.attached {
            let Some(device) = by_index.get(&key.0) else { continue };
            let held = if *attached == Attached::Tc && !self.hooks.tcx() {
                found.as_ref().is_none_or(|found| found.contains(key))
            } else {
                let doubted = everything || left.contains(&key.0);
                !doubted || self.hooks.holds(key.0, key.1, device.xdp)
            };
            if !held {
                lost.push((*key, *device));
            }
        }
        if lost.iter().any(|((ifindex, _), _)| !left.contains(ifindex) && device_exists(*ifindex)) {
            // Or is that another device already? Then the kernel has said by now that the first one left.
            tokio::time::sleep(DELIVERY).await;
            while let Ok((message, _)) = changes.try_recv() {
                self.doubts.heed(&message);
            }
            left.extend(&self.doubts.left);
        }
        let mut taken = false;
        for ((ifindex, place), device) in lost {
            self.attached.remove(&(ifindex, place));
            // What is left of a link is its pin.
            if let Err(error) = self.hooks.detach(ifindex, place) {
                tracing::warn!(%error, "cannot detach");
            }
            if left.contains(&ifindex) || !device_exists(ifindex) {
                tracing::debug!(device = device.name, ifindex, "the device of this number has left");
                continue;
            }
            taken = true;
            self.reattached.note(place.program());
            tracing::warn!(
                device = device.name,
                program = place.program(),
                "somebody took a program off its hook; it is put back"
            );
        }
        if everything {
            self.map.look();
            self.sources.look();
            let served: Vec<_> =
                self.attached.keys().filter(|(_, place)| *place != Place::Xdp).copied().collect();
            for (ifindex, place) in served {
                if let Some(device) = by_index.get(&ifindex) {
                    self.tell_order(device, place);
                }
            }
            self.doubts.checked = Instant::now();
            self.check_sockets();
            self.forget_qdiscs(&by_index);
        }
        taken
    }

    async fn find_filters(&self) -> Option<BTreeSet<(u32, Place)>> {
        let filters = self.hooks.filters(&self.netlink).await;
        let filters =
            filters.inspect_err(|error| tracing::warn!(%error, "cannot see the tc filters")).ok()?;
        Some(filters.into_iter().map(|(place, ifindex)| (ifindex, place)).collect())
    }

    /// Names those whose programs come before ours on a hook, once for each set of programs.
    pub(super) fn tell_order(&mut self, device: &Device, place: Place) {
        let before = self.hooks.before(device.ifindex, place);
        if !before.is_empty() && self.told_before.insert((place, before.clone())) {
            tracing::info!(
                device = device.name,
                program = place.program(),
                before = before.join(", "),
                "others run first on this hook; both work if they let the next program have its say (TCX_NEXT)"
            );
        }
    }

    fn check_sockets(&mut self) {
        let Some(root) = &self.sockets else { return };
        match self.hooks.mend_sockets(root) {
            Ok(mended) => {
                self.sockets_failed = None;
                for program in mended {
                    self.reattached.note(program);
                    tracing::warn!(
                        cgroup = %root.display(),
                        program,
                        "somebody took a program off its hook; it is put back"
                    );
                }
            }
            Err(error) => {
                let error = error.to_string();
                if self.sockets_failed.as_ref() != Some(&error) {
                    tracing::warn!(error, "processes of this node are not served");
                    self.sockets_failed = Some(error);
                }
            }
        }
    }

    /// Qdiscs leave with their devices; whoever gets the number may have one of another's making.
    fn forget_qdiscs(&self, devices: &BTreeMap<u32, &Device>) {
        let gone = |ifindex: &u32| !devices.contains_key(ifindex);
        if self.state.read().is_some_and(|state| state.clsact.iter().any(gone))
            && let Err(error) =
                self.state.update(|state| state.clsact.retain(|ifindex| devices.contains_key(ifindex)))
        {
            tracing::debug!(%error, "qdiscs of devices that are gone stay on record");
        }
    }
}
