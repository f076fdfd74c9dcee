//! Fragments: what only the first one of a datagram says, kept for those that follow it.
//!
//! Only the first fragment has the transport header, and so the ports a flow is known by. Once it has been translated,
//! its ports are remembered by what all fragments of the datagram share; the others find the same flow with them, and
//! have their addresses rewritten alone. Fragments of datagrams that are none of ours never write the map.

use crate::abi::{Fragment, FragmentKey};
use crate::family::Family;
use crate::parse::Parsed;
use crate::reason::Reason;
use crate::tables::Tables;

/// What all fragments of a datagram have in common.
#[inline(always)]
fn key<F: Family>(parsed: &Parsed<F>) -> FragmentKey<F::Addr> {
    FragmentKey {
        src: parsed.key.src,
        dst: parsed.key.dst,
        id: parsed.id,
        proto: parsed.id_proto,
        side: parsed.key.side,
        pad: 0,
    }
}

/// Keeps the ports of a first fragment that was translated; does nothing for any other packet.
#[inline(never)]
pub fn remember<F: Family, T: Tables<F>>(tables: &T, parsed: &Parsed<F>) {
    if !parsed.is_first_fragment() {
        return;
    }
    let fragment = Fragment {
        last_seen: tables.now(),
        src_port: parsed.key.src_port,
        dst_port: parsed.key.dst_port,
        proto: parsed.key.proto,
        pad: [0; 3],
    };
    tables.put_fragment(&key(parsed), &fragment);
}

/// Gives a later fragment the ports of its first.
///
/// # Errors
///
/// [`Reason::Fragment`]: its first fragment was not translated, or has not come yet.
#[inline(always)]
pub fn recall<F: Family, T: Tables<F>>(tables: &T, parsed: &mut Parsed<F>) -> Result<(), Reason> {
    let first = tables.fragment(&key(parsed)).ok_or(Reason::Fragment)?;
    if tables.now().saturating_sub(first.last_seen) > F::FRAGMENT_TIMEOUT {
        return Err(Reason::Fragment);
    }
    parsed.key.src_port = first.src_port;
    parsed.key.dst_port = first.dst_port;
    parsed.key.proto = first.proto;
    Ok(())
}
