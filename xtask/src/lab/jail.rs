//! A container without a runtime: a root of its own that cannot be written, few capabilities, and no way to more.
//!
//! It is as `deploy/base/daemonset.yaml` has it: `/proc/sys` and `/sys` are read-only, what the node shares is bpffs,
//! cgroup2 and, at `/host/proc/sys/net`, its network settings. `/run/fairlead` is a directory of its own beside the root:
//! the node's goes when nobody has anything in it.

use std::path::Path;
use std::process::Command;

/// What a process in the jail has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Jail {
    /// Capabilities without `CAP_`; all others are out of reach.
    pub capabilities: Vec<String>,
    /// As on a node where nobody has mounted a BPF file system.
    pub hides_bpffs: bool,
}

/// Arguments: the root to make, the capabilities as setpriv takes them, what to mount over bpffs (or nothing), a
/// directory to share, the program and its arguments.
const SCRIPT: &str = r#"
set -eu
root=$1 capabilities=$2 over_bpffs=$3 shared=$4 program=$5
shift 5
umask 000
mount -t tmpfs -o mode=755 tmpfs "$root"
for dir in usr proc sys run/fairlead host/proc/sys/net ".$shared"; do mkdir -p "$root/$dir"; done
for dir in bin sbin lib lib64; do
    if [ -L "/$dir" ]; then cp -P "/$dir" "$root/$dir"
    elif [ -d "/$dir" ]; then mkdir "$root/$dir"; mount --bind "/$dir" "$root/$dir"
    fi
done
mount --bind /usr "$root/usr"
mount --rbind /proc "$root/proc"
mount --bind /proc/sys "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --bind /proc/sys/net "$root/host/proc/sys/net"
mount --rbind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
if [ -n "$over_bpffs" ]; then mount -t "$over_bpffs" "$over_bpffs" "$root/sys/fs/bpf"; fi
mkdir -p "$root-state"
mount --bind "$root-state" "$root/run/fairlead"
mount --bind "$shared" "$root/$shared"
: > "$root/program"
mount --bind "$program" "$root/program"
mount -o remount,ro "$root"
exec chroot "$root" setpriv --bounding-set "$capabilities" --inh-caps "$capabilities" --no-new-privs /program "$@"
"#;

impl Jail {
    /// `program` in the jail, with `root` as its root and `shared` as the one directory that it may read besides; to
    /// be completed with its arguments.
    pub fn command(&self, root: &Path, shared: &Path, program: &Path) -> Command {
        let capabilities =
            self.capabilities.iter().fold("-all".to_owned(), |list, name| list + ",+" + &name.to_lowercase());
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", SCRIPT, "jail"])
            .arg(root)
            .arg(capabilities)
            .arg(if self.hides_bpffs { "tmpfs" } else { "" })
            .args([shared, program]);
        command
    }
}
