//! Machines that an image can be for, and what it takes to build for them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::process::{self, say};
use crate::{build_ebpf, host, paths};

/// An architecture, by the name that images have for it.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// Of this machine.
    pub fn here() -> Result<Self> {
        let here = Self::ALL.into_iter().find(|arch| arch.machine() == env::consts::ARCH);
        here.with_context(|| {
            format!("no image is made for {}; name another architecture with --arch", env::consts::ARCH)
        })
    }

    /// As the OCI image specification and Go call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As the kernel and compilers call it.
    fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// For rustc. musl: linked statically, a program needs nothing beside it; glibc would look for its own files.
    pub fn target(self) -> String {
        format!("{}-unknown-linux-musl", self.machine())
    }

    /// The C compiler, which is also the linker.
    fn compiler(self) -> String {
        if env::consts::ARCH == self.machine() {
            "cc".to_owned()
        } else {
            format!("{}-linux-gnu-gcc", self.machine())
        }
    }
}

/// Builds the agent that is published: static, and with the kernel programs in it, which are the same everywhere.
pub fn build(arch: Arch) -> Result<PathBuf> {
    let compiler = arch.compiler();
    ensure!(host::find(&compiler).is_some(), no_compiler(arch, &compiler));
    build_ebpf::build()?;
    let target = arch.target();
    let sysroot = paths::sysroot(Path::new("rustc"))?;
    standard_library(&sysroot, &target)?;
    say(format!("building the agent for {target}; this takes a few minutes"));
    let variable = target.replace('-', "_");
    let mut cargo = host::cargo()?;
    cargo
        .args(["build", "--locked", "--profile", PROFILE, "--package", "lb-userspace", "--bin", "fairlead"])
        .args(["--target", &target])
        .arg("--target-dir")
        .arg(host::workspace().join("target"))
        .env(format!("CC_{variable}"), &compiler)
        .env(format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), &compiler)
        .env("CARGO_ENCODED_RUSTFLAGS", paths::remapped(&sysroot, "/fairlead").join("\u{1f}"));
    process::run(&mut cargo)?;
    Ok(host::workspace().join("target").join(target).join(PROFILE).join("fairlead"))
}

/// In `Cargo.toml`.
const PROFILE: &str = "dist";

/// Rust's standard library for `target`; rustup fetches it if it is missing.
fn standard_library(sysroot: &Path, target: &str) -> Result<()> {
    if sysroot.join("lib/rustlib").join(target).join("lib").exists() {
        return Ok(());
    }
    let Some(rustup) = host::find("rustup") else {
        bail!("this toolchain has no standard library for {target}; install it, or rustup, which can");
    };
    say(format!("installing Rust's standard library: rustup target add {target}"));
    process::run(Command::new(rustup).current_dir(host::workspace()).args(["target", "add", target]))
}

fn no_compiler(arch: Arch, compiler: &str) -> String {
    let packages = if compiler == "cc" { ["gcc", "libc6-dev"] } else { cross_packages(arch) };
    format!("there is no `{compiler}` here; run: {}", host::apt_line(&packages, host::is_root()))
}

/// Debian's, on a machine of another architecture.
pub(super) fn cross_packages(arch: Arch) -> [&'static str; 2] {
    match arch {
        Arch::Amd64 => ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
        Arch::Arm64 => ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_to_build_for_another_machine_is_one_line() {
        let line = no_compiler(Arch::Arm64, "aarch64-linux-gnu-gcc");
        assert!(line.starts_with("there is no `aarch64-linux-gnu-gcc` here; run: "), "{line}");
        assert!(line.ends_with(" gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), "{line}");
        assert!(no_compiler(Arch::Amd64, "cc").ends_with(" gcc libc6-dev"));
    }

    #[test]
    fn architectures_have_the_names_of_those_who_read_them() {
        assert_eq!(Arch::ALL.map(Arch::name), ["amd64", "arm64"]);
        assert_eq!(Arch::Arm64.target(), "aarch64-unknown-linux-musl");
    }
}
