//! The image, run by a container runtime with what the DaemonSet gives it and nothing else.
//!
//! `FAIRLEAD_IMAGE` names an image to test, as `cargo xtask image` has written it. Without it the program of this build
//! is put into one.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::Value;
use xtask::lab::container::{Container, Image, Pod};
use xtask::lab::{Family, Lab, Node};
use xtask::process;

use crate::agent::{open_calls, reserved_ports, traffic_goes_on, two_services};
use crate::world::{PORT, World, XTASK, agent, at_vip, options};

const DAEMON_SET: &str = include_str!("../../../deploy/base/daemonset.yaml");

fn daemon_set() -> Result<Pod> {
    Pod::of(&Value::deserialize(serde_yaml_ng::Deserializer::from_str(DAEMON_SET))?)
}

/// The image, unpacked into the lab's directory.
fn image(lab: &Lab) -> Result<Image> {
    let archive = match std::env::var_os("FAIRLEAD_IMAGE") {
        Some(path) => path.into(),
        None => build(lab)?,
    };
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(fs::File::open(&archive).context("the image")?).entries()? {
        let mut entry = entry?;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(entry.path()?.to_string_lossy().into_owned(), bytes);
    }
    let blob = |descriptor: &Value| -> Result<&Vec<u8>> {
        let path = format!("blobs/{}", descriptor["digest"].as_str().context("a digest")?.replace(':', "/"));
        files.get(&path).with_context(|| format!("no {path}"))
    };
    let index: Value = serde_json::from_slice(&files["index.json"])?;
    let manifest: Value = serde_json::from_slice(blob(&index["manifests"][0])?)?;
    let (root, packed) = (lab.dir().join("image"), lab.dir().join("layer.tar.gz"));
    fs::create_dir(&root)?;
    for layer in manifest["layers"].as_array().context("layers")? {
        fs::write(&packed, blob(layer)?)?;
        // By another process: what a test beside this one starts would inherit the program as it is written, and as long
        // as that has not come to its own `exec`, nobody can run it (ETXTBSY).
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--gzip", "--file"]).arg(&packed).arg("--directory").arg(&root);
        process::output(&mut tar)?;
    }
    fs::remove_file(&packed)?;
    Ok(Image { root, config: serde_json::from_slice(blob(&manifest["config"])?)? })
}

/// The program of this build in an image. Without what only a debugger needs it is a third as large.
fn build(lab: &Lab) -> Result<PathBuf> {
    let (program, archive) = (lab.dir().join("fairlead"), lab.dir().join("fairlead.tar"));
    process::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&program).arg(agent()))?;
    let mut xtask = Command::new(XTASK);
    xtask.args(["image", "--binary"]).arg(&program).arg("--output").arg(&archive);
    process::output(&mut xtask)?;
    fs::remove_file(&program)?;
    Ok(archive)
}

/// The image on both nodes, with the manifests of the world in place of an API server, and small maps.
fn run(world: &World, image: &Image) -> Result<Vec<Container>> {
    let manifests = world.cluster.manifests.dir();
    let mut args = vec!["--manifests".to_owned(), manifests.display().to_string()];
    args.extend(options().args);
    let mut containers = Vec::new();
    for node in world.lab().nodes() {
        containers.push(Container::start(world.lab(), node, &daemon_set()?, image, &args, manifests)?);
    }
    for container in &mut containers {
        container.wait_until_ready()?;
    }
    Ok(containers)
}

#[test]
fn the_image_serves_with_what_the_daemon_set_gives_it() -> Result<()> {
    let world = World::new(options())?;
    for service in two_services(&world) {
        world.cluster.manifests.apply(&service)?;
    }
    let image = image(world.lab())?;
    has_no_shell(&image.root)?;
    let containers = run(&world, &image)?;
    for (container, node) in containers.iter().zip(world.lab().nodes()) {
        is_confined(container.pid()?)?;
        ensure!(!reserved_ports(node)?.is_empty(), "no source ports are reserved");
        // As an operator would ask.
        let services = container.exec(&["fairlead", "services"])?;
        let frontend = at_vip(1, Family::V4, PORT).to_string();
        ensure!(services.contains(&frontend), "{frontend} is not among:\n{services}");
    }
    let open = open_calls(&world)?;
    for mut container in containers {
        let status = container.stop()?;
        ensure!(status.success(), "SIGTERM is a normal end, not {status}");
    }
    // Pods are gone, and what they loaded is not. The next ones take it over.
    traffic_goes_on(&world, &open)?;
    let containers = run(&world, &image)?;
    traffic_goes_on(&world, &open)?;
    drop(open);
    containers.into_iter().try_for_each(|mut container| container.stop().map(drop))?;
    nothing_is_left(&world, &image)
}

/// One program, text, and what a dynamic program is linked to.
fn has_no_shell(root: &Path) -> Result<()> {
    for dir in ["bin", "sbin", "usr/bin", "usr/sbin"] {
        ensure!(!root.join(dir).exists(), "/{dir} is in the image");
    }
    let programs: Vec<_> = fs::read_dir(root.join("usr/local/bin"))?.collect::<Result<_, _>>()?;
    ensure!(programs.len() == 1, "{programs:?}");
    Ok(())
}

/// The runtime has given what the manifest says, and no more.
fn is_confined(process: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    // NET_ADMIN, PERFMON, BPF.
    let bits = [12, 38, 39].into_iter().fold(0_u64, |bits, number| bits | 1 << number);
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        ensure!(field(set) == Some(&format!("{bits:016x}")), "{set} {:?}", field(set));
    }
    ensure!(field("NoNewPrivs:") == Some("1"), "it may gain rights");
    let mounts = fs::read_to_string(format!("/proc/{process}/mounts"))?;
    for (point, mode) in [("/", "ro"), ("/proc/sys", "ro"), ("/host/cgroup", "ro"), ("/sys/fs/bpf", "rw")] {
        // The last mount on a point is the one that is seen.
        let mount = mounts
            .lines()
            .rev()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields[1] == point);
        let options = mount.with_context(|| format!("{point} is no mount:\n{mounts}"))?[3].to_owned();
        ensure!(options.split(',').next() == Some(mode), "{point}: {options}, not {mode}");
    }
    Ok(())
}

/// After `fairlead cleanup` from the same image: no pins, no programs, no settings, no containers.
fn nothing_is_left(world: &World, image: &Image) -> Result<()> {
    let lab = world.lab();
    for node in lab.nodes() {
        let removed = cleanup(world, image, node)?;
        ensure!(removed.contains("removed"), "{removed}");
        let removed = cleanup(world, image, node)?;
        ensure!(removed == "nothing to remove\n", "{removed}");
        let pins: Vec<_> = fs::read_dir(lab.pins(node))?.collect::<Result<_, _>>()?;
        ensure!(pins.is_empty(), "{pins:?}");
        ensure!(reserved_ports(node)?.is_empty(), "source ports stay reserved");
    }
    let state: Vec<_> = fs::read_dir(lab.dir().join("crun"))?.collect::<Result<_, _>>()?;
    ensure!(state.is_empty(), "containers are left: {state:?}");
    Ok(())
}

/// What `fairlead cleanup` says in a container like the agent's.
fn cleanup(world: &World, image: &Image, node: &Node) -> Result<String> {
    let pod = daemon_set()?.with_args(&["cleanup"])?;
    let mut container = Container::start(world.lab(), node, &pod, image, &[], world.cluster.manifests.dir())?;
    let status = container.wait()?;
    ensure!(status.success(), "{status}: {}", container.log());
    Ok(container.log())
}
