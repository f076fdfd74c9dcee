//! Kernel settings of the node's network namespace, and port ranges as the kernel writes them.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Ports that `bind()` and `connect()` do not choose by themselves.
pub const RESERVED_PORTS: &str = "net.ipv4.ip_local_reserved_ports";

const ROOT: &str = "/proc/sys";
/// Where a container sees the node's [`ROOT`].
pub const HOST: &str = "/host/proc/sys";

/// Reads a sysctl by its dotted name, without the newline.
pub fn read(name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path(name))?.trim_end().to_owned())
}

/// Writes a sysctl by its dotted name.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    // A lone newline is how an empty list is written: a write of no bytes changes nothing.
    let value = format!("{value}\n");
    match fs::write(path(name), &value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => write_through_host(name, &value),
        done => done,
    }
}

/// Container runtimes show `/proc/sys` read-only; `deploy/` mounts the node's own beside it.
fn write_through_host(name: &str, value: &str) -> io::Result<()> {
    match fs::write(below(HOST, name), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(io::Error::new(
            io::ErrorKind::ReadOnlyFilesystem,
            format!(
                "{ROOT} is read-only here; mount the node's {ROOT}/net at {HOST}/net, or run before: \
                 sysctl -w {name}={}",
                value.trim_end()
            ),
        )),
        done => done,
    }
}

fn path(name: &str) -> PathBuf {
    below(ROOT, name)
}

fn below(root: &str, name: &str) -> PathBuf {
    Path::new(root).join(name.replace('.', "/"))
}

/// A set of ports in the kernel's notation: `8080,12288-28671`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports(BTreeSet<u16>);

impl Ports {
    pub fn range(range: RangeInclusive<u16>) -> Self {
        Self(range.collect())
    }

    /// `None` if `text` is not a list of ports.
    pub fn parse(text: &str) -> Option<Self> {
        let mut ports = BTreeSet::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.split_once('-') {
                Some((first, last)) => ports.extend(first.parse::<u16>().ok()?..=last.parse().ok()?),
                None => {
                    ports.insert(part.parse().ok()?);
                }
            }
        }
        Some(Self(ports))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(&self.0 | &other.0)
    }

    /// What is here and not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(&self.0 - &other.0)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ports = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = ports.next() {
            let mut last = first;
            while let Some(next) = ports.next_if(|port| last.checked_add(1) == Some(*port)) {
                last = next;
            }
            f.write_str(separator)?;
            separator = ",";
            if first == last { write!(f, "{first}")? } else { write!(f, "{first}-{last}")? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written_as_the_kernel_does() {
        for text in ["", "1", "1-65535", "80,443,8000-8010", "65535", "0-1,3"] {
            assert_eq!(Ports::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Ports::parse("3,1-2").unwrap().to_string(), "1-3");
        for text in ["a", "1-", "70000", "-1"] {
            assert_eq!(Ports::parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_was_added_can_be_taken_away_without_touching_the_rest() {
        let before = Ports::parse("10-20,100").unwrap();
        let ours = Ports::range(15..=30);
        let added = ours.without(&before);
        assert_eq!(added.to_string(), "21-30");
        let now = before.union(&ours).union(&Ports::range(40..=40));
        assert_eq!(now.to_string(), "10-30,40,100");
        assert_eq!(now.without(&added).to_string(), "10-20,40,100");
    }
}
