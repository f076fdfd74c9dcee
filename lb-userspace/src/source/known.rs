//! What a source has told the agent, so that after an interruption it can tell what is gone.

use std::collections::BTreeSet;

/// Names of the objects that were told, and those seen again in a list under way.
#[derive(Debug)]
pub(super) struct Known<K> {
    told: BTreeSet<K>,
    seen: Option<BTreeSet<K>>,
}

impl<K: Ord + Clone> Known<K> {
    /// These have been told, by whomever.
    pub(super) fn with(told: BTreeSet<K>) -> Self {
        Self { told, seen: None }
    }

    /// A list begins; one that was under way is forgotten.
    pub(super) fn begin(&mut self) {
        self.seen = Some(BTreeSet::new());
    }

    /// The object exists.
    pub(super) fn exists(&mut self, name: &K) {
        if let Some(seen) = &mut self.seen {
            seen.insert(name.clone());
        }
        self.told.insert(name.clone());
    }

    /// The object is gone.
    pub(super) fn gone(&mut self, name: &K) {
        if let Some(seen) = &mut self.seen {
            seen.remove(name);
        }
        self.told.remove(name);
    }

    /// The list is complete: answers what was told before and is not in it.
    pub(super) fn finish(&mut self) -> Vec<K> {
        let Some(seen) = self.seen.take() else { return vec![] };
        let gone: Vec<K> = self.told.difference(&seen).cloned().collect();
        self.told = seen;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_list_does_not_have_is_gone() {
        let mut known = Known::with(["old"].into());
        known.begin();
        known.exists(&"a");
        known.exists(&"b");
        assert_eq!(known.finish(), ["old"]);
        known.exists(&"c");
        known.gone(&"a");
        // A list that was broken off says nothing.
        known.begin();
        known.exists(&"d");
        known.begin();
        known.exists(&"b");
        assert_eq!(known.finish(), ["c", "d"]);
        known.begin();
        assert_eq!(known.finish(), ["b"]);
    }
}
