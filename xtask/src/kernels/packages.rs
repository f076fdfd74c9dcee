//! Debian's kernels: fetched by apt from sources of their own and unpacked, never installed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Kernel;
use crate::host;
use crate::process::{self, say};

const MIRROR: &str = "http://deb.debian.org";
/// Debian's keys, from the package of that name.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The last words of a package of kernels for virtual machines.
const SUFFIX: &str = "-cloud-amd64";
/// Depends on the newest kernel of its suite, built for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";

/// A kernel and its modules, unpacked.
#[derive(Debug)]
pub struct Unpacked {
    /// What `uname -r` says.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// Modules are in `lib/modules` below this, as modprobe wants it, with an index.
    pub base: PathBuf,
}

/// The kernel of a suite, from the cache below `dir` unless `update`.
pub fn fetch(kernel: &Kernel, dir: &Path, update: bool) -> Result<Unpacked> {
    let root = dir.join("root");
    if update || !root.exists() {
        let new = dir.join("root.new");
        remove(&new)?;
        download(kernel, dir, &new)?;
        remove(&root)?;
        fs::rename(&new, &root).with_context(|| format!("cannot rename {}", new.display()))?;
    }
    // From Debian 13 on, modules are below /usr; in sid the image is among them.
    let base = if root.join("usr/lib/modules").exists() { root.join("usr") } else { root.clone() };
    let modules = base.join("lib/modules");
    let release = only(&modules)?;
    let images = [root.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
    let image = images.into_iter().find(|image| image.exists());
    let image = image.with_context(|| format!("no kernel image below {}", root.display()))?;
    if !modules.join(&release).join("modules.dep").exists() {
        process::run(depmod()?.arg("-b").arg(&base).arg(&release))?;
    }
    Ok(Unpacked { release, image, base })
}

/// depmod, for a tree of modules of any layout.
fn depmod() -> Result<Command> {
    Ok(Command::new(host::find("depmod").context("depmod is gone")?))
}

/// The only name in a directory.
fn only(dir: &Path) -> Result<String> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let entry = entries.next().with_context(|| format!("nothing in {}", dir.display()))??;
    entry.file_name().into_string().ok().context("a directory name that is no UTF-8")
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

fn download(kernel: &Kernel, dir: &Path, root: &Path) -> Result<()> {
    let apt = dir.join("apt");
    remove(&apt)?;
    for name in ["state/lists/partial", "cache/archives/partial", "none", "debs"] {
        let path = apt.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    for (name, text) in [("sources.list", sources(kernel.suite)), ("status", String::new())] {
        fs::write(apt.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    say(format!("kernel {}: fetching the list of packages of Debian {}", kernel.name, kernel.suite));
    process::output(Command::new("apt-get").args(options(&apt)).args(["update", "-q"]))?;
    let packages = closure(NEWEST, |package| {
        let mut show = Command::new("apt-cache");
        process::output(show.args(options(&apt)).args(["show", "--no-all-versions", package]))
    })?;
    say(format!("kernel {}: fetching, not installing: {}", kernel.name, packages.join(" ")));
    let mut get = Command::new("apt-get");
    get.current_dir(apt.join("debs")).args(options(&apt)).args(["download", "-q"]).args(&packages);
    process::output(&mut get)?;
    for deb in fs::read_dir(apt.join("debs")).context("cannot list what was fetched")? {
        process::run(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(root))?;
    }
    ensure!(root.exists(), "apt fetched nothing of {}", packages.join(" "));
    remove(&apt)
}

/// Nothing but this suite, and nothing of it but the list of binary packages.
fn sources(suite: &str) -> String {
    let source = |archive: &str, suite: &str| {
        format!("deb [arch=amd64 target=Packages signed-by={KEYRING}] {MIRROR}/{archive} {suite} main\n")
    };
    let mut sources = source("debian", suite);
    if suite != "sid" {
        sources += &source("debian-security", &format!("{suite}-security"));
    }
    sources
}

/// What keeps apt away from the machine's own sources, lists, caches and installed packages.
fn options(apt: &Path) -> Vec<OsString> {
    let mut options = Vec::new();
    let mut set = |name: &str, value: OsString| {
        let mut option = OsString::from(format!("{name}="));
        option.push(value);
        options.extend([OsString::from("-o"), option]);
    };
    for (name, path) in [
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::Etc::sourceparts", "none"),
        ("Dir::Etc::preferences", "none/no"),
        ("Dir::Etc::preferencesparts", "none"),
        ("Dir::State", "state"),
        ("Dir::State::lists", "state/lists"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
    ] {
        set(name, apt.join(path).into());
    }
    // As root apt would fetch as `_apt`, which cannot write here.
    set("APT::Sandbox::User", "root".into());
    set("Acquire::Languages", "none".into());
    // Suites that are no longer maintained have lists that are no longer renewed.
    set("Acquire::Check-Valid-Until", "false".into());
    options
}

/// The parts of the kernel that a package depends on, by way of others that may be empty.
fn closure(first: &str, show: impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut waiting = vec![first.to_owned()];
    let mut found = BTreeSet::new();
    while let Some(package) = waiting.pop() {
        if found.insert(package.clone()) {
            waiting.extend(parts(&show(&package)?));
        }
    }
    let has_version =
        |package: &&String| package.trim_end_matches(SUFFIX).contains(|c: char| c.is_ascii_digit());
    Ok(found.iter().filter(has_version).cloned().collect())
}

/// The parts of a kernel that a package depends on.
fn parts(show: &str) -> Vec<String> {
    let depends = show.lines().filter_map(|line| line.strip_prefix("Depends: "));
    let names =
        depends.flat_map(|line| line.split([',', '|'])).filter_map(|one| one.split_whitespace().next());
    let is_part = |name: &&str| name.starts_with("linux-") && name.ends_with(SUFFIX);
    names.filter(is_part).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_fetched_with_all_its_parts_and_nothing_else() {
        let show = |package: &str| {
            Ok(match package {
                NEWEST => "Package: x\nDepends: linux-base-cloud-amd64 (= 7.2), linux-image-7.2-cloud-amd64 (= 7.2)\n",
                "linux-image-7.2-cloud-amd64" => {
                    "Depends: dracut | initramfs-tools (>= 0.1) | linux-initramfs-tool, linux-base (>= 4.12), \
                     linux-binary-7.2-cloud-amd64 (= 7.2), linux-modules-7.2-cloud-amd64 (= 7.2)\n\
                     Description: linux-image-9-cloud-amd64\n"
                }
                _ => "Package: y\n",
            }
            .to_owned())
        };
        assert_eq!(
            closure(NEWEST, show).unwrap(),
            ["linux-binary-7.2-cloud-amd64", "linux-image-7.2-cloud-amd64", "linux-modules-7.2-cloud-amd64"]
        );
    }

    #[test]
    fn suites_have_their_security_updates() {
        assert_eq!(sources("sid").lines().count(), 1);
        let bookworm = sources("bookworm");
        assert!(bookworm.contains(" http://deb.debian.org/debian bookworm main\n"), "{bookworm}");
        assert!(bookworm.contains("/debian-security bookworm-security main\n"), "{bookworm}");
    }

    #[test]
    fn apt_touches_nothing_of_the_machine() {
        let options = options(Path::new("/t"));
        let values = options.chunks(2).map(|pair| pair[1].to_string_lossy().into_owned());
        let dirs: Vec<String> = values.filter(|value| value.starts_with("Dir::")).collect();
        assert_eq!(dirs.len(), 8);
        assert!(dirs.iter().all(|value| value.contains("=/t/")), "{dirs:?}");
    }
}
