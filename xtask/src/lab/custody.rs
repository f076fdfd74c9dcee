//! What a lab owns, and how it is given back: after use, after a panic, after Ctrl-C, and after SIGKILL by
//! whoever starts the next lab.
//!
//! Everything a lab makes carries its prefix: namespaces, cgroup, pins, and a directory in [`RUN`] with a
//! file that its process keeps locked. A directory that nobody has locked, and that was not kept on
//! purpose, belongs to nobody.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use anyhow::{Context, Result, anyhow, bail};

use super::{cgroup, netns};
use crate::host;
use crate::setup::{self, BPFFS};

/// Where labs keep their files.
const RUN: &str = "/run/fairlead-lab";
/// Where agents note what `fairlead cleanup` has to undo, in a file named after their pins.
const AGENT_STATE: &str = "/run/fairlead";
/// What shells report for a process that Ctrl-C ended.
const EXIT_ON_SIGNAL: i32 = 130;
/// In a lab's directory: locked for as long as its process lives.
const LOCK: &str = "lock";
/// In a lab's directory: it stays although its process has ended.
const KEEP: &str = "keep";

/// Labs of this process.
static LIVE: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Held for reading while something is made, for writing while a signal ends everything.
static MAKING: RwLock<()> = RwLock::new(());

/// What a signal does after everything else, before the process ends.
static LAST: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(None);

/// A lab's claim to everything that carries its prefix.
#[derive(Debug)]
pub struct Custody {
    prefix: String,
    dir: PathBuf,
    /// Unlocks when it is closed.
    _lock: File,
}

impl Custody {
    /// Claims a prefix, after everything that dead processes left behind is removed.
    pub fn claim(prefix: &str) -> Result<Self> {
        if !host::is_root() {
            bail!("network namespaces and BPF programs need root: run this as root");
        }
        end_on_signals()?;
        for (abandoned, _claim) in abandoned() {
            tear_down(&abandoned)?;
        }
        let dir = directory(prefix);
        if dir.exists() {
            bail!(
                "the lab {prefix} is in use{}",
                if is_kept(prefix) { ": it was kept on purpose" } else { "" }
            );
        }
        let _making = making();
        // It appears under its name when it is locked: nobody can take it for abandoned.
        let fresh = Path::new(RUN).join(format!(".{prefix}"));
        fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
        let lock = File::create(fresh.join(LOCK)).with_context(|| format!("cannot lock {prefix}"))?;
        lock.try_lock().with_context(|| format!("cannot lock {prefix}"))?;
        fs::rename(&fresh, &dir).with_context(|| format!("cannot make {}", dir.display()))?;
        live().push(prefix.to_owned());
        Ok(Self { prefix: prefix.to_owned(), dir, _lock: lock })
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A directory of the lab's own, for manifests and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The lab stays when its process ends.
    pub fn keep(&self) -> Result<()> {
        File::create(self.dir.join(KEEP)).context("cannot mark the lab as kept")?;
        live().retain(|prefix| *prefix != self.prefix);
        Ok(())
    }

    /// Removes everything that carries the prefix, if the lab is not kept.
    fn release(&self) -> Result<()> {
        // After a signal this waits for the process's end: somebody else takes everything down.
        let _making = making();
        live().retain(|prefix| *prefix != self.prefix);
        if is_kept(&self.prefix) { Ok(()) } else { tear_down(&self.prefix) }
    }
}

impl Drop for Custody {
    fn drop(&mut self) {
        if let Err(err) = self.release() {
            eprintln!("cannot clean up {}: {err:#}", self.prefix);
        }
    }
}

/// Has `undo` done when a signal ends the process, after its labs are taken down.
pub fn undo_on_signals(undo: impl FnOnce() + Send + 'static) -> Result<()> {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(undo));
    end_on_signals()
}

/// To be held while something is made that only its prefix tells from the rest of the machine.
pub fn making() -> RwLockReadGuard<'static, ()> {
    MAKING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a lab of that prefix was left on purpose.
pub fn is_kept(prefix: &str) -> bool {
    directory(prefix).join(KEEP).exists()
}

/// Removes everything that carries the prefix; fine if there is nothing.
pub fn tear_down(prefix: &str) -> Result<()> {
    cgroup::remove_tree(&setup::cgroup2()?.join(prefix))?;
    for pins in named_with_prefix(Path::new(BPFFS), prefix) {
        let removed = if pins.is_dir() { fs::remove_dir_all(&pins) } else { fs::remove_file(&pins) };
        removed.with_context(|| format!("cannot remove {}", pins.display()))?;
        // What the agent wrote down to undo lies in the namespaces that go now.
        let notes = pins.to_string_lossy().trim_matches('/').replace('-', "--").replace('/', "-");
        for kind in ["json", "report"] {
            let _ = fs::remove_file(Path::new(AGENT_STATE).join(format!("{notes}.{kind}")));
        }
    }
    // Works if no other agent has notes there.
    let _ = fs::remove_dir(AGENT_STATE);
    netns::delete(&netns::list(&format!("{prefix}-")))?;
    match fs::remove_dir_all(directory(prefix)) {
        Err(err) if err.kind() != ErrorKind::NotFound => {
            bail!("cannot remove {}: {err}", directory(prefix).display())
        }
        _ => {}
    }
    // Works for the last one only.
    let _ = fs::remove_dir(RUN);
    Ok(())
}

fn directory(prefix: &str) -> PathBuf {
    Path::new(RUN).join(prefix)
}

fn live() -> MutexGuard<'static, Vec<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Labs whose process died without a chance to clean up, each with a claim that keeps others off.
fn abandoned() -> Vec<(String, File)> {
    let Ok(entries) = fs::read_dir(RUN) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let names = names.filter(|name| !name.starts_with('.') && !is_kept(name));
    names.filter_map(|prefix| claim_abandoned(&prefix).map(|lock| (prefix, lock))).collect()
}

fn claim_abandoned(prefix: &str) -> Option<File> {
    let lock = File::open(directory(prefix).join(LOCK)).ok()?;
    lock.try_lock().ok()?;
    Some(lock)
}

/// Entries of a directory that are called `prefix` or `prefix-…`.
fn named_with_prefix(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let ours = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(prefix));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    });
    ours.map(|entry| entry.path()).collect()
}

/// SIGINT, SIGTERM and SIGHUP end the process only after everything is given back.
fn end_on_signals() -> Result<()> {
    static DONE: OnceLock<Result<(), ctrlc::Error>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        ctrlc::set_handler(|| {
            // Whatever is being made is finished first; nothing more is begun.
            let _nothing_more = MAKING.write();
            for prefix in std::mem::take(&mut *live()) {
                if let Err(err) = tear_down(&prefix) {
                    eprintln!("cannot clean up {prefix}: {err:#}");
                }
            }
            if let Some(last) = LAST.lock().unwrap_or_else(PoisonError::into_inner).take() {
                last();
            }
            std::process::exit(EXIT_ON_SIGNAL);
        })
    });
    done.as_ref().map_err(|err| anyhow!("cannot handle signals: {err}")).copied()
}
