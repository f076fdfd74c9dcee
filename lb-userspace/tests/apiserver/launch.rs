//! etcd and kube-apiserver on loopback, with a directory of their own.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

const TOKEN: &str = "of-the-tests";

/// A process that ends with its handle.
struct Running {
    child: Child,
    log: PathBuf,
    name: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// Starts a program and waits until it listens.
    fn start(
        assets: &Path,
        name: &'static str,
        arguments: &[String],
        dir: &Path,
        port: u16,
        patience: Duration,
    ) -> Result<Self, String> {
        let log = dir.join(format!("{name}.log"));
        let error = |error| format!("{name}: {error}");
        let output = File::create(&log).map_err(error)?;
        let mut command = Command::new(assets.join(name));
        command.args(arguments).current_dir(dir).stdout(output.try_clone().map_err(error)?).stderr(output);
        let mut running = Self { child: command.spawn().map_err(error)?, log, name };
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = running.child.try_wait().map_err(error)? {
                return Err(running.failure(&format!("ended with {status}")));
            }
            if start.elapsed() > patience {
                return Err(running.failure("does not listen"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    fn failure(&self, what: &str) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("{} {what}; the end of its log:\n{tail}", self.name)
    }
}

/// A cluster of one API server and no node.
pub(crate) struct Cluster {
    assets: PathBuf,
    port: u16,
    etcd_port: u16,
    patience: Duration,
    apiserver: Option<Running>,
    _etcd: Running,
    /// The last to go.
    dir: TempDir,
}

impl Cluster {
    /// Both from the directory `assets`; `Err` says which of them did not come up, and why.
    pub(crate) fn start(assets: &Path, patience: Duration) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let [port, etcd_port, peer_port] = free_ports();
        let etcd = etcd_arguments(dir.path(), etcd_port, peer_port);
        let etcd = Running::start(assets, "etcd", &etcd, dir.path(), etcd_port, patience)?;
        prepare(dir.path(), port)?;
        let assets = assets.to_owned();
        let mut cluster = Self { assets, port, etcd_port, patience, apiserver: None, _etcd: etcd, dir };
        cluster.resume()?;
        Ok(cluster)
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Kills the API server; what it knows stays.
    pub(crate) fn interrupt(&mut self) {
        self.apiserver = None;
    }

    pub(crate) fn resume(&mut self) -> Result<(), String> {
        let (dir, name) = (self.dir.path(), "kube-apiserver");
        let arguments = apiserver_arguments(dir, self.port, self.etcd_port);
        self.apiserver = Some(Running::start(&self.assets, name, &arguments, dir, self.port, self.patience)?);
        Ok(())
    }
}

fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port of loopback"));
    listeners.map(|listener| listener.local_addr().expect("it is bound").port())
}

/// Keys, tokens and the kubeconfig. The serving certificate is the API server's own work.
fn prepare(dir: &Path, port: u16) -> Result<(), String> {
    for arguments in
        [&["genrsa", "-out", "sa.key", "2048"][..], &["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]]
    {
        let output = Command::new("openssl").args(arguments).current_dir(dir).output();
        let output = output.map_err(|error| format!("openssl: {error}"))?;
        if !output.status.success() {
            return Err(format!("openssl: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    let kubeconfig = json!({
        "clusters": [{ "name": "c", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true,
        } }],
        "users": [{ "name": "u", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    let tokens = format!("{TOKEN},admin,1,\"system:masters\"\n");
    fs::write(dir.join("tokens.csv"), tokens)
        .and_then(|()| fs::write(dir.join("kubeconfig"), kubeconfig.to_string()))
        .map_err(|error| error.to_string())
}

fn etcd_arguments(dir: &Path, port: u16, peer_port: u16) -> Vec<String> {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        "--unsafe-no-fsync".to_owned(),
    ]
}

fn apiserver_arguments(dir: &Path, port: u16, etcd_port: u16) -> Vec<String> {
    let file = |name: &str| dir.join(name).display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{etcd_port}"),
        format!("--cert-dir={}", file("certs")),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--secure-port={port}"),
        "--service-account-issuer=https://localhost".to_owned(),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=RBAC".to_owned(),
        "--disable-admission-plugins=ServiceAccount".to_owned(),
        "--service-cluster-ip-range=172.30.0.0/16,fd00:30::/112".to_owned(),
    ]
}

fn script(dir: &Path, name: &str, text: &str) {
    use std::os::unix::fs::PermissionsExt;

    fs::write(dir.join(name), format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).expect("a script that runs");
}

/// With programs that are none, on every machine.
pub(crate) fn a_server_that_ends_is_named_with_its_log() {
    let assets = tempfile::tempdir().expect("a directory");
    let start = || Cluster::start(assets.path(), Duration::from_secs(20)).err().expect("no cluster");
    assert!(start().starts_with("etcd: No such file"), "{}", start());
    script(assets.path(), "etcd", "echo no room on the disk >&2; exit 3");
    let error = start();
    assert!(error.starts_with("etcd ended with exit status: 3"), "{error}");
    assert!(error.ends_with("no room on the disk"), "{error}");
}

pub(crate) fn a_server_that_never_listens_is_given_up_and_ended() {
    let assets = tempfile::tempdir().expect("a directory");
    let seen = assets.path().join("seen");
    let seen_by_script = seen.display();
    script(assets.path(), "etcd", &format!("echo $$ \"$@\" > {seen_by_script}; exec sleep 600"));
    let error = Cluster::start(assets.path(), Duration::from_secs(2)).err().expect("no cluster");
    assert!(error.starts_with("etcd does not listen"), "{error}");
    let seen = fs::read_to_string(seen).expect("what etcd was given");
    let (pid, arguments) = seen.split_once(' ').expect("its id and arguments");
    assert!(arguments.contains("--listen-client-urls=http://127.0.0.1:"), "{arguments}");
    assert!(!Path::new("/proc").join(pid).exists(), "it still runs");
}

pub(crate) fn keys_tokens_and_the_kubeconfig_are_made() {
    let dir = tempfile::tempdir().expect("a directory");
    prepare(dir.path(), 6443).expect("openssl");
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect(name);
    assert!(read("sa.key").contains("PRIVATE KEY") && read("sa.pub").contains("PUBLIC KEY"));
    assert!(read("kubeconfig").contains("https://127.0.0.1:6443") && read("tokens.csv").contains(TOKEN));
    for argument in apiserver_arguments(dir.path(), 6443, 2379) {
        let file = argument.split_once("-file=").map(|(_, file)| file);
        assert!(file.is_none_or(|file| Path::new(file).exists()), "{argument}");
    }
}
