//! When the file is written: soon after a change, seldom under many of them, and when the agent ends.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use tokio::task::JoinHandle;

use super::{Identity, Kept, file};
use crate::metrics::Metrics;
use crate::model::Objects;

/// How long more changes are waited for after the first.
const CALM: Duration = Duration::from_secs(5);

/// From one write to the next: disks of nodes wear out, and large clusters change all the time.
const PAUSE: Duration = Duration::from_secs(30);

/// Writes the file. It is told of changes by a number that grows with each ([`Keeper::note`]).
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    identity: Identity,
    metrics: Metrics,
    /// What the file has, or will have once it is written.
    kept: Option<u64>,
    /// Since when it has not what it should have.
    changed: Option<Instant>,
    /// Nothing is written before.
    next: Instant,
    /// Under way.
    writing: Option<JoinHandle<std::io::Result<()>>>,
    /// The last write failed, and that was said.
    failing: bool,
}

impl Keeper {
    pub fn new(path: &Path, identity: Identity, metrics: Metrics, now: Instant) -> Self {
        Self {
            path: path.to_owned(),
            identity,
            metrics,
            kept: None,
            changed: None,
            next: now,
            writing: None,
            failing: false,
        }
    }

    /// What was kept, if it is of use.
    pub fn read(&self) -> Option<Kept> {
        let path = self.path.display();
        match file::read(&self.path, &self.identity) {
            Ok(None) => None,
            Ok(Some(kept)) => {
                self.metrics.note_state_written(kept.saved);
                Some(kept)
            }
            Err(error) => {
                tracing::warn!(%path, "the state of an earlier agent is of no use: {error}");
                None
            }
        }
    }

    /// The state has this number now.
    pub fn note(&mut self, revision: u64, now: Instant) {
        if self.kept != Some(revision) {
            self.changed.get_or_insert(now);
        }
    }

    /// When [`Keeper::write`] should be called; none: not before the next change, or the end of a write.
    pub fn next_wake(&self) -> Option<Instant> {
        let free = self.writing.is_none();
        self.changed.filter(|_| free).map(|since| (since + CALM).max(self.next))
    }

    /// Writes the state with this number, in the background.
    pub fn write(&mut self, objects: Objects, revision: u64, now: Instant) {
        let kept = Kept { identity: self.identity.clone(), saved: Timestamp::now().as_second(), objects };
        let path = self.path.clone();
        self.changed = None;
        self.kept = Some(revision);
        self.next = now + PAUSE;
        self.writing = Some(tokio::task::spawn_blocking(move || file::write(&path, &kept)));
    }

    /// Ends when a write has ended; never if none is under way.
    pub async fn written(&mut self) {
        let Some(writing) = &mut self.writing else { return std::future::pending().await };
        let outcome = writing.await.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
        self.writing = None;
        let path = self.path.display();
        match outcome {
            Ok(()) => {
                self.metrics.note_state_written(Timestamp::now().as_second());
                if std::mem::take(&mut self.failing) {
                    tracing::info!(%path, "the state can be kept again");
                }
            }
            Err(error) => {
                self.metrics.note_state_error();
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(
                        %path,
                        "the state cannot be kept: {error}; a node that starts without an API server will not \
                         have it (--state-file)"
                    );
                }
                self.kept = None;
                self.changed.get_or_insert(Instant::now());
            }
        }
    }

    /// Waits for a write under way, and writes what has not been written: the state with this number.
    pub async fn finish(mut self, state: Option<(Objects, u64)>) {
        if self.writing.is_some() {
            self.written().await;
        }
        if let Some((objects, revision)) = state.filter(|(_, revision)| self.kept != Some(*revision)) {
            self.write(objects, revision, Instant::now());
            self.written().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Health;

    fn keeper(path: &Path) -> (Keeper, Instant) {
        let identity = Identity { node: "node-a".into(), cluster: None };
        let now = Instant::now();
        (Keeper::new(path, identity, Metrics::new(&Health::new(true)), now), now)
    }

    #[tokio::test]
    async fn many_changes_are_few_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keeper, start) = keeper(&dir.path().join("state"));
        assert_eq!(keeper.next_wake(), None);
        keeper.note(1, start);
        keeper.note(2, start + CALM / 2);
        assert_eq!(keeper.next_wake(), Some(start + CALM));
        keeper.write(Objects::default(), 2, start + CALM);
        assert_eq!(keeper.next_wake(), None);
        keeper.note(3, start + CALM);
        // One at a time.
        assert_eq!(keeper.next_wake(), None);
        keeper.written().await;
        assert_eq!(keeper.next_wake(), Some(start + CALM + PAUSE));
        keeper.finish(Some((Objects::default(), 3))).await;
    }

    #[tokio::test]
    async fn what_is_written_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (mut first, now) = keeper(&path);
        first.write(Objects::default(), 1, now);
        first.note(1, now);
        assert_eq!(first.changed, None);
        first.written().await;
        std::fs::remove_file(&path).unwrap();
        first.finish(Some((Objects::default(), 1))).await;
        assert!(!path.exists());
        let (second, _) = keeper(&path);
        second.finish(Some((Objects::default(), 1))).await;
        let (third, _) = keeper(&path);
        assert!(third.read().is_some());
        // What it should have, it has not.
        third.finish(None).await;
    }

    #[tokio::test]
    async fn a_write_that_fails_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::create_dir(&path).unwrap();
        let (mut keeper, now) = keeper(&path);
        assert!(keeper.read().is_none());
        keeper.write(Objects::default(), 1, now);
        keeper.written().await;
        assert!(keeper.failing && keeper.next_wake().unwrap() >= now + PAUSE);
        std::fs::remove_dir(&path).unwrap();
        keeper.write(Objects::default(), 1, now);
        keeper.written().await;
        assert!(!keeper.failing && keeper.next_wake().is_none());
        assert!(keeper.read().is_some());
    }
}
