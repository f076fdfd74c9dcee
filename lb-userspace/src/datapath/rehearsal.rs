//! A layout after ours, to rehearse an upgrade and the way back: its generations of backends are other numbers, in
//! every map that has one. Programs compare them and no more, so that the same ones serve both; whatever a
//! migration forgets to convert belongs to another backend from then on.

use std::mem::{offset_of, size_of};

use lb_common::abi::{Addr4, Addr6, Affinity, AffinityKey, Backend, Flow, FlowKey, SocketKey, SocketPeer};
use lb_common::maps::LAYOUT_VERSION;

use super::carry::{Convert, LastSeen};
use super::migrate::{Change, Known, Layout};

/// The rehearsed version, which knows ours.
pub(super) const NEXT: Layout = Layout {
    version: LAYOUT_VERSION + 1,
    known: &[Known { version: LAYOUT_VERSION, changes: &CHANGES }],
    stop_after: None,
};

/// Ours, which knows the rehearsed one.
pub(super) const RETURN: Layout = Layout {
    version: LAYOUT_VERSION,
    known: &[Known { version: LAYOUT_VERSION + 1, changes: &CHANGES }],
    stop_after: None,
};

/// The same in both directions.
const CHANGES: [Change; 9] = {
    const BACKEND4: Convert = flip::<{ offset_of!(Backend<Addr4>, generation) }>;
    const BACKEND6: Convert = flip::<{ offset_of!(Backend<Addr6>, generation) }>;
    const FLOW4: Convert = flip::<{ offset_of!(Flow<Addr4>, generation) }>;
    const FLOW6: Convert = flip::<{ offset_of!(Flow<Addr6>, generation) }>;
    const AFFINITY: Convert = flip::<{ offset_of!(Affinity, generation) }>;
    const PEER: Convert = flip::<{ offset_of!(SocketPeer, generation) }>;
    let flow4 = Some(LastSeen::at(offset_of!(Flow<Addr4>, last_seen)));
    let flow6 = Some(LastSeen::at(offset_of!(Flow<Addr6>, last_seen)));
    let affinity = Some(LastSeen::at(offset_of!(Affinity, last_seen)));
    [
        change::<u32, Backend<Addr4>>("BACKENDS4", BACKEND4, None),
        change::<u32, Backend<Addr6>>("BACKENDS6", BACKEND6, None),
        change::<FlowKey<Addr4>, Flow<Addr4>>("FLOWS4", FLOW4, flow4),
        change::<FlowKey<Addr6>, Flow<Addr6>>("FLOWS6", FLOW6, flow6),
        change::<FlowKey<Addr4>, Flow<Addr4>>("PENDING4", FLOW4, flow4),
        change::<FlowKey<Addr6>, Flow<Addr6>>("PENDING6", FLOW6, flow6),
        change::<AffinityKey<Addr4>, Affinity>("AFFINITY4", AFFINITY, affinity),
        change::<AffinityKey<Addr6>, Affinity>("AFFINITY6", AFFINITY, affinity),
        change::<SocketKey, SocketPeer>("SOCKETS", PEER, None),
    ]
};

#[expect(clippy::cast_possible_truncation, reason = "sizes of map keys and values are far below 4 GiB")]
const fn change<K, V>(map: &'static str, convert: Convert, last_seen: Option<LastSeen>) -> Change {
    Change {
        map,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        convert: Some(convert),
        last_seen,
    }
}

/// The highest bit but one of the generation at `AT` is the other one. 0 stays: nobody has had that id.
fn flip<const AT: usize>(key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut value = value.to_vec();
    let bytes: &mut [u8; 4] = value.get_mut(AT..)?.first_chunk_mut()?;
    let generation = u32::from_ne_bytes(*bytes);
    if generation != 0 {
        *bytes = (generation ^ 1 << 30).to_ne_bytes();
    }
    Some((key.to_vec(), value))
}
