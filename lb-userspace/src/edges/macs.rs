//! The Ethernet addresses of external edges (`MACS`).

use std::collections::BTreeMap;

use aya::maps::{Array, MapData};
use lb_common::abi::OwnMac;
use lb_common::maps::MAX_MACS;
use lb_common::wire::Mac;

/// The map, written where it differs.
pub(super) struct Macs {
    map: Array<MapData, OwnMac>,
    known: BTreeMap<u32, OwnMac>,
}

impl Macs {
    pub(super) fn new(map: Array<MapData, OwnMac>) -> Self {
        Self { map, known: BTreeMap::new() }
    }

    /// Devices that have gone keep their place: nothing comes in through them.
    pub(super) fn set(&mut self, ifindex: u32, mac: Mac) {
        let (place, own) = (ifindex % MAX_MACS, OwnMac { ifindex, mac, pad: 0 });
        if self.known.get(&place) == Some(&own) {
            return;
        }
        match self.map.set(place, own, 0) {
            Ok(()) => drop(self.known.insert(place, own)),
            Err(error) => tracing::warn!(map = "MACS", ifindex, %error, "cannot write"),
        }
    }
}
