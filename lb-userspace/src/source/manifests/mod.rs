//! A directory of manifests instead of an API server: Services, EndpointSlices, Pods and Nodes in YAML or JSON,
//! several documents to a file, `List` kinds included. Other kinds are passed over.
//!
//! The directory (not its subdirectories) is followed: files that are written, renamed or swapped by
//! symbolic link (a mounted ConfigMap) count at once, everything else within seconds. Hidden files and
//! those not named `*.yaml`, `*.yml` or `*.json` are none of ours.
//!
//! A file with a document that cannot be read is named in the log. Its other documents count, and what the
//! file said before and does not say now stays as it was until all of it can be read again. A deleted
//! file takes its objects along. Of an object that two files define the first file by name counts.

mod parse;
mod table;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde_json::Value;

use self::parse::{Parsed, Problems};
use self::table::Table;
use self::watch::{Look, Watch};
use super::{Closed, Event, Kind, Sender};

/// The directory cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--manifests {path}: {source}", path = path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("thread for --manifests: {0}")]
    Thread(io::Error),
}

/// Follows `path` in a thread of its own, until the receiver of `events` is gone.
pub fn follow(path: &Path, events: Sender) -> Result<JoinHandle<()>, Error> {
    let error = |source| Error::Directory { path: path.to_owned(), source };
    // What is wrong from the beginning is a mistake of the caller.
    fs::read_dir(path).map_err(error)?;
    let mut follower = Follower {
        path: path.to_owned(),
        files: BTreeMap::new(),
        table: Table::default(),
        events,
        unreadable: None,
        problems: BTreeMap::new(),
    };
    let thread = std::thread::Builder::new().name("manifests".into());
    // Ends only when nobody listens any more.
    thread
        .spawn(move || match follower.run() {
            Ok(()) | Err(Closed) => {}
        })
        .map_err(Error::Thread)
}

/// The documents of a file that is read once, as they stand there: JSON if it begins as that does, else YAML. Items
/// of `List` kinds stand for themselves. With each that cannot be read goes why.
pub fn documents(file: impl io::Read) -> io::Result<Vec<Result<Value, String>>> {
    let text = parse::text(file)?;
    let is_json = text.trim_start().strip_prefix('{').is_some_and(|rest| rest.trim_start().starts_with('"'));
    let read: Vec<_> = if is_json { parse::json(&text).collect() } else { parse::yaml(&text).collect() };
    Ok(read
        .into_iter()
        .flat_map(|document| document.map_or_else(|error| vec![Err(error)], flattened))
        .collect())
}

/// An object, or those in a list.
pub fn flattened(document: Value) -> Vec<Result<Value, String>> {
    if !document["kind"].as_str().is_some_and(|kind| kind.ends_with("List")) {
        return vec![Ok(document)];
    }
    match parse::items(document) {
        Ok(items) => items.into_iter().flat_map(flattened).collect(),
        Err(error) => vec![Err(error)],
    }
}

/// The manifests in a directory, in the order of their names.
pub fn names_in(path: &Path) -> io::Result<Vec<OsString>> {
    let mut names = vec![];
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name());
    }
    names.retain(is_manifest);
    names.sort();
    Ok(names)
}

struct Follower {
    path: PathBuf,
    /// Every file, as it was when it was last read.
    files: BTreeMap<OsString, Stamp>,
    table: Table,
    events: Sender,
    /// Why the directory could not be read, as was said.
    unreadable: Option<String>,
    /// What is wrong with files, as was said.
    problems: BTreeMap<OsString, Problems>,
}

/// Tells whether a file is what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file that a symbolic link leads to; `None`: a directory.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        let meta = fs::metadata(path)?;
        if !meta.is_file() && !meta.is_dir() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
        }
        Ok(meta.is_file().then(|| Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }))
    }
}

impl Follower {
    fn run(&mut self) -> Result<(), Closed> {
        // Before the first look, so that nothing is missed in between.
        let mut watch = Watch::new(&self.path);
        self.look_at_all()?;
        for kind in [Kind::ServiceCidrs].into_iter().chain(Kind::ALL) {
            self.send(Event::Listed(kind))?;
        }
        loop {
            match watch.next(|| self.events.is_closed()) {
                Some(Look::AtAll) => self.look_at_all()?,
                Some(Look::At(names)) => self.look_at(names, true)?,
                None => return Err(Closed),
            }
        }
    }

    fn look_at_all(&mut self) -> Result<(), Closed> {
        let names = match names_in(&self.path) {
            Ok(names) => names,
            Err(error) => {
                let text = error.to_string();
                if self.unreadable.as_ref() != Some(&text) {
                    tracing::warn!(directory = %self.path.display(), %error, "everything stays as it was");
                    self.unreadable = Some(text);
                }
                return Ok(());
            }
        };
        self.unreadable = None;
        let gone: Vec<OsString> = self.files.keys().filter(|name| !names.contains(name)).cloned().collect();
        self.look_at(names.into_iter().chain(gone), false)
    }

    /// Reads the files that are not what they were, or all of them `anyway`.
    fn look_at(&mut self, names: impl IntoIterator<Item = OsString>, anyway: bool) -> Result<(), Closed> {
        let names: BTreeSet<OsString> = names.into_iter().filter(is_manifest).collect();
        let mut said: Vec<_> =
            names.iter().filter_map(|name| Some((name.clone(), self.read(name, anyway)?))).collect();
        if names.iter().any(|name| !self.files.contains_key(name)) {
            // It may have another name already, of which we are told in a moment: its objects shall not go and come.
            let others =
                names_in(&self.path).unwrap_or_default().into_iter().filter(|name| !names.contains(name));
            said.extend(others.filter_map(|name| self.read(&name, false).map(|parsed| (name, parsed))));
        }
        let before = self.count_problems();
        for (name, parsed) in &said {
            self.note_problems(name, &parsed.problems);
        }
        for change in self.table.update(said) {
            self.send(Event::Changed(change))?;
        }
        match self.count_problems() {
            now if now != before => self.send(Event::Unreadable(None, now)),
            _ => Ok(()),
        }
    }

    fn count_problems(&self) -> usize {
        self.problems.values().map(|problems| problems.count).sum()
    }

    /// Says what is wrong with a file, once for as long as it stays the same.
    fn note_problems(&mut self, name: &OsString, problems: &Problems) {
        if problems.count == 0 {
            self.problems.remove(name);
        } else if self.problems.get(name) != Some(problems) {
            problems.log(&self.path.join(name));
            self.problems.insert(name.clone(), problems.clone());
        }
    }

    /// What the file says; `None`: what it said before.
    fn read(&mut self, name: &OsString, anyway: bool) -> Option<Parsed> {
        let path = self.path.join(name);
        // The stamp first: what is written while the file is read makes another stamp.
        let (stamp, parsed) = match Stamp::of(&path) {
            Ok(Some(stamp)) if !anyway && self.files.get(name) == Some(&stamp) => return None,
            Ok(Some(stamp)) => (Some(stamp), parse::file(&path)),
            Ok(None) => (None, Parsed::default()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (None, Parsed::default()),
            Err(error) => (None, parse::failed(&error)),
        };
        match stamp {
            Some(stamp) => self.files.insert(name.clone(), stamp),
            None => self.files.remove(name),
        };
        Some(parsed)
    }

    fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.blocking_send(event).map_err(|_| Closed)
    }
}

fn is_manifest(name: &OsString) -> bool {
    let path = Path::new(name);
    let hidden = name.as_encoded_bytes().starts_with(b".");
    let kind = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(kind, Some("yaml" | "yml" | "json"))
}

#[cfg(test)]
mod tests;
