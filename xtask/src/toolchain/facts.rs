//! What the machine has of the BPF toolchain.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{PACKAGES, Step, TARGET, llvm_package, llvm_prefix};
use crate::{host, process};

/// What the machine has.
#[derive(Clone, Default, Debug)]
pub struct Facts {
    pub root: bool,
    /// Compilers, the preferred one first.
    pub rustcs: Vec<Rustc>,
    /// rustup is there to add components.
    pub rustup: bool,
    /// Linkers, the preferred one first.
    pub linkers: Vec<Linker>,
    /// LLVM's library is there to build bpf-linker with.
    pub llvm: bool,
    /// Packages come from apt.
    pub apt: Option<Apt>,
    /// What was done about it in this run.
    pub tried: Vec<Step>,
}

/// What apt offers of the packages that could help.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Apt {
    pub offers: BTreeMap<String, Version>,
}

/// A compiler.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rustc {
    pub path: PathBuf,
    pub version: Version,
    /// Major version of its LLVM.
    pub llvm: u32,
    pub core: Core,
    /// Its name, if it is a toolchain of rustup's.
    pub toolchain: Option<String>,
}

/// How a compiler gets at `core` for the BPF target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Core {
    Precompiled,
    Sources,
    Missing,
}

/// A bpf-linker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Linker {
    pub path: PathBuf,
    pub version: Version,
    /// Major version of its LLVM, where it can be told.
    pub llvm: Option<u32>,
}

impl Facts {
    /// Looks at the machine (again).
    pub fn look(&mut self) -> Result<()> {
        self.root = host::is_root();
        self.rustcs = rustcs()?;
        self.rustup = host::find("rustup").is_some();
        self.linkers = host::find_all("bpf-linker").iter().filter_map(|path| Linker::probe(path)).collect();
        self.llvm = Path::new(&llvm_prefix()).join("lib/libLLVM.so").exists();
        // Asking apt takes longer than all the rest: only when something is missing.
        let complete =
            self.rustcs.iter().any(|rustc| rustc.core != Core::Missing) && !self.linkers.is_empty();
        self.apt = (!complete && host::has_apt()).then(Apt::ask);
        Ok(())
    }
}

/// The compiler that builds the rest of the workspace, then the distribution's.
fn rustcs() -> Result<Vec<Rustc>> {
    let mut found: Vec<Rustc> = Vec::new();
    let mut paths = Vec::new();
    paths.extend(std::env::var_os("RUSTC").map(PathBuf::from));
    // Behind rustup's proxies, the toolchain's cargo and rustc stand side by side.
    paths.extend(host::cargo_path()?.parent().map(|bin| bin.join("rustc")));
    paths.extend(host::find("rustc"));
    paths.push(PathBuf::from("/usr/bin/rustc"));
    for path in paths.iter().filter(|path| path.components().count() == 1 || path.exists()) {
        // A proxy of rustup's without a toolchain behind it is as good as none.
        if let Ok(rustc) = Rustc::probe(path)
            && !found
                .iter()
                .any(|other| (other.version, &other.toolchain) == (rustc.version, &rustc.toolchain))
        {
            found.push(rustc);
        }
    }
    Ok(found)
}

impl Rustc {
    fn probe(path: &Path) -> Result<Self> {
        let (version, llvm) = parse_rustc(&process::output(Command::new(path).arg("-vV"))?)
            .with_context(|| format!("`{} -vV` does not name versions", path.display()))?;
        let sysroot = process::output(Command::new(path).args(["--print", "sysroot"]))?;
        let sysroot = Path::new(sysroot.trim_end());
        let toolchain = sysroot
            .parent()
            .filter(|parent| parent.ends_with("toolchains"))
            .and_then(|_| Some(sysroot.file_name()?.to_str()?.to_owned()));
        Ok(Self { path: path.to_owned(), version, llvm, core: core_in(sysroot), toolchain })
    }
}

fn core_in(sysroot: &Path) -> Core {
    let rustlib = sysroot.join("lib/rustlib");
    let is_core = |name: &str| name.starts_with("libcore-");
    let precompiled = fs::read_dir(rustlib.join(TARGET).join("lib"))
        .is_ok_and(|dir| dir.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_core)));
    if precompiled {
        Core::Precompiled
    } else if rustlib.join("src/rust/library/core/Cargo.toml").exists() {
        Core::Sources
    } else {
        Core::Missing
    }
}

impl Linker {
    fn probe(path: &Path) -> Option<Self> {
        let version = process::output(Command::new(path).arg("--version")).ok()?;
        let version = parse_linker(&version)?;
        let libraries = process::output(Command::new("ldd").arg(path)).unwrap_or_default();
        let llvm = llvm_of_libraries(&libraries).or_else(|| llvm_in_binary(&fs::read(path).ok()?));
        Some(Self { path: path.to_owned(), version, llvm })
    }
}

impl Apt {
    fn ask() -> Self {
        let names = PACKAGES.iter().flat_map(|(rustc, core)| [(*rustc).to_owned(), (*core).to_owned()]);
        let offers = names
            .chain([llvm_package()])
            .filter_map(|name| {
                let version = Version::parse(&host::apt_candidate(&name)?)?;
                Some((name, version))
            })
            .collect();
        Self { offers }
    }
}

/// Major, minor, patch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The version at the start of `text`: `1.95`, `1.96.0-nightly`, `1:22.1.8-1~deb12u1`.
    pub fn parse(text: &str) -> Option<Self> {
        // Debian's epoch.
        let text = text.split_once(':').map_or(text, |(_, rest)| rest);
        let mut numbers = text.split('.').map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        });
        let major = numbers.next()??;
        let mut next = || numbers.next().flatten().unwrap_or(0);
        Some(Self(major, next(), next()))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Release and LLVM's major version, from `rustc -vV`.
fn parse_rustc(text: &str) -> Option<(Version, u32)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let Version(llvm, ..) = Version::parse(field("LLVM version: ")?)?;
    Some((Version::parse(field("release: ")?)?, llvm))
}

/// From `bpf-linker --version`.
fn parse_linker(text: &str) -> Option<Version> {
    Version::parse(text.trim().strip_prefix("bpf-linker ")?)
}

/// LLVM's major version from the libraries that `ldd` lists: `libLLVM.so.22.1` or `libLLVM-17.so.1`.
fn llvm_of_libraries(ldd: &str) -> Option<u32> {
    ldd.lines().find_map(|line| {
        let name = line.trim().strip_prefix("libLLVM")?;
        let digits = name.strip_prefix(".so.").or_else(|| name.strip_prefix('-'))?;
        Some(Version::parse(digits)?.0)
    })
}

/// LLVM's major version in a binary that has LLVM inside: its bitcode writer signs with `LLVM22.1.8`.
fn llvm_in_binary(bytes: &[u8]) -> Option<u32> {
    let mark = b"LLVM";
    bytes.windows(mark.len()).enumerate().filter(|(_, window)| window == mark).find_map(|(at, _)| {
        let rest = &bytes[at + mark.len()..];
        let len = rest.iter().take(12).take_while(|b| b.is_ascii_digit() || **b == b'.').count();
        let text = std::str::from_utf8(&rest[..len]).ok()?;
        // Two dots: not any number that happens to follow the word.
        if text.matches('.').count() != 2 {
            return None;
        }
        Version::parse(text).map(|version| version.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_rustc_distributions_and_pins_parse() {
        for (text, version) in [
            ("1.95", Version(1, 95, 0)),
            ("1.95.0", Version(1, 95, 0)),
            ("1.97.0-nightly", Version(1, 97, 0)),
            ("1.96.0+dfsg1-1~deb12u2", Version(1, 96, 0)),
            ("1:22.1.8-1~deb12u1", Version(22, 1, 8)),
            ("22", Version(22, 0, 0)),
        ] {
            assert_eq!(Version::parse(text), Some(version), "{text}");
        }
        assert_eq!(Version::parse("unknown"), None);
        assert!(Version(1, 100, 0) > Version(1, 95, 7));
    }

    #[test]
    fn rustc_names_itself_and_its_llvm() {
        let text = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\n\
                    commit-hash: 59807616e1fa2540724bfbac14d7976d7e4a3860\ncommit-date: 2026-04-14\n\
                    host: x86_64-unknown-linux-gnu\nrelease: 1.95.0\nLLVM version: 22.1.2\n";
        assert_eq!(parse_rustc(text), Some((Version(1, 95, 0), 22)));
        assert_eq!(parse_rustc("rustc 1.95.0 (59807616e 2026-04-14)\nrelease: 1.95.0\n"), None);
    }

    #[test]
    fn the_linkers_version_parses() {
        assert_eq!(parse_linker("bpf-linker 0.13.0\n"), Some(Version(0, 13, 0)));
        assert_eq!(parse_linker("ld 2.40"), None);
    }

    #[test]
    fn the_linkers_llvm_is_read_from_its_libraries() {
        let shared = "\tlinux-vdso.so.1 (0x00007fd9c70f3000)\n\
                      \tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x00007fd9bde00000)\n";
        assert_eq!(llvm_of_libraries(shared), Some(22));
        assert_eq!(llvm_of_libraries("\tlibLLVM-17.so.1 => /lib/libLLVM-17.so.1 (0x0)\n"), Some(17));
        assert_eq!(llvm_of_libraries("\tlibc.so.6 => /lib/libc.so.6 (0x0)\n"), None);
    }

    #[test]
    fn the_linkers_llvm_is_read_from_a_static_binary() {
        assert_eq!(llvm_in_binary(b"\0LLVM IR\0LLVM0700\0LLVM22.1.8\0"), Some(22));
        assert_eq!(llvm_in_binary(b"\0LLVM22.1.2-rust-1.95.0-stable\0"), Some(22));
        assert_eq!(llvm_in_binary(b"\0LLVM0700\0LLVM"), None);
    }
}
