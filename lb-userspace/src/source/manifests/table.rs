//! Which file says what, and what follows for the objects when a file changes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::parse::{Key, Object, Parsed};
use crate::model::Change;

/// The objects of all files.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// By file, in the order of their keys: there may be many files of few objects.
    files: BTreeMap<OsString, Box<[(Key, Object)]>>,
    /// The files that define an object, in the order of their names; the first counts.
    holders: BTreeMap<Key, Vec<Arc<OsStr>>>,
}

impl Table {
    /// The files say this now; one that is gone says nothing. What moves from one of them to another is
    /// never gone in between.
    pub(super) fn update(&mut self, files: Vec<(OsString, Parsed)>) -> Vec<Change> {
        let (mut touched, mut new) = (BTreeSet::new(), BTreeSet::new());
        for (name, parsed) in files {
            self.set(&name, parsed, &mut touched, &mut new);
        }
        for key in new {
            let holders = self.holders.get(&key).into_iter().flatten();
            let files: Vec<_> = holders.map(|file| file.to_string_lossy()).collect();
            if files.len() > 1 {
                tracing::warn!(
                    files = files.join(", "),
                    "{key} is defined in several files; the first counts"
                );
            }
        }
        touched.into_iter().map(|key| self.change(key)).collect()
    }

    fn set(&mut self, name: &OsStr, parsed: Parsed, touched: &mut BTreeSet<Key>, new: &mut BTreeSet<Key>) {
        let Parsed { mut objects, problems } = parsed;
        let old: BTreeMap<Key, Object> = self.files.remove(name).unwrap_or_default().into_iter().collect();
        if problems.count > 0 {
            // Any of these may be in what could not be read.
            for (key, object) in &old {
                objects.entry(key.clone()).or_insert_with(|| object.clone());
            }
        }
        for (key, object) in &old {
            match objects.get(key) {
                Some(now) if now == object => {}
                Some(_) => {
                    touched.insert(key.clone());
                }
                None => {
                    touched.insert(key.clone());
                    if let Some(holders) = self.holders.get_mut(key) {
                        holders.retain(|holder| **holder != *name);
                    }
                }
            }
        }
        let shared: Arc<OsStr> = name.into();
        for key in objects.keys().filter(|key| !old.contains_key(key)) {
            touched.insert(key.clone());
            new.insert(key.clone());
            let holders = self.holders.entry(key.clone()).or_default();
            let place = holders.partition_point(|holder| *holder < shared);
            holders.insert(place, Arc::clone(&shared));
        }
        if !objects.is_empty() {
            self.files.insert(name.to_owned(), objects.into_iter().collect());
        }
    }

    /// What is to be said of an object now.
    fn change(&mut self, key: Key) -> Change {
        let first = self.holders.get(&key).and_then(|holders| holders.first());
        if let Some(objects) = first.and_then(|name| self.files.get(&**name))
            && let Ok(place) = objects.binary_search_by(|(own, _)| own.cmp(&key))
        {
            return objects[place].1.clone().changed();
        }
        self.holders.remove(&key);
        key.gone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::Problems;
    use super::*;
    use crate::model::Node;

    /// A file of nodes: name and zone.
    fn parsed(nodes: &[(&str, &str)], broken: usize) -> Parsed {
        let objects = nodes.iter().map(|(name, zone)| {
            let node = Node { zone: Some((*zone).into()), ..Node::named(*name) };
            (Key::Node((*name).into()), Object::Node(Box::new(node)))
        });
        let mut problems = Problems::default();
        (0..broken).for_each(|_| problems.push("broken".into()));
        Parsed { objects: objects.collect(), problems }
    }

    fn set(table: &mut Table, file: &str, nodes: &[(&str, &str)], broken: usize) -> Vec<String> {
        table.update(vec![(file.into(), parsed(nodes, broken))]).into_iter().map(show).collect()
    }

    fn remove(table: &mut Table, file: &str) -> Vec<String> {
        set(table, file, &[], 0)
    }

    fn show(change: Change) -> String {
        match change {
            Change::Node(node) => format!("{}={}", node.name, node.zone.unwrap()),
            Change::NodeGone(name) => format!("-{name}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_changes_is_said() {
        let mut table = Table::default();
        assert_eq!(set(&mut table, "f", &[("a", "1"), ("b", "1")], 0), ["a=1", "b=1"]);
        assert_eq!(set(&mut table, "f", &[("a", "1"), ("b", "2"), ("c", "1")], 0), ["b=2", "c=1"]);
        assert_eq!(set(&mut table, "f", &[("c", "1")], 0), ["-a", "-b"]);
        assert_eq!(remove(&mut table, "f"), ["-c"]);
        assert_eq!(remove(&mut table, "f"), [""; 0]);
        assert!(table.files.is_empty() && table.holders.is_empty());
    }

    #[test]
    fn a_broken_file_loses_nothing() {
        let mut table = Table::default();
        set(&mut table, "f", &[("a", "1"), ("b", "1")], 0);
        // One document cannot be read; the other one has changed.
        assert_eq!(set(&mut table, "f", &[("b", "2")], 1), ["b=2"]);
        assert_eq!(set(&mut table, "f", &[], 2), [""; 0]);
        assert_eq!(set(&mut table, "f", &[("b", "2")], 0), ["-a"]);
        // Broken from the start: what can be read counts.
        assert_eq!(set(&mut table, "g", &[("c", "1")], 1), ["c=1"]);
    }

    #[test]
    fn of_two_definitions_that_in_the_first_file_counts() {
        let mut table = Table::default();
        assert_eq!(set(&mut table, "g", &[("a", "g")], 0), ["a=g"]);
        assert_eq!(set(&mut table, "f", &[("a", "f")], 0), ["a=f"]);
        assert_eq!(set(&mut table, "g", &[("a", "G")], 0), ["a=f"]);
        assert_eq!(remove(&mut table, "f"), ["a=G"]);
        assert_eq!(remove(&mut table, "g"), ["-a"]);
    }

    #[test]
    fn what_moves_between_files_is_never_gone() {
        for (from, to) in [("f", "g"), ("g", "f")] {
            let mut table = Table::default();
            set(&mut table, from, &[("a", "1")], 0);
            let moved = vec![(from.into(), parsed(&[], 0)), (to.into(), parsed(&[("a", "1")], 0))];
            let changes: Vec<_> = table.update(moved).into_iter().map(show).collect();
            assert_eq!(changes, ["a=1"]);
            assert_eq!(remove(&mut table, to), ["-a"]);
            assert!(table.files.is_empty() && table.holders.is_empty());
        }
    }
}
