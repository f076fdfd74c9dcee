//! A node for one test: network namespace, BPF file system, cgroup, manifests; all gone when it is dropped.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fairlead::sys::{mount, netns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a test waits for what must happen; machines are shared, slow, and may be emulated.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A node, and the directory of everything that belongs to it.
pub(crate) struct Node {
    dir: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Node {
    /// Runs `test` on a new node, in a thread that is in its namespace.
    pub(crate) fn with(test: impl FnOnce(&Self) + Send + 'static) {
        let thread = thread::spawn(|| {
            netns::enter_new()
                .expect("these tests need root: run `sudo -E cargo test`, or `cargo xtask test`");
            let node = Self::new();
            Self::ip("link set lo up");
            // What stands for a pod, as far as processes of the node can tell.
            Self::ip("link add pod0 type veth peer name pod1");
            Self::ip("link set pod1 up");
            Self::ip("addr add 10.9.0.1/32 dev pod0");
            Self::ip("addr add fd09::1/128 nodad dev pod0");
            Self::ip("link set pod0 up");
            // And a route to everywhere, so that connect() finds a way before it is translated.
            Self::ip("route add default dev pod0");
            Self::ip("-6 route add default dev pod0");
            test(&node);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        for name in ["bpffs", "manifests"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        mount::mount_bpffs(&dir.path().join("bpffs")).expect("mounting a BPF file system needs root");
        let root = mount::cgroup2_root().unwrap().expect("these tests need a cgroup2 file system");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = root.join(format!("fairlead-test-agent-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        Self { dir, cgroup }
    }

    fn ip(arguments: &str) {
        let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.path("bpffs/agent")
    }

    /// Writes a manifest as a careful editor does.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let new = self.path("manifests").join(format!(".{name}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(new, self.path("manifests").join(name)).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.path("manifests").join(name)).unwrap();
    }

    /// Starts `fairlead run` and waits until it is ready.
    pub(crate) fn start(&self) -> Agent {
        let agent = self.spawn(&[]);
        eventually(&format!("the agent is ready; {}", agent.log()), || status("/readyz") == Some(200));
        agent
    }

    /// Starts `fairlead run`.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Agent {
        let manifests = self.path("manifests");
        self.spawn_following(&[&["--manifests", manifests.to_str().unwrap()], arguments].concat())
    }

    /// Starts `fairlead run` as a process whose connections it translates itself, with this source.
    pub(crate) fn spawn_following(&self, arguments: &[&str]) -> Agent {
        let log = self.path("log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let enter = format!("echo $$ > {} && exec \"$@\"", self.cgroup.join("cgroup.procs").display());
        let child = command("bash")
            .args(["-c", &enter, "bash", env!("CARGO_BIN_EXE_fairlead"), "run"])
            .args(["--node-name", "node-a", "--max-flows", "1024", "--max-services", "256"])
            .args(["--max-backends", "256"])
            .arg("--bpffs")
            .arg(self.pins())
            .arg("--cgroup-root")
            .arg(&self.cgroup)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Agent { child, log }
    }

    /// Runs `fairlead SUBCOMMAND … --bpffs PINS`.
    pub(crate) fn fairlead(&self, arguments: &[&str]) -> Output {
        fairlead().args(arguments).arg("--bpffs").arg(self.pins()).output().unwrap()
    }

    /// The same, as JSON.
    pub(crate) fn read(&self, subcommand: &str) -> Value {
        let output = self.fairlead(&[subcommand, "-o", "json"]);
        assert!(output.status.success(), "{subcommand}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a process of the node reads from a TCP connection; `Err`: how connecting failed.
    pub(crate) fn call(&self, addr: &str, port: u16) -> Result<String, String> {
        let procs = self.cgroup.join("cgroup.procs");
        let script =
            format!("echo $$ > {} && exec 3<>/dev/tcp/{addr}/{port} && head -c 64 <&3", procs.display());
        let output = Command::new("timeout").args(["10", "bash", "-c", &script]).output().unwrap();
        match output.status.code() {
            Some(0) => Ok(String::from_utf8(output.stdout).unwrap()),
            _ => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let output = self.fairlead(&["cleanup"]);
        let cleaned = output.status.success();
        eventually("the cgroup is empty", || fs::remove_dir(&self.cgroup).is_ok());
        mount::unmount(&self.path("bpffs")).unwrap();
        if !thread::panicking() {
            assert!(cleaned, "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

pub(crate) fn fairlead() -> Command {
    command(env!("CARGO_BIN_EXE_fairlead"))
}

fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    for name in ["NODE_NAME", "KUBECONFIG", "RUST_LOG"] {
        command.env_remove(name);
    }
    command
}

/// A running agent; killed when it is dropped.
pub(crate) struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status after a signal; `None`: the signal ended it.
    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
        self.wait()
    }

    /// Its exit status once it has ended.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the agent ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        let status = status.unwrap();
        assert!(status.code().is_some() || status.signal().is_some());
        status.code()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- log of the agent\n{}---", self.log());
        }
    }
}

/// The status that the health server answers with, if it answers.
pub(crate) fn status(path: &str) -> Option<u16> {
    get(10256, path).map(|(status, _)| status)
}

/// Status and body that a server of the agent answers with, if it answers.
pub(crate) fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split_whitespace().nth(1)?.parse().ok()?, body.to_owned()))
}

/// Answers every connection with `text` until the process ends.
pub(crate) fn serve(addr: &str, text: &'static str) {
    let listener = std::net::TcpListener::bind(addr).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            // The client may have gone.
            let _ = stream.write_all(text.as_bytes());
        }
    });
}

/// Every file under `dir`, without the ones the kernel itself puts into a BPF file system.
pub(crate) fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let mut files = vec![];
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files
}
