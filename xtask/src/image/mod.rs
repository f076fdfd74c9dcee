//! `cargo xtask image`: a container image of the agent, without a container engine.
//!
//! It has one static program and what the law wants beside it. The same sources make the same bytes: every file is
//! root's, everything was made when the commit was.

pub mod arch;
pub mod oci;
pub mod sbom;
pub mod stamp;
pub mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use self::arch::Arch;
use self::oci::PROGRAM;
use self::stamp::Stamp;
use self::tree::{Tree, read};
use crate::host;
use crate::process::say;

/// Build a container image of the agent: an OCI layout in a tar archive, which docker can load, too.
///
/// Needs no container engine. The image has the agent, linked statically, the licences and a bill of materials
/// (CycloneDX), which is also written beside it. The same commit makes the same bytes.
#[derive(clap::Args)]
pub struct Args {
    /// The archive [default: target/image/fairlead-VERSION-ARCH.tar]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What it is for [default: this machine]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Take this program, with the shared libraries it needs, instead of building one for release
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Only the image's files, into this directory (for deploy/Dockerfile)
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    rootfs: Option<PathBuf>,
}

/// Where the image has what is no program.
const DOCS: &str = "/usr/share/doc/fairlead";
const BILL: &str = "sbom.cdx.json";
pub const LICENCES: [&str; 2] = ["LICENSE-MIT", "LICENSE-GPL-2.0"];

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    let arch = args.arch.map_or_else(Arch::here, Ok)?;
    let stamp = Stamp::now()?;
    let program = match &args.binary {
        Some(program) => program.clone(),
        None => build(arch)?,
    };
    let bill = sbom::document(&arch.target(), &stamp)?;
    let files = contents(&program, &bill)?;
    if let Some(root) = &args.rootfs {
        files.write_to(root)?;
        say(format!("the image's files: {}", root.display()));
        return Ok(());
    }
    let default = || host::workspace().join("target/image").join(file_name(arch, &stamp));
    let output = args.output.clone().unwrap_or_else(default);
    write(&output, &oci::archive(&files, arch, &stamp)?)?;
    write(&output.with_extension("cdx.json"), bill.as_bytes())
}

/// The name of an image's archive.
pub fn file_name(arch: Arch, stamp: &Stamp) -> String {
    format!("{}-{}-{}.tar", oci::NAME, stamp.version, arch.name())
}

/// Builds the program for an image, and makes sure that it needs nothing beside it.
pub fn build(arch: Arch) -> Result<PathBuf> {
    let program = arch::build(arch)?;
    let libraries = host::libraries(&program)?;
    ensure!(libraries.is_empty(), "{} is not static: it needs {libraries:?}", program.display());
    Ok(program)
}

/// The image's files. A program that is not static brings along what it is linked to.
pub fn contents(program: &Path, bill: &str) -> Result<Tree> {
    let mut files = Tree::default();
    files.program(PROGRAM, read(program)?);
    for library in host::libraries(program)? {
        files.program(&library, read(&library)?);
    }
    for name in LICENCES {
        files.copy(Path::new(DOCS).join(name), &host::workspace().join("docs").join(name))?;
    }
    files.file(Path::new(DOCS).join(BILL), bill);
    Ok(files)
}

/// Writes a file that somebody asked for, and says so.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    say(format!("{} ({} kB)", path.display(), bytes.len().div_ceil(1000)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Value;

    use super::*;

    /// (instruction, arguments).
    type Stage = Vec<(String, String)>;

    fn dockerfile() -> String {
        fs::read_to_string(host::workspace().join("deploy/Dockerfile")).unwrap()
    }

    /// Both stages of deploy/Dockerfile.
    fn stages() -> [Stage; 2] {
        let text = dockerfile();
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let text = lines.join("\n").replace("\\\n", " ");
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let mut first: Stage = lines.map(|(word, rest)| (word.to_owned(), rest.trim().to_owned())).collect();
        let last = first.iter().rposition(|(word, _)| word == "FROM").unwrap();
        let last = first.split_off(last);
        [first, last]
    }

    /// Arguments of the instructions of this name.
    fn all<'a>(stage: &'a Stage, name: &str) -> Vec<&'a str> {
        stage.iter().filter(|(word, _)| word == name).map(|(_, rest)| rest.as_str()).collect()
    }

    /// Arguments of the one instruction of this name.
    fn only<'a>(stage: &'a Stage, name: &str) -> &'a str {
        let found = all(stage, name);
        let [rest] = found.as_slice() else { panic!("{name}: {found:?}") };
        rest
    }

    /// What `cargo xtask image ARGS` is told.
    fn parsed(args: &[&str]) -> clap::ArgMatches {
        use clap::Args as _;

        let command = Args::augment_args(clap::Command::new("cargo xtask image").no_binary_name(true));
        command.try_get_matches_from(args).unwrap()
    }

    /// What is installed for it is what a developer is told to install; the rest is `cargo xtask image`.
    #[test]
    fn the_dockerfile_builds_as_developers_do() {
        let [stage, _] = stages();
        // The oldest compiler that is supported, with which LLVM goes.
        let base = format!("docker.io/library/rust:{}-", crate::toolchain::RUSTC);
        assert!(only(&stage, "FROM").contains(&base), "{stage:?}");
        let runs = all(&stage, "RUN");
        let [packages, build] = runs.as_slice() else { panic!("{runs:?}") };
        for (machines, arch) in [("amd64-arm64)", Arch::Arm64), ("arm64-amd64)", Arch::Amd64)] {
            let case = packages.split_once(machines).unwrap().1;
            let listed = case.split('"').nth(1).unwrap();
            assert_eq!(listed.split(' ').collect::<Vec<_>>(), arch::cross_packages(arch));
        }
        let installs = "apt-get update && apt-get install -y --no-install-recommends $packages";
        assert!(packages.ends_with(installs), "{packages}");
        for arch in Arch::ALL {
            let line =
                build.strip_prefix("cargo xtask image ").unwrap().replace("\"$TARGETARCH\"", arch.name());
            let told = parsed(&line.split(' ').collect::<Vec<_>>());
            assert_eq!(told.get_one::<Arch>("arch"), Some(&arch));
            assert_eq!(told.get_one::<PathBuf>("rootfs"), Some(&PathBuf::from("/rootfs")));
        }
        // Every part of the sources is there before it, and the time that they are of.
        let place = |wanted: &str| {
            let line = |(word, rest): &(String, String)| format!("{word} {rest}").starts_with(wanted);
            stage.iter().position(line).unwrap_or_else(|| panic!("{wanted}: {stage:?}"))
        };
        for before in ["WORKDIR /", "COPY . .", "ARG TARGETARCH", "ARG SOURCE_DATE_EPOCH"] {
            assert!(place(before) < place("RUN cargo"), "{before}");
        }
    }

    /// The command at its top gives what it asks for, and nothing else.
    #[test]
    fn the_dockerfile_says_how_it_is_used() {
        let text = dockerfile();
        let head: String = text.lines().take_while(|line| line.starts_with('#')).collect();
        let given: BTreeSet<_> =
            head.split("--build-arg ").skip(1).filter_map(|rest| Some(rest.split_once('=')?.0)).collect();
        let stages = stages().concat();
        let asked = all(&stages, "ARG").into_iter().filter_map(|arg| Some(arg.split_once('=')?.0));
        assert_eq!(given, asked.collect());
        assert!(head.contains(&format!("-t {}:{} ", oci::NAME, env!("CARGO_PKG_VERSION"))), "{head}");
    }

    #[test]
    fn the_dockerfile_makes_the_same_image() {
        let [_, stage] = stages();
        assert_eq!(only(&stage, "FROM"), "scratch");
        // The files are those of `--rootfs`, and no others.
        assert_eq!(only(&stage, "COPY"), "--from=build /rootfs/ /");
        assert!(!stage.iter().any(|(word, _)| ["RUN", "ADD", "CMD"].contains(&word.as_str())), "{stage:?}");
        let entrypoint: Value = serde_json::from_str(only(&stage, "ENTRYPOINT")).unwrap();
        assert_eq!(entrypoint, serde_json::json!([PROGRAM]));
        assert_eq!(only(&stage, "ENV"), oci::ENV);
        assert_eq!(only(&stage, "USER"), oci::USER);
        assert_eq!(only(&stage, "WORKDIR"), oci::DIRECTORY);
    }

    #[test]
    fn the_dockerfile_writes_the_same_labels() {
        let stamp =
            Stamp { version: env!("CARGO_PKG_VERSION"), time: 0, revision: Some("$REVISION".to_owned()) };
        let mut ours = oci::labels(&stamp).unwrap();
        ours.insert("org.opencontainers.image.created", "$CREATED".to_owned());
        let [_, stage] = stages();
        // Name="value" pairs.
        let mut pairs = only(&stage, "LABEL").split('"');
        let mut theirs = BTreeMap::new();
        while let (Some(name), Some(value)) = (pairs.next(), pairs.next()) {
            theirs.insert(name.trim().trim_end_matches('='), value.to_owned());
        }
        assert_eq!(theirs, ours);
    }

    #[test]
    fn a_program_is_put_beside_what_it_needs_and_the_licences() {
        let files = contents(&std::env::current_exe().unwrap(), "bill").unwrap();
        let dir = std::env::temp_dir().join(format!("fairlead-image-{}", std::process::id()));
        files.write_to(&dir).unwrap();
        let has = |path: &str| dir.join(path.trim_start_matches('/')).is_file();
        assert!(
            has(PROGRAM)
                && has("/usr/share/doc/fairlead/LICENSE-MIT")
                && has("/usr/share/doc/fairlead/sbom.cdx.json")
        );
        for library in host::libraries(&std::env::current_exe().unwrap()).unwrap() {
            assert!(has(&library.to_string_lossy()), "{}", library.display());
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
