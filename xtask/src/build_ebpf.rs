//! `cargo xtask build-ebpf`: from `lb-ebpf` to the object that the agent embeds.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

use crate::btf;
use crate::host;
use crate::paths;
use crate::process::{self, say};
use crate::toolchain::{self, TARGET, Toolchain};

/// Build the kernel programs, which the agent embeds when it is built.
///
/// Needs rustc with a core library for the BPF target and bpf-linker. Uses what it finds (rust-src of the
/// active toolchain, or a distribution's precompiled core library) and installs what is missing.
#[derive(clap::Args)]
pub struct Args {
    /// Run clippy on them as well, for the BPF target, and deny warnings
    #[arg(long)]
    clippy: bool,
}

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    let object = build()?;
    say(format!("kernel programs: {}", object.display()));
    if args.clippy { clippy() } else { Ok(()) }
}

/// Where the object is, independent of where cargo was told to build the agent.
pub fn object() -> PathBuf {
    target_dir().join("fairlead.bpf.o")
}

/// Its own target directory: a build of the agent holds a lock on the other one.
fn target_dir() -> PathBuf {
    host::workspace().join("target/bpf")
}

/// Builds the object and gives back its path. The file is left alone if nothing was compiled, so that the
/// agent that embeds it is not built again for nothing; otherwise it is newer than all its sources, which
/// the agent's build script checks.
pub fn build() -> Result<PathBuf> {
    let toolchain = toolchain::ready()?;
    process::run(&mut cargo("build", &toolchain)?)?;
    let built = target_dir().join(TARGET).join("release/lb-ebpf");
    let object = object();
    if modified(&object).is_none_or(|written| modified(&built).is_none_or(|built| built > written)) {
        let mut bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        ensure!(is_bpf(&bytes), "{} is no BPF object; it was built for another target", built.display());
        btf::characters(&mut bytes)?;
        replace(&object, &without_debug_info(&bytes)?)
            .with_context(|| format!("cannot write {}", object.display()))?;
    }
    Ok(object)
}

fn clippy() -> Result<()> {
    let toolchain = toolchain::ready()?;
    if !toolchain.build_std {
        // Clippy reads only what its own compiler has written, and a distribution's `core` is by another.
        say("no clippy for the BPF target: it needs the component rust-src of the active toolchain");
        return Ok(());
    }
    process::run(cargo("clippy", &toolchain)?.args(["--", "--deny", "warnings"]))
}

fn cargo(subcommand: &str, toolchain: &Toolchain) -> Result<Command> {
    let mut command = host::cargo()?;
    for name in env::vars_os().filter_map(|(name, _)| name.into_string().ok()).filter(|name| leaks(name)) {
        command.env_remove(name);
    }
    command
        .arg(subcommand)
        .args(["--locked", "--release", "--package", "lb-ebpf", "--target", TARGET])
        .arg("--target-dir")
        .arg(target_dir())
        .env("RUSTC", &toolchain.rustc)
        // The BPF target has nightly features only; the toolchain is pinned, so it is known to have them.
        .env("RUSTC_BOOTSTRAP", "1")
        // This variable beats every other source of flags, the user's configuration files included.
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&toolchain.linker, &paths::sysroot(&toolchain.rustc)?));
    if toolchain.build_std {
        command.args(["-Z", "build-std=core"]);
    }
    Ok(command)
}

/// Sources are called what the linker, which starts in the workspace, finds them by: their lines become a part of BTF.
fn rustflags(linker: &Path, sysroot: &Path) -> String {
    let flags = [
        &format!("-Clinker={}", linker.display()),
        // BTF is made from debug information; the maps' key and value types are in it.
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // Otherwise even six bytes are cleared by a call of `memset`, with a stack frame of its own.
        "-Clink-arg=--disable-expand-memcpy-in-order",
    ];
    let remapped = paths::remapped(sysroot, ".");
    flags.into_iter().map(str::to_owned).chain(remapped).collect::<Vec<_>>().join("\u{1f}")
}

/// Whether a variable of the environment would change how the kernel programs are compiled: flags and
/// profiles that are meant for host programs, and wrappers such as clippy's driver.
fn leaks(name: &str) -> bool {
    let prefixes = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_"];
    let names = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS"];
    names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|meta| meta.modified()).ok()
}

/// `EM_BPF` in the ELF header.
fn is_bpf(object: &[u8]) -> bool {
    let machine = object.get(18..20).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    object.starts_with(b"\x7fELF") && machine == Some(247)
}

/// The kernel reads BTF alone; DWARF, of which it was made, is three quarters of the object.
fn without_debug_info(object: &[u8]) -> Result<Vec<u8>> {
    let strip = || -> Result<Vec<u8>, object::build::Error> {
        let mut elf = Builder::read(object)?;
        for section in &mut elf.sections {
            let name = section.name.as_slice();
            section.delete = [&b".debug_"[..], b".rel.debug_"].iter().any(|prefix| name.starts_with(prefix));
        }
        elf.delete_orphans();
        // LLVM has one section for all strings, which is written as two.
        let names = elf.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
        let mut stripped = Vec::new();
        elf.write(&mut stripped)?;
        Ok(stripped)
    };
    strip().context("debug information cannot be taken out of the kernel programs")
}

/// Never leaves half a file behind.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_for_host_programs_do_not_reach_the_kernel_programs() {
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"] {
            assert!(leaks(name), "{name}");
        }
        for name in ["CARGO_PROFILE_RELEASE_LTO", "RUSTC_WRAPPER", "CARGO_BUILD_RUSTFLAGS"] {
            assert!(leaks(name), "{name}");
        }
        for name in ["CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "CARGO_NET_OFFLINE", "HOME", "PATH"] {
            assert!(!leaks(name), "{name}");
        }
    }

    #[test]
    fn flags_are_separated_as_cargo_wants_it() {
        let flags = rustflags(Path::new("/home/a b/bpf-linker"), Path::new("/a b/toolchain"));
        let flags: Vec<&str> = flags.split('\u{1f}').collect();
        let (flags, remapped) = flags.split_at(4);
        assert!(remapped.contains(&"--remap-path-prefix=/a b/toolchain=/rust"), "{remapped:?}");
        assert_eq!(
            flags,
            [
                "-Clinker=/home/a b/bpf-linker",
                "-Cdebuginfo=2",
                "-Clink-arg=--btf",
                "-Clink-arg=--disable-expand-memcpy-in-order"
            ]
        );
    }

    #[test]
    fn only_bpf_objects_pass() {
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0".to_vec();
        elf.extend(247_u16.to_ne_bytes());
        assert!(is_bpf(&elf));
        elf.truncate(18);
        elf.extend(62_u16.to_ne_bytes());
        assert!(!is_bpf(&elf));
        assert!(!is_bpf(b"\x7fELF"));
        assert!(!is_bpf(b""));
    }
}
