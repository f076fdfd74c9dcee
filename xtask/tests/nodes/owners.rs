//! Source ports that Fairlead gives out are nobody else's: neither of the node's sockets, nor of what nf_conntrack has
//! masqueraded.

use anyhow::{Context as _, Result, ensure};
use xtask::lab::{AgentOptions, Call, Caller, Family, Xdp};

use crate::world::{TARGET_PORT, World, node_port, options, service};

/// Connections of each kind, all open at the same time to one endpoint.
const CONNECTIONS: usize = 150;

#[test]
fn flows_sockets_and_masqueraded_pods_share_no_tuple() -> Result<()> {
    for xdp in [Xdp::Native, Xdp::Off] {
        let mode = AgentOptions { xdp, ..options() };
        let world = World::with_services(mode, |world| vec![service(1, [&world.b1])])?;
        let node = world.node_a();
        // What CNIs do for pods whose network others cannot reach.
        let [pods4, pods6] = node.pod_cidrs();
        node.ns
            .run(|| {
                let rules = format!(
                    "table inet cni {{ chain out {{ type nat hook postrouting priority srcnat; \
                 oifname eth0 ip saddr {pods4} masquerade; oifname eth0 ip6 saddr {pods6} masquerade; }}; }}"
                );
                let done = std::process::Command::new("nft").arg(rules).status();
                done.is_ok_and(|status| status.success())
            })
            .and_then(|done| done.then_some(()).context("nft refuses the rules"))?;
        for family in Family::ALL {
            let through = Call::tcp(node.at(family, node_port(1)));
            let direct = Call::tcp(world.b1.at(family, TARGET_PORT));
            let kinds: [(&Caller, &Call); 3] =
                [(&world.lab().outside, &through), (&world.a2, &direct), (node, &direct)];
            let mut open = Vec::new();
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..CONNECTIONS {
                for (caller, call) in kinds {
                    let (connection, outcome) = caller.open(call.clone())?;
                    ensure!(outcome.server() == Some("b1"), "{} {family:?}: {outcome}", caller.name());
                    let client = outcome.seen_as().context("the endpoint has seen a client")?;
                    ensure!(client.ip() == node.at(family, 0).ip(), "{} is seen as {client}", caller.name());
                    ensure!(seen.insert(client), "{client} is two connections");
                    open.push((caller.name(), connection));
                }
            }
            for (name, connection) in &open {
                let outcome = connection.again()?;
                ensure!(outcome.server() == Some("b1"), "{name} {family:?}: {outcome}");
            }
        }
    }
    Ok(())
}
