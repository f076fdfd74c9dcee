//! From one layout of the maps to another, while packets go through them.
//!
//! Each layout has a directory of its own (`v1`, `v2`). Where a start finds the directory of another layout that it
//! knows:
//!
//! 1. Maps that are the same in both are pinned in both: programs of either layout work on them.
//! 2. The others are made, and what the old ones hold is converted into them (`switch.rs`).
//!    All that is in a directory by the side (`new-v2`), and nobody's but ours: a start that fails or ends until here has
//!    done nothing, and the older version finds what it has left.
//! 3. The directory gets its name, the links move over, and their programs are replaced.
//! 4. The old directory goes, in one step.
//!
//! The agent reconciles the new service maps as always. Whoever is killed on the way leaves programs attached that work on the maps they were loaded with, and the next start
//! takes all the steps again: none of them minds.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use lb_common::maps::{LAYOUT_VERSION, MAPS, MapSpec};

use super::carry::{Convert, LastSeen, Table, Way};
use super::error::OpenError;
use super::load::Programs;
use super::pins::{self, Pins};
use super::rehearsal;
use super::switch::{Step, StopAfter, switch};
use crate::sys::bpf::{self, MapInfo};

/// A layout of the maps, and the others that its entries can be made of.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Names the directory.
    pub version: u32,
    pub known: &'static [Known],
    /// Ends the migration early with an error, as if the agent were killed there; for tests.
    pub stop_after: Option<Step>,
}

/// Another layout that we know.
#[derive(Debug)]
pub struct Known {
    pub version: u32,
    /// Maps that differ; all others are the same.
    pub changes: &'static [Change],
}

/// A map that is another one in another layout.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub map: &'static str,
    /// Bytes, in the other layout.
    pub key_size: u32,
    /// Bytes, in the other layout.
    pub value_size: u32,
    /// None: nothing of it can be used, or is worth it.
    pub convert: Option<Convert>,
    /// Of two values the one used last counts.
    pub last_seen: Option<LastSeen>,
}

impl Layout {
    /// That of this build.
    pub const OURS: Self = Self { version: LAYOUT_VERSION, known: &[], stop_after: None };
    /// The version after ours, with other numbers in it, to see an upgrade before there is one.
    pub const REHEARSAL: Self = rehearsal::NEXT;
    /// Ours, which knows the rehearsed one.
    pub const RETURN: Self = rehearsal::RETURN;

    /// What the environment variable `FAIRLEAD_LAYOUT` asks for: `rehearsal` or `return`, for tests.
    pub fn from_env() -> Self {
        match std::env::var("FAIRLEAD_LAYOUT").as_deref() {
            Ok("rehearsal") => Self::REHEARSAL,
            Ok("return") => Self::RETURN,
            _ => Self::OURS,
        }
    }
}

impl PartialEq for Layout {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version && self.known.len() == other.known.len()
    }
}

impl Eq for Layout {}

/// The way from what is found to the layout of a start.
pub(super) struct Migration {
    target: Pins,
    /// Where the target is made ready: by the side, unless it is there already.
    place: Pins,
    stop_after: StopAfter,
    /// The oldest first.
    sources: Vec<Source>,
}

/// A directory of another layout.
struct Source {
    known: &'static Known,
    pins: Pins,
    /// Those that are there, by name.
    maps: BTreeMap<&'static str, Table>,
}

impl Source {
    fn change(&self, map: &str) -> Option<&'static Change> {
        self.known.changes.iter().find(|change| change.map == map)
    }
}

impl Migration {
    /// Looks for directories of other layouts, and refuses those that are not known. Nothing is changed.
    pub(super) fn find(target: &Pins, layout: &Layout) -> Result<Self, OpenError> {
        let root = target.root();
        let mut sources = vec![];
        for name in pins::names(root).map_err(pin("read", root))? {
            let Some(version) = pins::parse_version(&name).filter(|version| *version != layout.version)
            else {
                continue;
            };
            let path = root.join(&name);
            let known = layout.known.iter().find(|known| known.version == version);
            let known = known.ok_or(OpenError::UnknownLayout { path, ours: layout.version })?;
            sources.push(Source::open(known, Pins::of_version(root, version))?);
        }
        sources.sort_by_key(|source| source.known.version);
        let aside = !sources.is_empty() && !target.dir().exists();
        let place = if aside { target.staged() } else { target.clone() };
        // Without a source there is nothing to stop.
        let stop_after = StopAfter(layout.stop_after.filter(|_| !sources.is_empty()));
        Ok(Self { target: target.clone(), place, stop_after, sources })
    }

    /// Whether there is anything to move over.
    pub(super) fn is_needed(&self) -> bool {
        !self.sources.is_empty()
    }

    /// Where maps and programs are pinned until [`Migration::run`].
    pub(super) fn place(&self) -> &Pins {
        &self.place
    }

    /// The map that a source has the same, and where.
    pub(super) fn shared(&self, spec: &MapSpec) -> Option<(PathBuf, MapInfo)> {
        self.sources.iter().rev().find_map(|source| {
            let table = source.maps.get(spec.name).filter(|_| source.change(spec.name).is_none())?;
            Some((source.pins.map(spec.name), table.info))
        })
    }

    /// The size of a map in the newest source that has it.
    pub(super) fn former_size(&self, spec: &MapSpec) -> Option<u32> {
        self.sources.iter().rev().find_map(|source| Some(source.maps.get(spec.name)?.info.max_entries))
    }

    /// Makes the directories of the new layout, without what an earlier migration has left, and pins there what is the
    /// same.
    pub(super) fn prepare(&self) -> Result<(), OpenError> {
        let root = self.target.root();
        for name in pins::names(root).map_err(pin("read", root))? {
            if pins::is_leftover(&name) {
                let path = root.join(name);
                fs::remove_dir_all(&path).map_err(pin("remove", &path))?;
            }
        }
        self.place.create()?;
        for source in self.sources.iter().rev() {
            for (name, table) in &source.maps {
                let path = self.place.map(name);
                if source.change(name).is_none() && !path.exists() {
                    bpf::obj_pin(table.fd(), &path).map_err(pin("pin", &path))?;
                }
            }
        }
        self.stop_after.done(Step::Shared)
    }

    /// Fills the new maps and gives the hooks to the new programs.
    pub(super) fn run(
        &self,
        maps: &BTreeMap<&'static str, OwnedFd>,
        programs: &Programs,
    ) -> Result<(), OpenError> {
        if self.is_needed() {
            self.stop_after.done(Step::Loaded)?;
        }
        for source in &self.sources {
            let (from, to) = (source.pins.dir().display(), self.target.dir().display());
            tracing::info!(%from, %to, "the maps get another layout");
            let take_place = || self.take_place(source);
            switch(source.ways(maps)?, programs, &self.target.links(), take_place, self.stop_after)?;
            self.retire(source)?;
            tracing::info!("the maps have another layout");
        }
        Ok(())
    }

    /// Gives the directory its name, and moves the links over.
    fn take_place(&self, source: &Source) -> Result<(), OpenError> {
        if self.place != self.target && !self.target.dir().exists() {
            fs::rename(self.place.dir(), self.target.dir()).map_err(pin("move", self.place.dir()))?;
        }
        let (old, new) = (source.pins.links(), self.target.links());
        for name in pins::names(&old).map_err(pin("read", &old))? {
            let (from, to) = (old.join(&name), new.join(&name));
            fs::rename(&from, &to).map_err(pin("move", &from))?;
        }
        Ok(())
    }

    /// The old layout is no more, from one moment to the next: what is left of it cannot be taken for anything.
    fn retire(&self, source: &Source) -> Result<(), OpenError> {
        let old = source.pins.dir();
        let retired = source.pins.retired();
        fs::rename(old, &retired).map_err(pin("move", old))?;
        self.stop_after.done(Step::Retired)?;
        fs::remove_dir_all(&retired).map_err(pin("remove", &retired))
    }
}

impl Source {
    fn open(known: &'static Known, pins: Pins) -> Result<Self, OpenError> {
        let mut maps = BTreeMap::new();
        for spec in &MAPS {
            let path = pins.map(spec.name);
            let fd = match bpf::obj_get(&path) {
                Ok(fd) => fd,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(pin("open pinned map", &path)(error)),
            };
            if bpf::object_kind(fd.as_fd()).map_err(pin("examine", &path))? != bpf::ObjectKind::Map {
                return Err(OpenError::Layout { path, difference: "it is not a map".into() });
            }
            let table = Table::new(fd).map_err(pin("examine", &path))?;
            if let Some(change) = known.changes.iter().find(|change| change.map == spec.name) {
                let (want, have) =
                    ((change.key_size, change.value_size), (table.info.key_size, table.info.value_size));
                if want != have {
                    let difference = format!("entries of {have:?} bytes instead of {want:?}");
                    return Err(OpenError::Layout { path, difference });
                }
            }
            maps.insert(spec.name, table);
        }
        Ok(Self { known, pins, maps })
    }

    /// From the maps that have changed to ours.
    fn ways(&self, maps: &BTreeMap<&'static str, OwnedFd>) -> Result<Vec<Way>, OpenError> {
        let mut ways = vec![];
        for change in self.known.changes {
            let (from, to) = (self.maps.get(change.map), maps.get(change.map));
            if let (Some(from), Some(to), Some(convert)) = (from, to, change.convert) {
                let from = from.try_clone().map_err(|source| OpenError::Carry { map: change.map, source })?;
                ways.push(Way::new(change.map, from, to.as_fd(), convert, change.last_seen)?);
            }
        }
        Ok(ways)
    }
}

fn pin(action: &'static str, path: &Path) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Pin { action, path: path.to_owned(), source }
}
