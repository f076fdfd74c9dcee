//! The toolchain of the kernel programs: rustc with a `core` for the BPF target, and bpf-linker.
//!
//! They are one unit: bpf-linker reads the LLVM bitcode that rustc writes, so its LLVM must be at least as
//! new. What is supported is written down here and nowhere else; the oldest rustc is `rust-version` of the
//! workspace.
//!
//! [`Facts`] say what the machine has, [`decide`] what to do next, [`ready`] does it until nothing is left.

mod facts;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

pub use self::facts::{Apt, Core, Facts, Linker, Rustc, Version};
use crate::host;
use crate::process::{self, say};

/// Oldest rustc.
pub const RUSTC: &str = env!("CARGO_PKG_RUST_VERSION");
/// LLVM that bpf-linker is built with where we install it. Rust 1.95 and 1.96 have this one.
pub const LLVM: u32 = 22;
/// bpf-linker that we install, and the oldest we take.
pub const BPF_LINKER: &str = "0.13.0";

/// Target of the kernel programs: they share their maps with the agent, in host byte order.
pub const TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// Distributions' packages with a precompiled `core` for BPF: (compiler, library).
const PACKAGES: [(&str, &str); 2] =
    [("rustc-web", "libstd-rust-web-dev-bpf"), ("rustc", "libstd-rust-dev-bpf")];

/// A toolchain that fits together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Toolchain {
    pub rustc: PathBuf,
    /// `core` has to be compiled along (`-Z build-std`).
    pub build_std: bool,
    pub linker: PathBuf,
}

/// Finds the toolchain, and sets up what is missing.
pub fn ready() -> Result<Toolchain> {
    let mut facts = Facts::default();
    loop {
        facts.look()?;
        let step = match decide(&facts).map_err(anyhow::Error::msg)? {
            Decision::Ready(toolchain) => return Ok(toolchain),
            Decision::Do(step) => step,
        };
        if facts.tried.contains(&step) {
            bail!("{step:?} changed nothing; the BPF toolchain has to be set up by hand (found: {facts:?})");
        }
        perform(&step)?;
        facts.tried.push(step);
    }
}

fn perform(step: &Step) -> Result<()> {
    match step {
        Step::AptUpdate => host::apt_update(),
        Step::Apt(packages) => host::apt_install(packages),
        Step::RustSrc(toolchain) => {
            let mut command = Command::new(host::find("rustup").context("rustup is gone")?);
            command.args(["component", "add", "rust-src", "--toolchain", toolchain]);
            say(format!("adding the sources of Rust's core library: {}", process::show(&command)));
            // Offline this fails; a distribution's mirror may still be there.
            if let Err(error) = process::run(&mut command) {
                say(format!("{error:#}"));
            }
            Ok(())
        }
        Step::Linker => {
            say(format!("building bpf-linker, once, in about a minute: {}", linker_line()));
            let mut command = host::cargo()?;
            command.args(linker_args()).env("LLVM_PREFIX", llvm_prefix());
            command.env("PATH", host::path_with(&Path::new(&llvm_prefix()).join("bin")));
            // Flags meant for the user's own programs are none of its business.
            command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
            process::run(&mut command)
        }
    }
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    Ready(Toolchain),
    Do(Step),
}

/// One change to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Refresh apt's lists.
    AptUpdate,
    /// Install packages.
    Apt(Vec<String>),
    /// Add rust-src to this toolchain of rustup's.
    RustSrc(String),
    /// Build and install bpf-linker.
    Linker,
}

/// What to do next, given what is there. The error is one line that says what to run by hand.
pub fn decide(facts: &Facts) -> Result<Decision, String> {
    let able = |rustc: &&Rustc| rustc.core != Core::Missing && rustc.version >= oldest(RUSTC);
    let able: Vec<&Rustc> = facts.rustcs.iter().filter(able).collect();
    let pair = able.iter().find_map(|rustc| {
        let linker = facts.linkers.iter().find(|linker| misfit(linker, rustc).is_none())?;
        Some((rustc, linker))
    });
    if let Some((rustc, linker)) = pair {
        return Ok(Decision::Ready(Toolchain {
            rustc: rustc.path.clone(),
            build_std: rustc.core == Core::Sources,
            linker: linker.path.clone(),
        }));
    }
    match (able.iter().find(|rustc| rustc.llvm <= LLVM), able.first(), facts.linkers.first()) {
        (Some(_), _, None) => get_linker(facts),
        (Some(rustc), _, Some(linker)) => {
            let why = misfit(linker, rustc).unwrap_or_default();
            Err(format!("{why}; run: {}", by_hand(facts)))
        }
        (None, Some(rustc), _) => Err(too_new(rustc)),
        (None, None, _) => get_rustc(facts),
    }
}

/// No compiler can build for the target.
fn get_rustc(facts: &Facts) -> Result<Decision, String> {
    let recent = |rustc: &&Rustc| rustc.version >= oldest(RUSTC) && rustc.llvm <= LLVM;
    if facts.rustup
        && let Some(toolchain) = facts.rustcs.iter().filter(recent).find_map(|r| r.toolchain.clone())
        && let step = Step::RustSrc(toolchain)
        && !facts.tried.contains(&step)
    {
        return Ok(Decision::Do(step));
    }
    if let Some(apt) = &facts.apt {
        let new = |name: &str| apt.offers.get(name).is_some_and(|version| *version >= oldest(RUSTC));
        if let Some((rustc, core)) = PACKAGES.into_iter().find(|(rustc, core)| new(rustc) && new(core)) {
            return if facts.root {
                Ok(Decision::Do(Step::Apt(vec![rustc.to_owned(), core.to_owned()])))
            } else {
                Err(format!(
                    "no rustc here has a core library for {TARGET}; run: {}",
                    host::apt_line(&[rustc, core], facts.root)
                ))
            };
        }
        if facts.root && !facts.tried.contains(&Step::AptUpdate) {
            return Ok(Decision::Do(Step::AptUpdate));
        }
    }
    let why = match facts.rustcs.first() {
        None => "no rustc was found".to_owned(),
        Some(rustc) if rustc.version < oldest(RUSTC) => {
            format!("rustc {} is older than {RUSTC}", rustc.version)
        }
        Some(rustc) if rustc.llvm > LLVM => return Err(too_new(rustc)),
        Some(rustc) => format!("rustc {} has no core library for {TARGET}", rustc.version),
    };
    Err(format!("{why}; run: {}", other_toolchain()))
}

/// There is a compiler and no linker.
fn get_linker(facts: &Facts) -> Result<Decision, String> {
    if facts.llvm {
        return Ok(Decision::Do(Step::Linker));
    }
    let package = llvm_package();
    let offered = facts.apt.as_ref().is_some_and(|apt| apt.offers.contains_key(&package));
    if facts.root && offered {
        return Ok(Decision::Do(Step::Apt(vec![package])));
    }
    if facts.root && facts.apt.is_some() && !facts.tried.contains(&Step::AptUpdate) {
        return Ok(Decision::Do(Step::AptUpdate));
    }
    if offered {
        return Err(format!("bpf-linker is missing; run: {}", by_hand(facts)));
    }
    Err(format!(
        "bpf-linker is missing and no package {package} to build it with; install bpf-linker {BPF_LINKER} or \
         newer with LLVM {LLVM} or newer: https://github.com/aya-rs/bpf-linker#installation"
    ))
}

/// Why this linker cannot link what this compiler writes.
fn misfit(linker: &Linker, rustc: &Rustc) -> Option<String> {
    let path = linker.path.display();
    if linker.version < oldest(BPF_LINKER) {
        return Some(format!("{path} is version {}, older than {BPF_LINKER}", linker.version));
    }
    let llvm = linker.llvm.filter(|llvm| *llvm < rustc.llvm)?;
    Some(format!("{path} has LLVM {llvm}, rustc {} has LLVM {}", rustc.version, rustc.llvm))
}

fn too_new(rustc: &Rustc) -> String {
    format!(
        "rustc {} has LLVM {}, newer than LLVM {LLVM} of this Fairlead's bpf-linker; run: {}",
        rustc.version,
        rustc.llvm,
        other_toolchain()
    )
}

/// The command that replaces bpf-linker by ours.
fn by_hand(facts: &Facts) -> String {
    let package = llvm_package();
    let apt = (!facts.llvm && facts.apt.is_some())
        .then(|| format!("{} && ", host::apt_line(&[&package], facts.root)));
    format!("{}{}", apt.unwrap_or_default(), linker_line())
}

fn other_toolchain() -> String {
    format!(
        "rustup toolchain install {RUSTC}.0 --component rust-src && RUSTUP_TOOLCHAIN={RUSTC}.0 cargo xtask \
         build-ebpf"
    )
}

fn llvm_package() -> String {
    format!("llvm-{LLVM}-dev")
}

/// Where the package puts LLVM.
fn llvm_prefix() -> String {
    format!("/usr/lib/llvm-{LLVM}")
}

fn linker_args() -> Vec<String> {
    format!("install bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{LLVM} --locked --force")
        .split(' ')
        .map(str::to_owned)
        .collect()
}

fn linker_line() -> String {
    format!("LLVM_PREFIX={} cargo {}", llvm_prefix(), linker_args().join(" "))
}

fn oldest(pin: &str) -> Version {
    Version::parse(pin).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rustc(core: Core) -> Rustc {
        Rustc {
            path: "/rustup/bin/rustc".into(),
            version: Version(1, 95, 0),
            llvm: 22,
            core,
            toolchain: Some("stable-x86_64-unknown-linux-gnu".to_owned()),
        }
    }

    fn distribution_rustc() -> Rustc {
        let path = "/usr/bin/rustc".into();
        Rustc { path, version: Version(1, 96, 0), toolchain: None, ..rustc(Core::Precompiled) }
    }

    fn bpf_linker() -> Linker {
        Linker { path: "/bin/bpf-linker".into(), version: Version(0, 13, 0), llvm: Some(22) }
    }

    fn bookworm() -> Apt {
        let offers = [
            ("rustc-web", Version(1, 96, 0)),
            ("libstd-rust-web-dev-bpf", Version(1, 96, 0)),
            ("rustc", Version(1, 63, 0)),
            ("llvm-22-dev", Version(22, 1, 8)),
        ];
        Apt { offers: offers.map(|(name, version)| (name.to_owned(), version)).into() }
    }

    /// A machine of root's with rustup, the right compiler and Debian's packages; nothing else.
    fn bare() -> Facts {
        Facts {
            root: true,
            rustcs: vec![rustc(Core::Missing)],
            rustup: true,
            apt: Some(bookworm()),
            ..Facts::default()
        }
    }

    fn step(facts: &Facts) -> Step {
        match decide(facts) {
            Ok(Decision::Do(step)) => step,
            other => panic!("no step: {other:?}"),
        }
    }

    /// One line that ends in the command to run.
    fn advice(facts: &Facts) -> String {
        let line = decide(facts).unwrap_err();
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn a_complete_toolchain_is_used_as_it_is() {
        let mut facts = Facts {
            rustcs: vec![rustc(Core::Sources), distribution_rustc()],
            linkers: vec![bpf_linker()],
            ..Facts::default()
        };
        let toolchain = |rustc: &str, build_std| {
            Ok(Decision::Ready(Toolchain {
                rustc: rustc.into(),
                build_std,
                linker: "/bin/bpf-linker".into(),
            }))
        };
        assert_eq!(decide(&facts), toolchain("/rustup/bin/rustc", true));
        facts.rustcs[0].core = Core::Missing;
        assert_eq!(decide(&facts), toolchain("/usr/bin/rustc", false));
        facts.rustcs[0].core = Core::Precompiled;
        assert_eq!(decide(&facts), toolchain("/rustup/bin/rustc", false));
    }

    #[test]
    fn a_compiler_that_fits_the_linker_is_preferred_to_a_newer_one() {
        let facts = Facts {
            rustcs: vec![Rustc { llvm: 23, ..rustc(Core::Sources) }, distribution_rustc()],
            linkers: vec![Linker { version: Version(0, 9, 0), ..bpf_linker() }, bpf_linker()],
            ..Facts::default()
        };
        let Ok(Decision::Ready(toolchain)) = decide(&facts) else { panic!("{:?}", decide(&facts)) };
        assert_eq!(toolchain.rustc, Path::new("/usr/bin/rustc"));
    }

    #[test]
    fn a_bare_machine_is_set_up_step_by_step() {
        let mut facts = bare();
        assert_eq!(step(&facts), Step::RustSrc("stable-x86_64-unknown-linux-gnu".to_owned()));
        facts.rustcs[0].core = Core::Sources;
        assert_eq!(step(&facts), Step::Apt(vec!["llvm-22-dev".to_owned()]));
        facts.llvm = true;
        assert_eq!(step(&facts), Step::Linker);
        facts.linkers.push(bpf_linker());
        assert!(matches!(decide(&facts), Ok(Decision::Ready(_))));
    }

    #[test]
    fn offline_the_distributions_packages_are_taken() {
        let mut facts = bare();
        facts.tried.push(step(&facts));
        let packages = ["rustc-web", "libstd-rust-web-dev-bpf"].map(str::to_owned);
        assert_eq!(step(&facts), Step::Apt(packages.into()));
    }

    #[test]
    fn lists_of_packages_are_refreshed_once_before_giving_up() {
        let mut facts = Facts { rustup: false, apt: Some(Apt::default()), ..bare() };
        assert_eq!(step(&facts), Step::AptUpdate);
        facts.tried.push(Step::AptUpdate);
        assert!(advice(&facts).contains("rustup toolchain install 1.95.0 --component rust-src"));

        facts.rustcs[0].core = Core::Sources;
        assert!(advice(&facts).contains("no package llvm-22-dev"));
        facts.tried.clear();
        assert_eq!(step(&facts), Step::AptUpdate);
    }

    #[test]
    fn packages_that_are_too_old_are_not_installed() {
        let mut facts = Facts { rustup: false, tried: vec![Step::AptUpdate], ..bare() };
        let offers = &mut facts.apt.as_mut().unwrap().offers;
        offers.insert("rustc-web".to_owned(), Version(1, 85, 0));
        offers.insert("libstd-rust-web-dev-bpf".to_owned(), Version(1, 85, 0));
        assert!(advice(&facts).starts_with("rustc 1.95.0 has no core library for "));
    }

    #[test]
    fn without_root_nothing_is_installed_and_the_line_says_what_to_run() {
        let mut facts = Facts { root: false, rustup: false, ..bare() };
        assert!(advice(&facts).ends_with(
            "run: sudo apt-get install -y --no-install-recommends rustc-web libstd-rust-web-dev-bpf"
        ));
        facts.rustcs.push(distribution_rustc());
        assert!(advice(&facts).contains(
            "run: sudo apt-get install -y --no-install-recommends llvm-22-dev && \
             LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0"
        ));
        facts.llvm = true;
        assert_eq!(step(&facts), Step::Linker);
    }

    #[test]
    fn a_linker_with_an_older_llvm_is_named() {
        let old = Linker { llvm: Some(21), ..bpf_linker() };
        let facts = Facts { rustcs: vec![distribution_rustc()], linkers: vec![old], llvm: true, ..bare() };
        assert_eq!(
            advice(&facts),
            "/bin/bpf-linker has LLVM 21, rustc 1.96.0 has LLVM 22; run: LLVM_PREFIX=/usr/lib/llvm-22 cargo \
             install bpf-linker --version 0.13.0 --no-default-features --features llvm-22 --locked --force"
        );
        let ancient = Linker { version: Version(0, 9, 15), ..bpf_linker() };
        assert!(
            advice(&Facts { linkers: vec![ancient], ..facts })
                .starts_with("/bin/bpf-linker is version 0.9.15, older than 0.13.0; run: ")
        );
    }

    #[test]
    fn a_linker_whose_llvm_cannot_be_told_is_tried() {
        let unknown = Linker { llvm: None, ..bpf_linker() };
        let facts = Facts { rustcs: vec![distribution_rustc()], linkers: vec![unknown], ..bare() };
        assert!(matches!(decide(&facts), Ok(Decision::Ready(_))));
    }

    #[test]
    fn a_compiler_beyond_our_llvm_is_named() {
        let new = Rustc { version: Version(1, 99, 0), llvm: 23, ..rustc(Core::Sources) };
        let facts = Facts { rustcs: vec![new], linkers: vec![bpf_linker()], ..bare() };
        assert!(advice(&facts).starts_with("rustc 1.99.0 has LLVM 23, newer than LLVM 22 "));
        let newer = Linker { llvm: Some(23), ..bpf_linker() };
        assert!(matches!(decide(&Facts { linkers: vec![newer], ..facts }), Ok(Decision::Ready(_))));
    }

    #[test]
    fn an_old_compiler_is_named() {
        let old = Rustc { version: Version(1, 94, 9), ..rustc(Core::Sources) };
        let facts = Facts { rustcs: vec![old], apt: None, ..bare() };
        assert!(advice(&facts).starts_with("rustc 1.94.9 is older than 1.95; run: rustup "));
    }
}
