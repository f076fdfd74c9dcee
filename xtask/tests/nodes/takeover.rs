//! From kube-proxy to Fairlead and back, with connections open all the time.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use lb_common::Reason;
use xtask::lab::client::OpenCall;
use xtask::lab::{Agent, AgentOptions, Call, Caller, Family, Node, Outcome};

use crate::world::{PORT, TARGET_PORT, World, agent, at_vip, node_port, options, service};

/// Runs `nft` on a node.
pub(crate) fn nft(node: &Node, script: &str) -> Result<()> {
    let output = node.ns.run(|| -> Result<_> {
        let mut nft = Command::new("nft");
        let mut child = nft.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("no pipe to nft")?.write_all(script.as_bytes())?;
        Ok(child.wait_with_output()?)
    })??;
    ensure!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What kube-proxy would have written on node-a for Services 1 and 2: one endpoint each, here and there.
fn kube_proxy(world: &World) -> String {
    let mut script = String::new();
    for (family, ip, pods) in [(Family::V4, "ip", "10.244.0.0/16"), (Family::V6, "ip6", "fd00:10:244::/48")] {
        let mut rules = String::new();
        for (n, pod) in [(1, &world.a1), (2, &world.b1)] {
            let to = pod.at(family, TARGET_PORT);
            for frontend in [world.node_a().at(family, node_port(n)), at_vip(n, family, PORT)] {
                let (addr, port) = (frontend.ip(), frontend.port());
                writeln!(rules, "{ip} daddr {addr} tcp dport {port} dnat to {to}").expect("a string");
            }
        }
        writeln!(
            script,
            "table {ip} kube-proxy {{\n\
             chain services {{\n{rules}}}\n\
             chain pre {{ type nat hook prerouting priority dstnat\njump services\n}}\n\
             chain out {{ type nat hook output priority -100\njump services\n}}\n\
             chain post {{ type nat hook postrouting priority srcnat\n\
             ct status dnat {ip} saddr != {pods} masquerade fully-random\n}}\n}}"
        )
        .expect("a string");
    }
    script
}

/// A network plugin that masquerades what pods send to the world: it has NAT in the stack without kube-proxy.
const CNI: &str = "table ip cni { chain post { type nat hook postrouting priority srcnat
    ip saddr 203.0.113.9 masquerade\n}\n}
    table ip6 cni { chain post { type nat hook postrouting priority srcnat
    ip6 saddr 2001:db8:9::9 masquerade\n}\n}\n";

/// Connections of every kind of client of node-a, to backends here and there.
fn open_calls(world: &World) -> Result<Vec<(String, OpenCall<'_>, Outcome)>> {
    let mut open = Vec::new();
    for family in Family::ALL {
        for (n, server) in [(1, "a1"), (2, "b1")] {
            let node_port = Call::tcp(world.node_a().at(family, node_port(n)));
            let cluster_ip = Call::tcp(at_vip(n, family, PORT));
            let callers: [(&Caller, &Call); 4] = [
                (&world.lab().outside, &node_port),
                (&world.lab().far, &node_port),
                (&world.a2, &cluster_ip),
                (world.node_a(), &cluster_ip),
            ];
            for (caller, call) in callers {
                let what = format!("{} -> {}", caller.name(), call.target);
                let (call, first) = caller.open(call.clone())?;
                ensure!(first.server() == Some(server), "{what}: {first}");
                open.push((what, call, first));
            }
        }
    }
    Ok(open)
}

fn go_on(open: &[(String, OpenCall<'_>, Outcome)]) -> Result<()> {
    for (what, call, first) in open {
        let now = call.again()?;
        ensure!(now == *first, "{what}: {now} after {first}");
    }
    Ok(())
}

fn start(world: &World, argument: &str) -> Result<Agent> {
    let mut options: AgentOptions = options();
    options.args.push(argument.to_owned());
    Agent::start(world.lab(), world.node_a(), &agent(), &world.cluster.manifests, &options)
}

fn counted(agent: &Agent, reason: Reason) -> Result<u64> {
    let counters = agent.counters()?;
    Ok(lb_common::Hook::ALL.into_iter().map(|hook| counters.get(hook, reason)).sum())
}

/// Rule 159.
#[test]
fn connections_outlive_the_change_from_kube_proxy_and_back() -> Result<()> {
    let world = World::new(options())?;
    for service in [service(1, [&world.a1]), service(2, [&world.b1])] {
        world.cluster.manifests.apply(&service)?;
    }
    nft(world.node_a(), CNI)?;
    nft(world.node_a(), &kube_proxy(&world))?;
    let of_kube_proxy = open_calls(&world).context("kube-proxy's")?;

    let agent = start(&world, "--takeover")?;
    go_on(&of_kube_proxy).context("Fairlead is there")?;
    nft(world.node_a(), "delete table ip kube-proxy\ndelete table ip6 kube-proxy\n")?;
    go_on(&of_kube_proxy).context("kube-proxy is gone")?;
    let ours = open_calls(&world).context("Fairlead's")?;
    go_on(&ours)?;
    ensure!(counted(&agent, Reason::LeftToOthers)? > 0, "somebody has translated the old connections");
    agent.stop()?;

    nft(world.node_a(), &kube_proxy(&world))?;
    let agent = start(&world, "--drain")?;
    go_on(&ours).context("kube-proxy is back")?;
    let left = counted(&agent, Reason::LeftToOthers)?;
    let again_of_kube_proxy = open_calls(&world).context("new ones")?;
    ensure!(counted(&agent, Reason::LeftToOthers)? > left, "new connections are kube-proxy's");
    go_on(&ours)?;
    // The old ones have ended; then nobody misses us.
    drop(ours);
    agent.stop()?;
    world.cluster.fairlead(world.node_a(), &["cleanup"])?;
    go_on(&again_of_kube_proxy).context("Fairlead is gone")?;
    go_on(&of_kube_proxy).context("the oldest")?;
    open_calls(&world).map(drop).context("kube-proxy alone")
}
