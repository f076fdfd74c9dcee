//! A container on a node, as the kubelet and a container runtime make it of the DaemonSet and an image: the manifest
//! says what it may and sees, the image what it runs, and `crun` does it.
//!
//! What the node shares with it (`hostPath`) is the lab node's: its cgroup for the root of all cgroups, its part of
//! bpffs for bpffs, and directories of its own for `/run` and `/var`. Two things of the manifest are not repeated:
//! the default seccomp profile, which every runtime brings its own of, and labels of SELinux and AppArmor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::agent::{HEALTH_PORT, PATIENCE, POLL, http_status};
use super::custody::making;
use super::netns::Netns;
use super::{Lab, Node};
use crate::{host, process, setup};

/// The pod that a DaemonSet makes. Fields that stand here are followed; a field of the security context or of a
/// volume that does not is an error.
#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    host_network: bool,
    containers: Vec<Spec>,
    volumes: Vec<Volume>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
struct Spec {
    command: Option<Vec<String>>,
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    security_context: SecurityContext,
    volume_mounts: Vec<Mount>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Variable {
    name: String,
    value: Option<String>,
    value_from: Option<Value>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SecurityContext {
    capabilities: Capabilities,
    allow_privilege_escalation: bool,
    read_only_root_filesystem: bool,
    run_as_user: u32,
    #[serde(rename = "seccompProfile")]
    _seccomp: Value,
    #[serde(rename = "appArmorProfile")]
    _app_armor: Value,
    #[serde(rename = "seLinuxOptions")]
    _selinux: Value,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    add: Vec<String>,
    drop: Vec<String>,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    name: String,
    #[serde(rename = "mountPath")]
    path: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Volume {
    name: String,
    host_path: HostPath,
}

#[derive(Deserialize, Clone, Debug)]
struct HostPath {
    path: String,
}

impl Pod {
    /// Of a DaemonSet.
    pub fn of(daemon_set: &Value) -> Result<Self> {
        serde_json::from_value(daemon_set["spec"]["template"]["spec"].clone())
            .context("this DaemonSet has what the lab does not know how to do")
    }

    /// The same with other arguments.
    pub fn with_args(mut self, args: &[&str]) -> Result<Self> {
        let container = self.containers.first_mut().context("a pod without containers")?;
        container.args = args.iter().map(|&arg| arg.to_owned()).collect();
        Ok(self)
    }

    /// `config.json` of the OCI runtime specification: the pod's container on `node`, with the files of `image` (an
    /// image configuration), more arguments, and a directory that it may read besides.
    fn config(&self, image: &Value, node: &Place, args: &[String], shared: &Path) -> Result<Value> {
        let [container] = self.containers.as_slice() else { bail!("a pod with one container, please") };
        let context = &container.security_context;
        ensure!(self.host_network, "the agent belongs into the node's network");
        ensure!(context.capabilities.drop == ["ALL"], "capabilities are those that are added, and no others");
        let words = |value: &Value| -> Vec<String> {
            value
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|word| Some(word.as_str()?.to_owned()))
                .collect()
        };
        let program = container.command.clone().unwrap_or_else(|| words(&image["config"]["Entrypoint"]));
        let env =
            container.env.iter().map(|variable| Ok(format!("{}={}", variable.name, node.value(variable)?)));
        let env = env.collect::<Result<Vec<_>>>()?;
        let env = [words(&image["config"]["Env"]), env].concat();
        let args = [&program, &container.args, args].concat();
        let capabilities: Vec<String> =
            context.capabilities.add.iter().map(|name| format!("CAP_{name}")).collect();
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }),
            json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] }),
            bind(shared, shared, true),
        ];
        for mount in &container.volume_mounts {
            let volume = self.volumes.iter().find(|volume| volume.name == mount.name);
            let volume = volume.with_context(|| format!("no volume {}", mount.name))?;
            mounts.push(bind(
                &node.host_path(&volume.host_path.path)?,
                Path::new(&mount.path),
                mount.read_only,
            ));
        }
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": context.run_as_user, "gid": 0 },
                "args": args,
                "env": env,
                "cwd": image["config"]["WorkingDir"],
                "noNewPrivileges": !context.allow_privilege_escalation,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
            },
            "root": { "path": "rootfs", "readonly": context.read_only_root_filesystem },
            "mounts": mounts,
            "linux": {
                "namespaces": [
                    { "type": "mount" }, { "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                    { "type": "network", "path": node.ns.path() },
                ],
                // As containerd and CRI-O have it for every container that is not privileged.
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }))
    }
}

fn bind(source: &Path, destination: &Path, read_only: bool) -> Value {
    let mode = if read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", mode];
    json!({ "destination": destination, "type": "bind", "source": source, "options": options })
}

/// A node, as its containers see it.
struct Place {
    name: String,
    ns: Netns,
    cgroup: PathBuf,
    bpffs: PathBuf,
    /// For `/run` and `/var`.
    files: PathBuf,
}

impl Place {
    /// What the node has at `path`.
    fn host_path(&self, path: &str) -> Result<PathBuf> {
        Ok(match path {
            "/sys/fs/bpf" => self.bpffs.clone(),
            "/sys/fs/cgroup" => self.cgroup.clone(),
            // Of the namespace that asks.
            "/proc/sys/net" => path.into(),
            _ if path.starts_with("/run/") || path.starts_with("/var/") => {
                let dir = self.files.join(path.trim_start_matches('/'));
                fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
                dir
            }
            _ => bail!("a node of the lab has no {path}"),
        })
    }

    fn value(&self, variable: &Variable) -> Result<String> {
        match (&variable.value, &variable.value_from) {
            (Some(value), None) => Ok(value.clone()),
            (None, Some(from)) if from["fieldRef"]["fieldPath"] == "spec.nodeName" => Ok(self.name.clone()),
            _ => bail!("a value of {} is not known", variable.name),
        }
    }
}

/// What a container is made of.
pub struct Image {
    /// Its files, unpacked.
    pub root: PathBuf,
    /// `application/vnd.oci.image.config.v1+json`.
    pub config: Value,
}

/// A running container. It is killed when it is dropped.
pub struct Container {
    id: String,
    state: PathBuf,
    ns: Netns,
    log: PathBuf,
    /// Where its processes begin.
    processes: PathBuf,
    child: Option<Child>,
}

impl Container {
    /// Starts the pod's container on a node. `args` stand behind the manifest's.
    pub fn start(
        lab: &Lab,
        node: &Node,
        pod: &Pod,
        image: &Image,
        args: &[String],
        shared: &Path,
    ) -> Result<Self> {
        ensure!(host::find("crun").is_some(), "crun is missing; `cargo xtask test` installs it");
        let bundle = lab.dir().join(format!("{}-container", node.name));
        let processes = in_unified(lab.processes.path())?.join("cgroup.procs");
        let place = Place {
            name: node.name.clone(),
            ns: node.ns.clone(),
            cgroup: in_unified(node.cgroup.path())?,
            bpffs: lab.pins(node),
            files: bundle.join("node"),
        };
        fs::create_dir_all(&place.bpffs).with_context(|| format!("cannot make {}", place.bpffs.display()))?;
        fs::create_dir_all(&bundle).with_context(|| format!("cannot make {}", bundle.display()))?;
        let mut config = pod.config(&image.config, &place, args, shared)?;
        config["root"]["path"] = json!(image.root);
        fs::write(bundle.join("config.json"), config.to_string()).context("cannot write config.json")?;
        let log = bundle.join("log");
        let output = File::create(&log).context("cannot write the log")?;
        let (id, state) = (format!("{}-{}", lab.prefix(), node.name), lab.dir().join("crun"));
        let mut container = Self { id, state, ns: node.ns.clone(), log, processes, child: None };
        let mut command = container.crun("run");
        command
            .arg("--bundle")
            .arg(&bundle)
            .arg(&container.id)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share the log")?)
            .stderr(output);
        container.child = Some({
            let _making = making();
            node.ns.spawn(&mut command)?
        });
        Ok(container)
    }

    /// Waits until its readiness probe would succeed.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ns.run(|| http_status(HEALTH_PORT, "/readyz"))?;
            if status == Some(200) {
                return Ok(());
            }
            if let Some(ended) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                bail!("container {} ended ({}):\n{}", self.id, ended?, self.log());
            }
            ensure!(Instant::now() < deadline, "container {} is not ready:\n{}", self.id, self.log());
            thread::sleep(POLL);
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let child = self.child.as_mut().context("it has ended before")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().context("cannot wait for a container")? {
                self.child = None;
                return Ok(status);
            }
            thread::sleep(POLL);
        }
        bail!("container {} does not end:\n{}", self.id, self.log())
    }

    /// As the kubelet ends it: SIGTERM to its first process.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        process::output(self.crun("kill").args([&self.id, "TERM"]))?;
        self.wait()
    }

    /// What `kubectl exec` does; its standard output.
    pub fn exec(&self, args: &[&str]) -> Result<String> {
        process::output(self.crun("exec").arg(&self.id).args(args))
    }

    /// Its first process, as the machine numbers it.
    pub fn pid(&self) -> Result<u32> {
        let state: Value = serde_json::from_str(&process::output(self.crun("state").arg(&self.id))?)?;
        let pid = state["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.context("crun says no process")
    }

    /// What it has written.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn crun(&self, subcommand: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", UNIFIED])
            .arg(&self.processes)
            .args(["crun", "--root"])
            .arg(&self.state);
        command
            .args(["--cgroup-manager=disabled", subcommand])
            .env("PATH", host::path_with(Path::new("/usr/bin")));
        command
    }
}

/// crun wants cgroup2 alone at `/sys/fs/cgroup`, and gets it, wherever this machine has it. It begins in a cgroup of
/// the lab's (the first argument), and what it starts stays there.
const UNIFIED: &str = r#"
set -eu
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo $$ > "$0"
exec "$@"
"#;

/// Where [`UNIFIED`] shows a cgroup.
fn in_unified(cgroup: &Path) -> Result<PathBuf> {
    let root = setup::cgroup2()?;
    let below = cgroup.strip_prefix(&root).with_context(|| format!("{} is no cgroup", cgroup.display()))?;
    Ok(Path::new("/sys/fs/cgroup").join(below))
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = process::output(self.crun("delete").args(["--force", &self.id]));
            let _ = child.kill();
            let _ = child.wait();
            if thread::panicking() {
                eprintln!("--- log of container {}\n{}---", self.id, self.log());
            }
        }
    }
}
