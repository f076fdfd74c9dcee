//! A machine for one test: namespace, BPF file system, cgroup; all gone when it is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fairlead::datapath::node::StateFile;
use fairlead::datapath::{Features, Idle, Options, Sizes};
use fairlead::sys::{mount, netns};

/// How long a test waits for what must happen; machines are shared, slow, and may be emulated.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

/// Runs `test` in a thread with a network namespace of its own, in which loopback is up.
pub(crate) fn in_new_netns(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        netns::enter_new().expect("these tests need root: run `sudo -E cargo test`, or `cargo xtask test`");
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Whether tc programs have links here (6.6). Without, a test says what it leaves out.
pub(crate) fn has_tcx(otherwise_left_out: &str) -> bool {
    static TCX: LazyLock<bool> = LazyLock::new(|| Features::probe().tcx);
    if !*TCX {
        eprintln!("this kernel has no tcx; not tested: {otherwise_left_out}");
    }
    *TCX
}

/// Whether the kernel lets programs in that walk over maps; says what is left out where it does not.
pub(crate) fn has_iterators(otherwise_left_out: &str) -> bool {
    static ITERATORS: LazyLock<bool> = LazyLock::new(|| Features::probe().kernel_sweep);
    if !*ITERATORS {
        eprintln!("this kernel lets no iterator in; not tested: {otherwise_left_out}");
    }
    *ITERATORS
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// Runs a command in the namespace of the calling thread; its output.
pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments}: {}{text}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A BPF file system of its own.
pub(crate) struct TempBpffs {
    path: PathBuf,
}

impl TempBpffs {
    pub(crate) fn new() -> Self {
        let path = temp_name("bpffs");
        fs::create_dir(&path).unwrap();
        mount::mount_bpffs(&path).expect("mounting a BPF file system needs root");
        Self { path }
    }

    /// Where the agent of the test pins.
    pub(crate) fn pins(&self) -> PathBuf {
        self.path.join("agent")
    }

    /// Programs that do nothing: those of a test that sends no packet.
    pub(crate) fn options(&self) -> Options {
        Options { idle: Idle::ALL, ..self.serving() }
    }

    /// Programs that serve.
    pub(crate) fn serving(&self) -> Options {
        Options { bpffs: self.pins(), sizes: small(), ..Options::default() }
    }

    /// Every pin of the agent. (The kernel puts files of its own into the root of a BPF file system.)
    pub(crate) fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        if self.pins().exists() {
            list(&self.path, &self.pins(), &mut files);
        }
        files.sort();
        files
    }
}

impl Drop for TempBpffs {
    fn drop(&mut self) {
        // A test that failed has not cleaned up after itself.
        StateFile::new(&self.pins()).remove().unwrap();
        mount::unmount(&self.path).unwrap();
        fs::remove_dir(&self.path).unwrap();
    }
}

/// Sizes that take next to no memory.
pub(crate) fn small() -> Sizes {
    Sizes { flows: Some(1024), services: Some(256), backends: Some(256) }
}

/// Another network namespace, for as long as it lives.
pub(crate) struct OtherNetns(Child);

impl OtherNetns {
    pub(crate) fn new() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn().unwrap();
        let other = Self(child);
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let path = format!("/proc/{}/ns/net", other.0.id());
        eventually("the other namespace", || fs::read_link(&path).is_ok_and(|link| link != own));
        other
    }

    /// Moves a device there.
    pub(crate) fn take(&self, device: &str) {
        ip(&format!("link set {device} netns {}", self.0.id()));
    }
}

impl Drop for OtherNetns {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A cgroup of its own.
pub(crate) struct TempCgroup {
    pub(crate) path: PathBuf,
}

impl TempCgroup {
    pub(crate) fn new() -> Self {
        let root = mount::cgroup2_root().unwrap().expect("these tests need a cgroup2 file system");
        let name = temp_name("cgroup");
        let path = root.join(name.file_name().unwrap());
        fs::create_dir(&path).unwrap();
        Self { path }
    }
}

impl Drop for TempCgroup {
    fn drop(&mut self) {
        // A test may have removed it.
        let _ = fs::remove_dir(&self.path);
    }
}

fn temp_name(kind: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("fairlead-test-{kind}-{}-{number}", std::process::id()))
}

fn list(root: &Path, dir: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(root, &path, files);
        } else {
            files.push(path.strip_prefix(root).unwrap().to_string_lossy().into_owned());
        }
    }
}
