//! `cargo xtask dist`: everything that a release publishes, in `target/dist`. The same commit makes the same bytes.

mod manifests;
mod version;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::image::arch::Arch;
use crate::image::stamp::Stamp;
use crate::image::tree::{Tree, gzip, read};
use crate::image::{self, LICENCES, oci, sbom, write};
use crate::{host, process};

/// Make what a release publishes: programs, images, bills of materials, manifests, the chart, checksums.
///
/// The version of Cargo.toml must be the newest heading of docs/CHANGELOG.md, and stand in the chart and the manifests.
/// Nothing is uploaded.
#[derive(clap::Args)]
pub struct Args {
    /// Architectures [default: this machine's]
    #[arg(long, value_enum, value_delimiter = ',')]
    arch: Vec<Arch>,
    /// The changelog may still begin with `Unreleased`
    #[arg(long)]
    draft: bool,
    /// Take this program, with the shared libraries it needs, instead of building one for release
    #[arg(long, value_name = "FILE", conflicts_with = "arch")]
    binary: Option<PathBuf>,
    /// Where everything goes, a new directory [default: target/dist, which is emptied first]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Shells whose completions are packed.
const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
/// Beside the program and the licences: the page whose links lead to the others.
const README: &str = "README.md";
const DOCS: &str = "docs";
/// Manual pages, while they are packed.
const MAN: &str = "man";
const CHART: &str = "deploy/helm/fairlead";

/// The subcommand.
pub fn command(args: &Args) -> Result<()> {
    let stamp = Stamp::now()?;
    version::check(stamp.version, args.draft)?;
    let dir = match &args.output {
        Some(dir) => {
            ensure!(!dir.exists(), "{} is there already; name a directory that is not", dir.display());
            dir.clone()
        }
        None => emptied(host::workspace().join("target/dist"))?,
    };
    let here = Arch::here()?;
    let architectures = if args.arch.is_empty() { vec![here] } else { args.arch.clone() };
    let build = |arch| args.binary.clone().map_or_else(|| image::build(arch), Ok);
    // Manual pages and completions are what the program itself says, on a machine that runs it.
    let spoken = spoken(&build(here)?, &dir.join(MAN))?;
    let mut made = Made { dir, files: Vec::new() };
    for arch in architectures {
        let program = build(arch)?;
        let bill = sbom::document(&arch.target(), &stamp)?;
        let name = image::file_name(arch, &stamp);
        made.add(&name, &oci::archive(&image::contents(&program, &bill)?, arch, &stamp)?)?;
        made.add(&Path::new(&name).with_extension("cdx.json").to_string_lossy(), bill.as_bytes())?;
        let name = format!("fairlead-{}-linux-{}", stamp.version, arch.name());
        let package = package(&name, &read(&program)?, &bill, &spoken)?;
        made.add(&format!("{name}.tar.gz"), &gzip(&package.tar(stamp.time)?)?)?;
    }
    let version = stamp.version;
    made.add(
        &format!("fairlead-{version}.yaml"),
        manifests::render(&host::workspace().join("deploy/base"))?.as_bytes(),
    )?;
    let deploy = directory("deploy", &format!("fairlead-deploy-{version}"))?;
    made.add(&format!("fairlead-deploy-{version}.tar.gz"), &gzip(&deploy.tar(stamp.time)?)?)?;
    // As `helm package` calls and lays it out.
    let chart = directory(CHART, "fairlead")?;
    made.add(&format!("fairlead-{version}.tgz"), &gzip(&chart.tar(stamp.time)?)?)?;
    let sums = made.sums();
    write(&made.dir.join("SHA256SUMS"), sums.as_bytes())
}

/// Nobody but us writes there.
fn emptied(dir: PathBuf) -> Result<PathBuf> {
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    Ok(dir)
}

/// Files of a release, with their checksums.
struct Made {
    dir: PathBuf,
    files: Vec<(String, String)>,
}

impl Made {
    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        write(&self.dir.join(name), bytes)?;
        self.files.push((name.to_owned(), oci::sha256(bytes)));
        Ok(())
    }

    /// As `sha256sum --check` reads it.
    fn sums(&self) -> String {
        let mut lines: Vec<String> =
            self.files.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
        lines.sort_by(|a, b| a[64..].cmp(&b[64..]));
        lines.concat()
    }
}

/// Manual pages and completions, by the paths that packages give them.
fn spoken(program: &Path, scratch: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    process::output(Command::new(program).arg("man").arg(scratch))?;
    let mut files = Vec::new();
    for name in names(scratch)? {
        files.push((format!("man/man1/{name}"), read(&scratch.join(&name))?));
    }
    fs::remove_dir_all(scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    for shell in SHELLS {
        let script = process::output(Command::new(program).args(["completion", shell]))?;
        files.push((format!("completions/fairlead.{shell}"), script.into_bytes()));
    }
    Ok(files)
}

/// What somebody gets who wants the program alone.
fn package(name: &str, program: &[u8], bill: &str, spoken: &[(String, Vec<u8>)]) -> Result<Tree> {
    let root = Path::new(name);
    let mut files = Tree::default();
    files.program(root.join("fairlead"), program);
    files.file(root.join("sbom.cdx.json"), bill);
    for (path, bytes) in spoken {
        files.file(root.join(path), bytes.as_slice());
    }
    let docs = host::workspace().join(DOCS);
    for name in LICENCES {
        files.copy(root.join(name), &docs.join(name))?;
    }
    files.copy(root.join(README), &host::workspace().join(README))?;
    add_directory(&mut files, &docs, &root.join(DOCS))?;
    Ok(files)
}

/// A directory of the repository, with all that is in it, by another name.
fn directory(path: &str, name: &str) -> Result<Tree> {
    let mut files = Tree::default();
    add_directory(&mut files, &host::workspace().join(path), Path::new(name))?;
    Ok(files)
}

fn add_directory(files: &mut Tree, from: &Path, to: &Path) -> Result<()> {
    for name in names(from)? {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            add_directory(files, &from, &to)?;
        } else {
            files.copy(to, &from)?;
        }
    }
    Ok(())
}

/// Names in a directory, sorted. Hidden ones are editors'.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(|| format!("cannot read {}", dir.display()))?;
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Paths of files in an archive.
    fn paths(files: &Tree) -> BTreeSet<String> {
        let bytes = files.tar(0).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries = archive.entries().unwrap().map(Result::unwrap);
        let files = entries.filter(|entry| entry.header().entry_type().is_file());
        files.map(|entry| entry.path().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_package_has_the_program_and_what_belongs_to_it() {
        let spoken =
            [("man/man1/fairlead.1".to_owned(), vec![]), ("completions/fairlead.bash".to_owned(), vec![])];
        let name = "fairlead-1.2.3-linux-amd64";
        let packed = paths(&package(name, b"program", "bill", &spoken).unwrap());
        for path in [
            "fairlead",
            "sbom.cdx.json",
            "man/man1/fairlead.1",
            "completions/fairlead.bash",
            "LICENSE-MIT",
            "LICENSE-GPL-2.0",
            "README.md",
            "docs/CHANGELOG.md",
        ] {
            assert!(packed.contains(&format!("{name}/{path}")), "{path} is not in {packed:?}");
        }
        // Links of the first page, and from there to all others.
        let readme = fs::read_to_string(host::workspace().join(README)).unwrap();
        let links = readme.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let pages: Vec<&str> = links.filter(|link| !link.is_empty() && !link.contains("://")).collect();
        assert!(pages.len() > 5, "{pages:?}");
        for page in pages {
            assert!(packed.contains(&format!("{name}/{page}")), "{page} is not in {packed:?}");
        }
    }

    #[test]
    fn the_chart_is_packed_as_helm_does() {
        let chart = paths(&directory(CHART, "fairlead").unwrap());
        for path in ["fairlead/Chart.yaml", "fairlead/values.yaml", "fairlead/templates/daemonset.yaml"] {
            assert!(chart.contains(path), "{path} is not in {chart:?}");
        }
        assert!(paths(&directory("deploy", "d").unwrap()).contains("d/base/kustomization.yaml"));
    }

    #[test]
    fn checksums_are_as_sha256sum_reads_them() {
        let sum = oci::sha256(b"");
        assert_eq!(sum, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let files = [("b".to_owned(), sum.clone()), ("a".to_owned(), sum.clone())];
        let made = Made { dir: PathBuf::new(), files: files.to_vec() };
        assert_eq!(made.sums(), format!("{sum}  a\n{sum}  b\n"));
    }
}
