//! The agent with exactly the rights that `deploy/base` gives it, and with one less.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::Value;
use xtask::lab::{Agent, AgentOptions, Jail, Xdp};

use crate::agent::{open_calls, reserved_ports, traffic_goes_on, two_services};
use crate::world::{World, agent, options};

const DAEMON_SET: &str = include_str!("../../../deploy/base/daemonset.yaml");

/// What the DaemonSet adds.
fn capabilities() -> Vec<String> {
    let document = Value::deserialize(serde_yaml_ng::Deserializer::from_str(DAEMON_SET)).expect("YAML");
    let container = &document["spec"]["template"]["spec"]["containers"][0];
    let added = container["securityContext"]["capabilities"]["add"].as_array().expect("a list");
    added.iter().map(|name| name.as_str().expect("a name").to_owned()).collect()
}

fn jailed(options: AgentOptions) -> AgentOptions {
    let jail = Jail { capabilities: capabilities(), hides_bpffs: false };
    AgentOptions { jail: Some(jail), ..options }
}

#[test]
fn an_agent_with_few_rights_serves_with_xdp() -> Result<()> {
    an_agent_with_few_rights_serves(options())
}

#[test]
fn an_agent_with_few_rights_serves_with_clsact() -> Result<()> {
    an_agent_with_few_rights_serves(AgentOptions { xdp: Xdp::Off, clsact: true, ..options() })
}

fn an_agent_with_few_rights_serves(options: AgentOptions) -> Result<()> {
    let world = World::with_services(jailed(options), two_services)?;
    for node in world.lab().nodes() {
        let agent = world.cluster.agent(node)?;
        is_confined(agent.pid().context("it runs")?)?;
        is_private(agent.pins())?;
        // What the agent remembers to undo.
        let notes = world.lab().dir().join(format!("{}-root-state", node.name));
        for file in fs::read_dir(&notes)? {
            is_private(&file?.path())?;
        }
        ensure!(!reserved_ports(node)?.is_empty(), "no source ports are reserved");
    }
    let open = open_calls(&world)?;
    // The next one takes over what it finds.
    for agent in world.cluster.take_agents() {
        agent.kill()?;
    }
    world.cluster.start()?;
    traffic_goes_on(&world, &open)
}

/// The jail is what it claims to be.
fn is_confined(process: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let bits = [12, 38, 39].into_iter().fold(0_u64, |bits, number| bits | 1 << number);
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        ensure!(field(set) == Some(&format!("{bits:016x}")), "{set} {:?}", field(set));
    }
    ensure!(field("NoNewPrivs:") == Some("1"), "it may gain rights");
    let mounts = fs::read_to_string(format!("/proc/{process}/mounts"))?;
    for point in ["/", "/sys", "/proc/sys"] {
        // The last mount on a point is the one that is seen.
        let options = mounts.lines().rev().map(|line| line.split(' ').collect::<Vec<_>>());
        let options =
            options.into_iter().find(|fields| fields[1] == point).map(|fields| fields[3].to_owned());
        ensure!(
            options.is_some_and(|options| options.starts_with("ro")),
            "{point} can be written:\n{mounts}"
        );
    }
    Ok(())
}

/// Nobody but their owner may open it, whatever the umask was.
fn is_private(pins: &Path) -> Result<()> {
    let mode = fs::symlink_metadata(pins)?.permissions().mode() & 0o7777;
    if !pins.is_dir() {
        ensure!(mode == 0o600, "{}: {mode:o}", pins.display());
        return Ok(());
    }
    ensure!(mode == 0o700, "{}: {mode:o}", pins.display());
    let inside: Vec<_> = fs::read_dir(pins)?.collect::<Result<_, _>>()?;
    ensure!(!inside.is_empty(), "{} is empty", pins.display());
    inside.iter().try_for_each(|entry| is_private(&entry.path()))
}

/// What an agent says that cannot start.
fn refusal(world: &World, jail: Jail) -> Result<String> {
    let options = AgentOptions { jail: Some(jail), ..options() };
    let started = Agent::start(world.lab(), world.node_a(), &agent(), &world.cluster.manifests, &options);
    let refused = started.err().context("it has started")?.to_string();
    ensure!(refused.contains("exit status: 1"), "{refused}");
    let said: Vec<&str> = refused.lines().filter(|line| line.starts_with("fairlead: ")).collect();
    let last = said.last().context("it says nothing")?;
    Ok((*last).to_owned())
}

#[test]
fn a_missing_right_is_named() -> Result<()> {
    let world = World::new(options())?;
    for missing in capabilities() {
        let rest = capabilities().into_iter().filter(|name| *name != missing).collect();
        let said = refusal(&world, Jail { capabilities: rest, hides_bpffs: false })?;
        let expected = format!("fairlead: not enough privileges: CAP_{missing} missing;");
        ensure!(said.starts_with(&expected), "without {missing}: {said}");
    }
    let said = refusal(&world, Jail { capabilities: capabilities(), hides_bpffs: true })?;
    ensure!(said.contains("run `mount -t bpf bpf /sys/fs/bpf`"), "without bpffs: {said}");
    ensure!(!world.lab().pins(world.node_a()).exists(), "refused agents leave nothing");
    Ok(())
}
