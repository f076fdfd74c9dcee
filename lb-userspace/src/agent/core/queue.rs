//! Operations of many Services that go to the maps together: ordered by map, few system calls carry them out.

use std::collections::BTreeSet;

use lb_common::abi::backend_state;

use crate::entries::{Family, HealthCheck, Op};
use crate::owner::Owner;

/// Operations that wait at most: they are in memory meanwhile.
const MOST: usize = 8192;

/// What waits to be carried out.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// With the index of whose they are.
    ops: Vec<(Op, usize)>,
    owners: Vec<Waiting>,
    /// Backends that are about to end.
    ending: BTreeSet<(Family, u32)>,
}

/// A Service or Pod whose operations wait.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) owner: Owner,
    pub(super) health: Option<HealthCheck>,
}

impl Queue {
    /// Whether these may go together with what waits: all of them add something, or end a backend, which comes last, and no
    /// backend comes back that was ended before.
    pub(super) fn takes(&self, ops: &[Op]) -> bool {
        let mut ending = BTreeSet::new();
        ops.iter().all(|op| match op {
            Op::SetBackend { family, id, .. } if ended(op).is_none() => {
                !ending.contains(&(*family, *id)) && !self.ending.contains(&(*family, *id))
            }
            op => {
                ending.extend(ended(op));
                rank(op).is_some()
            }
        })
    }

    pub(super) fn push(&mut self, ops: Vec<Op>, waiting: Waiting) {
        self.ending.extend(ops.iter().filter_map(ended));
        let owner = self.owners.len();
        self.ops.extend(ops.into_iter().map(|op| (op, owner)));
        self.owners.push(waiting);
    }

    pub(super) fn is_full(&self) -> bool {
        self.ops.len() >= MOST
    }

    /// What waits, in the order in which no packet meets a reference to what is not there yet; with each operation
    /// goes the index of whose it is.
    pub(super) fn take(&mut self) -> (Vec<Op>, Vec<usize>, Vec<Waiting>) {
        let Self { mut ops, owners, .. } = std::mem::take(self);
        // Stable: of two writes to one entry the later stays the later.
        ops.sort_by_key(|(op, _)| rank(op));
        let (ops, whose) = ops.into_iter().unzip();
        (ops, whose, owners)
    }
}

/// The backend that an operation ends.
fn ended(op: &Op) -> Option<(Family, u32)> {
    match op {
        Op::SetBackend { family, id, entry } if entry.state != backend_state::ACTIVE => Some((*family, *id)),
        _ => None,
    }
}

/// Its place among operations of other Services, as in the batch of one ([`crate::reconcile`]); none: it has to stay
/// where it is.
fn rank(op: &Op) -> Option<(u8, bool)> {
    Some(match op {
        Op::SetBackend { family, .. } => (if ended(op).is_none() { 0 } else { 8 }, *family == Family::V6),
        Op::SetPlace { key, .. } => (1, key.addr.is_ipv6()),
        Op::WriteSlots { .. } => (2, false),
        Op::AddMember { .. } => (3, false),
        Op::SetSource { net, .. } => (4, net.addr().is_ipv6()),
        Op::SetName { .. } => (5, false),
        Op::SetFrontend { key, .. } => (6, key.addr.is_ipv6()),
        Op::SetAddress { addr, .. } => (7, addr.is_ipv6()),
        Op::MendSlots { .. }
        | Op::RemoveFrontend { .. }
        | Op::RemoveMember { .. }
        | Op::RemoveSource { .. }
        | Op::RemoveName { .. }
        | Op::RemoveAddress { .. }
        | Op::RemovePlace { .. }
        | Op::SetNetwork { .. } => return None,
    })
}
