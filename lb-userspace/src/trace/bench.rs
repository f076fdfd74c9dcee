//! A twin of the programs, and what of the live tables a packet meets there.

use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, MapData};
use lb_common::abi::{Affinity, AffinityKey, Flow, FlowKey};
use lb_common::flow::{reverse_key, reverse_value};
use lb_common::maps::MAX_MACS;
use lb_common::wire::Mac;
use lb_common::{Family, Hook, Reason, V4, V6};

use super::TraceError;
use crate::datapath::test_run::{Input, test_run};
use crate::datapath::{Datapath, OpenError, Place, typed};
use crate::inspect::Inspector;

/// A family and the names of its tables.
pub(super) trait Kin: Family {
    const FLOWS: &'static str;
    const PENDING: &'static str;
    const AFFINITY: &'static str;
}

impl Kin for V4 {
    const FLOWS: &'static str = "FLOWS4";
    const PENDING: &'static str = "PENDING4";
    const AFFINITY: &'static str = "AFFINITY4";
}

impl Kin for V6 {
    const FLOWS: &'static str = "FLOWS6";
    const PENDING: &'static str = "PENDING6";
    const AFFINITY: &'static str = "AFFINITY6";
}

/// The tables that programs write, as far as a packet's way depends on them.
struct Tables<A: Copy> {
    flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    pending: HashMap<MapData, FlowKey<A>, Flow<A>>,
    affinity: HashMap<MapData, AffinityKey<A>, Affinity>,
}

impl<A: Copy> Tables<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    AffinityKey<A>: Pod,
{
    fn of<F: Kin<Addr = A>>(inspector: &Inspector) -> Result<Self, OpenError> {
        Ok(Self {
            flows: typed(F::FLOWS, |spec| inspector.map_data(spec))?,
            pending: typed(F::PENDING, |spec| inspector.map_data(spec))?,
            affinity: typed(F::AFFINITY, |spec| inspector.map_data(spec))?,
        })
    }

    /// A flow, and whether it is established.
    fn flow(&self, key: &FlowKey<A>) -> Option<(Flow<A>, bool)> {
        let established = self.flows.get(key, 0).ok().map(|flow| (flow, true));
        established.or_else(|| self.pending.get(key, 0).ok().map(|flow| (flow, false)))
    }

    fn put(&mut self, key: FlowKey<A>, flow: Flow<A>, established: bool) -> Result<(), TraceError> {
        let table = if established { &mut self.flows } else { &mut self.pending };
        table.insert(key, flow, 0).map_err(|error| TraceError::Run(error.to_string()))
    }

    fn remove(&mut self, key: &FlowKey<A>) {
        // What is not there need not go.
        let _ = self.pending.remove(key);
        let _ = self.flows.remove(key);
    }
}

/// Programs that can be run without anybody noticing.
pub(super) struct Bench<A: Copy> {
    twin: Datapath,
    own: Inspector,
    live: Tables<A>,
    private: Tables<A>,
}

impl<A: Copy + PartialEq> Bench<A>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    AffinityKey<A>: Pod,
{
    pub(super) fn new<F: Kin<Addr = A>>(bpffs: &Path, live: &Inspector) -> Result<Self, TraceError> {
        let twin = Datapath::twin(bpffs)?;
        let own = Inspector::of(&twin)?;
        Ok(Self { live: Tables::of::<F>(live)?, private: Tables::of::<F>(&own)?, twin, own })
    }

    /// Addresses a frame to this node, if it comes in by an edge that looks at that.
    pub(super) fn address(&self, ifindex: u32, frame: &mut [u8]) -> Result<(), TraceError> {
        let macs = self.twin.macs_map()?;
        if let Ok(own) = macs.get(&(ifindex % MAX_MACS), 0)
            && own.ifindex == ifindex
            && own.mac != Mac::default()
            && let Some(dst) = frame.get_mut(..own.mac.octets.len())
        {
            dst.copy_from_slice(&own.mac.octets);
        }
        Ok(())
    }

    /// Takes over the live flow of this key with its other half, if there is one: it, and whether it is established.
    pub(super) fn adopt(&mut self, key: &FlowKey<A>) -> Result<Option<(Flow<A>, bool)>, TraceError> {
        let Some((flow, established)) = self.live.flow(key) else { return Ok(None) };
        let other_key = reverse_key(key, &flow);
        let other = self.live.flow(&other_key).map_or_else(|| reverse_value(key, &flow), |(other, _)| other);
        self.private.put(*key, flow, established)?;
        self.private.put(other_key, other, established)?;
        Ok(Some((flow, established)))
    }

    /// Takes over which backend a client was given before, if it is remembered.
    pub(super) fn remember(&mut self, key: &AffinityKey<A>) -> Result<Option<Affinity>, TraceError> {
        let Ok(known) = self.live.affinity.get(key, 0) else { return Ok(None) };
        let put = self.private.affinity.insert(key, known, 0);
        put.map_err(|error| TraceError::Run(error.to_string()))?;
        Ok(Some(known))
    }

    /// The flow of a key after what was run.
    pub(super) fn flow(&self, key: &FlowKey<A>) -> Option<Flow<A>> {
        self.private.flow(key).map(|(flow, _)| flow)
    }

    /// Whether the answers to a new flow have the name of a live one, which the bench did not know. It does from now
    /// on, and has forgotten the new flow.
    pub(super) fn collides(&mut self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<bool, TraceError> {
        let other_key = reverse_key(key, flow);
        match self.live.flow(&other_key) {
            Some((other, _)) if reverse_key(&other_key, &other) != *key => {}
            _ => return Ok(false),
        }
        self.private.remove(key);
        self.private.remove(&other_key);
        self.adopt(&other_key).map(|adopted| adopted.is_some())
    }

    /// Runs the program of a place on a frame: why it did what it did, and the frame afterwards.
    pub(super) fn run(
        &self,
        place: Place,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<(Reason, Vec<u8>), TraceError> {
        let before = self.own.counters()?;
        let output = test_run(self.twin.programs(), place, Input { ifindex, ..Input::new(frame) })
            .map_err(|source| TraceError::Program { program: place.program(), source })?;
        let hook = hook(place).name();
        let counted = self.own.counters()?.into_iter().find(|now| {
            let earlier = before.iter().find(|then| (then.hook, then.reason) == (now.hook, now.reason));
            now.hook == hook && now.packets > earlier.map_or(0, |then| then.packets)
        });
        let reason =
            counted.and_then(|now| Reason::ALL.into_iter().find(|reason| reason.name() == now.reason));
        let reason = reason.ok_or_else(|| TraceError::Run(format!("{} counted nothing", place.program())))?;
        Ok((reason, output.frame))
    }
}

/// What a place is called in counters.
pub(super) const fn hook(place: Place) -> Hook {
    match place {
        Place::Xdp => Hook::Xdp,
        Place::NicIn => Hook::NicIn,
        Place::NicOut => Hook::NicOut,
        Place::PodIn => Hook::PodIn,
        Place::PodOut => Hook::PodOut,
    }
}
