//! Taking everything away again, with no agent running.

use std::fs;
use std::io;
use std::path::Path;

use super::clsact;
use super::error::CleanupError;
use super::hooks::{device_name, remove_link};
use super::node::{self, StateFile};
use super::pins::{self, Pins};
use crate::report;
use crate::sys::sysctl;

/// Removes every link, filter, program, map and setting of the agent with this `--bpffs`; what was
/// removed, one line each. Nothing there is fine.
pub async fn cleanup(bpffs: &Path) -> Result<Vec<String>, CleanupError> {
    let mut done = Vec::new();
    let pins = Pins::new(bpffs);
    // Held until the end: an agent that starts now would be taken apart while it builds.
    let _lock = if bpffs.is_dir() {
        let remove = |source| CleanupError::Remove { path: bpffs.to_owned(), source };
        let lock = pins.lock().map_err(remove)?;
        Some(lock.ok_or_else(|| CleanupError::Busy { path: bpffs.to_owned() })?)
    } else {
        None
    };
    remove_pins(bpffs, &mut done)?;
    let state_file = StateFile::new(bpffs);
    let state = state_file.read().unwrap_or_default();
    remove_filters(&state, &mut done).await?;
    let sysctl = |source| CleanupError::Sysctl { name: sysctl::RESERVED_PORTS, source };
    if node::release_ports(&state).map_err(sysctl)? {
        done.push(format!("ports {} in {}", state.reserved_ports, sysctl::RESERVED_PORTS));
    }
    report::remove(bpffs).map_err(|source| CleanupError::Remove { path: report::path(bpffs), source })?;
    let removed = state_file.remove();
    removed.map_err(|source| CleanupError::Remove { path: bpffs.to_owned(), source })?;
    Ok(done)
}

/// Every layout version: an upgrade may have left an older one behind.
fn remove_pins(bpffs: &Path, done: &mut Vec<String>) -> Result<(), CleanupError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| CleanupError::Remove { path, source }
    };
    for version in pins::names(bpffs).map_err(fail(bpffs))?.iter().filter(|name| is_layout(name)) {
        let dir = bpffs.join(version);
        let links = dir.join("links");
        for name in pins::names(&links).map_err(fail(&links))? {
            let path = links.join(&name);
            if remove_link(&path).map_err(fail(&path))? {
                done.push(format!("link {}", path.display()));
            }
        }
        remove_tree(&dir, done)?;
    }
    match fs::remove_dir(bpffs) {
        Ok(()) => done.push(format!("directory {}", bpffs.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // It holds what is not ours, or a file system is mounted there.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => {}
        Err(error) => return Err(fail(bpffs)(error)),
    }
    Ok(())
}

fn remove_tree(dir: &Path, done: &mut Vec<String>) -> Result<(), CleanupError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| CleanupError::Remove { path, source }
    };
    for name in pins::names(dir).map_err(fail(dir))? {
        let path = dir.join(name);
        if path.is_dir() {
            remove_tree(&path, done)?;
        } else {
            fs::remove_file(&path).map_err(fail(&path))?;
            done.push(format!("pin {}", path.display()));
        }
    }
    fs::remove_dir(dir).map_err(fail(dir))
}

async fn remove_filters(state: &node::State, done: &mut Vec<String>) -> Result<(), CleanupError> {
    let fail = |error: &dyn std::fmt::Display| CleanupError::Netlink(error.to_string());
    let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| fail(&error))?;
    let connection = tokio::spawn(connection);
    let work = async {
        for (ifindex, place) in clsact::filters(&handle).await? {
            clsact::detach(&handle, ifindex, place).await?;
            done.push(format!("tc filter {} on {}", place.program(), device_name(ifindex)));
        }
        for ifindex in &state.clsact {
            let device = device_name(*ifindex);
            if clsact::remove_qdisc_if_empty(&handle, *ifindex).await? {
                done.push(format!("clsact qdisc on {device}"));
            }
        }
        Ok::<(), rtnetlink::Error>(())
    };
    let result = work.await.map_err(|error| fail(&error));
    connection.abort();
    result
}

fn is_layout(name: &str) -> bool {
    pins::parse_version(name).is_some() || pins::is_leftover(name)
}
