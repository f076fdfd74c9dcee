//! When to look at the directory again, and at what.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

/// How long a file that is being written is left alone, if nobody says that it is finished.
const WRITING: Duration = Duration::from_millis(100);

/// How often everything is looked at without a reason: not every file system tells what happens on it.
const PERIOD: Duration = Duration::from_secs(5);

/// How often the thread sees whether it is still needed.
const TICK: Duration = Duration::from_millis(500);

/// What to look at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Look {
    AtAll,
    At(BTreeSet<OsString>),
}

/// Watches one directory.
pub(super) struct Watch {
    path: PathBuf,
    sender: Sender<notify::Result<Event>>,
    events: Receiver<notify::Result<Event>>,
    watcher: Option<RecommendedWatcher>,
    /// The directory that is watched: another one may be at its path by now.
    watched: Option<(u64, u64)>,
    next_period: Instant,
}

impl Watch {
    pub(super) fn new(path: &Path) -> Self {
        let (sender, events) = channel();
        let next_period = Instant::now() + PERIOD;
        let path = path.to_owned();
        let mut this = Self { path, sender, events, watcher: None, watched: None, next_period };
        this.renew();
        this
    }

    /// Waits for a reason to look. `None`: `stop` says so.
    pub(super) fn next(&mut self, stop: impl Fn() -> bool) -> Option<Look> {
        let mut collected = Collected::default();
        loop {
            let now = Instant::now();
            if now >= self.next_period {
                self.next_period = now + PERIOD;
                self.renew();
                return Some(Look::AtAll);
            }
            if let Some(look) = collected.due(now) {
                return Some(look);
            }
            if stop() {
                return None;
            }
            let until = collected.until.map_or(TICK, |until| until.saturating_duration_since(now));
            let first = match self.events.recv_timeout(until.min(TICK)) {
                Ok(first) => first,
                // There is always a sender: our own.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => continue,
            };
            // A file that is renamed has two names, and they come together.
            for event in std::iter::once(first).chain(self.events.try_iter()) {
                match event {
                    Ok(event) => collected.note(&self.path, &event, now),
                    Err(error) => {
                        tracing::debug!(%error, "something was lost");
                        collected.all = true;
                    }
                }
            }
        }
    }

    /// Watches the directory that is at the path now.
    fn renew(&mut self) {
        let now = fs::metadata(&self.path).ok().map(|meta| (meta.dev(), meta.ino()));
        if now.is_some() && now == self.watched {
            return;
        }
        let sender = self.sender.clone();
        let watcher = notify::recommended_watcher(move |event| {
            // The receiver is gone only when this is dropped, too.
            let _ = sender.send(event);
        });
        let watcher = watcher.and_then(|mut watcher| {
            watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                self.watched = now;
            }
            Err(error) => {
                if self.watcher.take().is_some() || self.watched.is_none() {
                    tracing::warn!(%error, "changes in the directory are seen only every {PERIOD:?}");
                }
                self.watched = now;
            }
        }
    }
}

/// Events that wait to be acted upon.
#[derive(Debug, Default)]
struct Collected {
    all: bool,
    names: BTreeSet<OsString>,
    /// Files that are being written.
    writing: BTreeSet<OsString>,
    /// When to stop waiting for them.
    until: Option<Instant>,
}

impl Collected {
    fn note(&mut self, directory: &Path, event: &Event, now: Instant) {
        if event.need_rescan() {
            self.all = true;
            return;
        }
        let finished = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(_)) => true,
            EventKind::Create(_) | EventKind::Modify(_) => false,
            EventKind::Any | EventKind::Other => {
                self.all = true;
                return;
            }
            EventKind::Access(_) => return,
        };
        for path in &event.paths {
            let name = path.strip_prefix(directory).ok().and_then(|name| name.file_name());
            let Some(name) = name.map(ToOwned::to_owned) else {
                // The directory itself.
                self.all = true;
                continue;
            };
            if name.as_encoded_bytes().starts_with(b"..") {
                // A mounted ConfigMap changes by swapping the directory `..data`.
                self.all = true;
            } else if finished {
                self.writing.remove(&name);
                self.names.insert(name);
            } else {
                self.until.get_or_insert(now + WRITING);
                self.writing.insert(name);
            }
        }
    }

    fn due(&mut self, now: Instant) -> Option<Look> {
        if self.all {
            return Some(Look::AtAll);
        }
        if self.until.is_some_and(|until| until <= now) || self.writing.is_empty() {
            self.names.append(&mut self.writing);
            self.until = None;
        }
        (!self.names.is_empty()).then(|| Look::At(std::mem::take(&mut self.names)))
    }
}
