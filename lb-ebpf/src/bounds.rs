//! The one check that stands before every look into a packet.

use lb_common::Reason;
use lb_common::wire::Wire;

/// Offsets beyond this are not looked at: the verifier wants a bound, and no header of ours is so far out.
const MAX_OFFSET: usize = 1023;

/// The header at an offset of the packet between `start` and `end`, which its context has just told.
#[inline(always)]
pub fn locate<T: Wire>((start, end): (usize, usize), at: usize) -> Result<*mut T, Reason> {
    if at > MAX_OFFSET {
        return Err(Reason::Truncated);
    }
    let header = start + at;
    if header + size_of::<T>() > end {
        return Err(Reason::Truncated);
    }
    Ok(header as *mut T)
}
