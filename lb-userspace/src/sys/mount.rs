//! File systems the agent needs: bpffs for pins, cgroup2 for socket programs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

/// Where bpffs is mounted on every distribution.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Whether `path` lies on a BPF file system.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether `path` lies in a cgroup2 hierarchy.
pub fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Mounts a BPF file system, for root only.
pub fn mount_bpffs(path: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700"))?;
    Ok(())
}

/// Takes a file system away, once nobody uses it any more.
pub fn unmount(path: &Path) -> io::Result<()> {
    nix::mount::umount2(path, MntFlags::MNT_DETACH)?;
    Ok(())
}

/// The mount point of the cgroup2 hierarchy; `None` if there is none.
pub fn cgroup2_root() -> io::Result<Option<PathBuf>> {
    Ok(find_cgroup2(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// Prefers the mount that shows the most of the hierarchy: its root, else what comes first.
fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    let mut found: Option<PathBuf> = None;
    for line in mountinfo.lines() {
        // "36 35 0:31 ROOT MOUNT-POINT OPTIONS [tags] - TYPE SOURCE SUPER-OPTIONS", proc(5).
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        if kind.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(unescape(point));
        if root == "/" {
            return Some(point);
        }
        found.get_or_insert(point);
    }
    found
}

/// Spaces, tabs, newlines and backslashes are octal in mountinfo.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_wherever_it_is() {
        let unified = "22 28 0:20 / /sys rw - sysfs sysfs rw\n\
                       30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(unified), Some("/sys/fs/cgroup".into()));
        let hybrid = "30 22 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 30 0:28 / /sys/fs/cgroup/unified rw shared:9 master:2 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let part_first = "1 2 0:26 /kubepods/pod1 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n\
                          3 2 0:26 / /host/my\\040cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(part_first), Some("/host/my cgroup".into()));
        let part_only = "1 2 0:26 /kubepods/pod1 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(part_only), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_cgroup2("1 2 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw\n"), None);
    }
}
