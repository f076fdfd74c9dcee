//! Taking over maps as another agent left them. They may hold anything: what cannot be right is never relied
//! on, and replaced at the first occasion.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{self, backend_flags, backend_state};

use super::{Content, Reconciler, Window};
use crate::entries::{Backend, BackendEntry, Family, FrontendKey, Snapshot};

/// Stands for a window found in the maps that cannot be one: equal to nothing that is wanted, so that the
/// frontend is written anew.
pub(super) const NOWHERE: abi::Window = abi::Window { base: 0, len: u32::MAX };

impl Reconciler {
    pub(super) fn adopt_windows(&mut self, snapshot: &Snapshot) {
        let mut found: BTreeMap<u32, Window> = BTreeMap::new();
        let mut whose: BTreeMap<(Family, u32), Backend> = BTreeMap::new();
        for (key, entry) in &snapshot.frontends {
            for window in [entry.internal, entry.external] {
                if window.len == 0 || !self.is_sound(window) {
                    continue;
                }
                let seen = found
                    .entry(window.base)
                    .or_insert_with(|| look_at_window(window, *key, snapshot, &mut whose));
                seen.refs += 1;
                if seen.len != window.len || seen.family != Family::of(key.addr) {
                    seen.len = seen.len.max(window.len);
                    seen.content = Content::Foreign;
                }
            }
        }
        for ((family, id), entry) in &snapshot.backends {
            let backend = whose.get(&(*family, *id)).copied();
            self.backends_mut(*family).adopt(*id, entry, backend);
        }
        // Windows that overlap become one that is replaced at the first occasion.
        let mut last: Option<(u32, Window)> = None;
        for (base, window) in found {
            match &mut last {
                Some((start, before)) if base < *start + before.len => {
                    before.len = before.len.max(base + window.len - *start);
                    before.refs += window.refs;
                    before.content = Content::Foreign;
                    if before.family == window.family {
                        before.ids.extend(window.ids);
                        before.ids.sort_unstable();
                        before.ids.dedup();
                    }
                }
                _ => {
                    if let Some((base, window)) = last.replace((base, window)) {
                        self.adopt_window(base, window);
                    }
                }
            }
        }
        if let Some((base, window)) = last {
            self.adopt_window(base, window);
        }
    }

    pub(super) fn is_sound(&self, window: abi::Window) -> bool {
        let end = u64::from(window.base) + u64::from(window.len);
        window.len == 0 || (window.base > 0 && end <= u64::from(self.limits.slots))
    }

    fn adopt_window(&mut self, base: u32, window: Window) {
        let taken = self.space.take_at(base, window.len);
        debug_assert!(taken, "windows do not overlap and lie inside SLOTS");
        for id in &window.ids {
            self.backends_mut(window.family).enter_window(*id);
        }
        self.windows.insert(base, window);
    }
}

fn look_at_window(
    window: abi::Window,
    key: FrontendKey,
    snapshot: &Snapshot,
    whose: &mut BTreeMap<(Family, u32), Backend>,
) -> Window {
    let family = Family::of(key.addr);
    let slots = snapshot.slots.get(&window.base).map(Vec::as_slice).unwrap_or_default();
    let slots = slots.get(..window.len as usize).unwrap_or_default();
    let distinct: BTreeSet<u32> = slots.iter().copied().collect();
    let mut sound = !slots.is_empty();
    let mut ids = vec![];
    for id in distinct {
        match snapshot.backends.get(&(family, id)) {
            Some(entry) if id != 0 && entry.state != backend_state::UNUSED => {
                let backend = backend_of(entry, key);
                sound &= *whose.entry((family, id)).or_insert(backend) == backend;
                ids.push(id);
            }
            _ => sound = false,
        }
    }
    let content = if sound { Content::Slots(slots.to_vec()) } else { Content::Foreign };
    Window { len: window.len, family, refs: 0, ids, content }
}

fn backend_of(entry: &BackendEntry, key: FrontendKey) -> Backend {
    Backend { addr: entry.addr, protocol: key.protocol, local: entry.flags & backend_flags::LOCAL != 0 }
}
