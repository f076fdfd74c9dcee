//! Traffic policies: each from each kind of client, by each kind of frontend, on a node with and without endpoints.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::json;
use xtask::lab::{Endpoint, Node, Protocol, Service};

use crate::cells::{Expected, check_every_cell};
use crate::world::{TARGET_PORT, World, balanced, options};

/// External and internal policy.
const CLUSTER: [&str; 2] = ["Cluster", "Cluster"];
const LOCAL_OUTSIDE: [&str; 2] = ["Local", "Cluster"];
const LOCAL_INSIDE: [&str; 2] = ["Cluster", "Local"];
const LOCAL: [&str; 2] = ["Local", "Local"];

fn with_policies(mut service: Service, [external, internal]: [&str; 2]) -> Service {
    service.spec["externalTrafficPolicy"] = json!(external);
    service.spec["internalTrafficPolicy"] = json!(internal);
    service
}

/// A pod with `hostNetwork`.
fn on_the_host(node: &Node) -> Endpoint {
    Endpoint::new(&node.name, &node.name, &node.addrs.both())
}

fn numbered(services: impl IntoIterator<Item = ([&'static str; 2], Vec<Endpoint>)>) -> Vec<(u8, Service)> {
    let number = |(n, (policies, endpoints))| (n, with_policies(balanced(n, endpoints), policies));
    (1..).zip(services).map(number).collect()
}

fn serve_on_hosts(world: &World) -> Result<()> {
    for node in world.lab().nodes() {
        for protocol in Protocol::ALL {
            node.serve(protocol, &node.addrs.with_port(TARGET_PORT))?;
        }
    }
    Ok(())
}

fn servers(names: &[&str]) -> Expected {
    Expected::Servers(names.iter().map(|&name| name.to_owned()).collect())
}

/// Rules 1 to 6, 17, 26, 27, 32 to 40, 43 to 49, 57 to 59, 106, 111, 112, 121 to 124, 142.
#[test]
fn every_policy_from_every_client() -> Result<()> {
    let services = |world: &World| {
        let [a1, b1] = [Endpoint::from(&world.a1), Endpoint::from(&world.b1)];
        let [node_a, node_b] = world.lab().nodes().map(on_the_host);
        numbered([
            (CLUSTER, vec![a1.clone(), b1.clone()]),
            (LOCAL_OUTSIDE, vec![a1.clone()]),
            (LOCAL_INSIDE, vec![a1.clone()]),
            (LOCAL, vec![a1, b1.clone()]),
            (CLUSTER, vec![]),
            (LOCAL, vec![]),
            (CLUSTER, vec![node_a]),
            (LOCAL, vec![node_b]),
        ])
    };
    let met = check(options(), services, false)?;
    let all = [
        servers(&["a1", "b1"]),
        servers(&["a1"]),
        servers(&["b1"]),
        servers(&["node-a"]),
        servers(&["node-b"]),
        Expected::Refused,
        Expected::Silence,
    ];
    assert_eq!(met, BTreeSet::from(all));
    Ok(())
}

/// Rules 50 to 56, 82, 126.
#[test]
fn terminating_endpoints_from_every_client() -> Result<()> {
    let services = |world: &World| {
        let [a1, b1] = [Endpoint::from(&world.a1), Endpoint::from(&world.b1)];
        numbered([
            // Used where nothing else is local, and nowhere else.
            (LOCAL, vec![a1.clone(), b1.clone().terminating(true)]),
            (CLUSTER, vec![a1.clone(), b1.clone().terminating(true)]),
            // Nobody is ready.
            (CLUSTER, vec![a1.clone().terminating(true), b1.clone().terminating(false)]),
            (LOCAL_OUTSIDE, vec![b1.clone().terminating(true)]),
            (LOCAL_INSIDE, vec![a1.clone().terminating(true), b1.clone().unready()]),
            // Nobody serves.
            (CLUSTER, vec![a1.clone().terminating(false), b1.clone().terminating(false)]),
            (LOCAL, vec![a1.unready(), b1.unready()]),
        ])
    };
    let met = check(options(), services, false)?;
    let all = [servers(&["a1"]), servers(&["b1"]), Expected::Refused, Expected::Silence];
    assert_eq!(met, BTreeSet::from(all));
    Ok(())
}

/// Rules 33, 35, 37, 58 and 130: with the networks of pods known, pods of other nodes are inside as well.
#[test]
fn policy_local_lets_pods_of_every_node_in_where_their_networks_are_known() -> Result<()> {
    let mut options = options();
    options.args.extend(["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"].map(str::to_owned));
    let services = |world: &World| numbered([(LOCAL_OUTSIDE, vec![Endpoint::from(&world.a1)])]);
    let met = check(options, services, true)?;
    assert_eq!(met, BTreeSet::from([servers(&["a1"]), Expected::Silence]));
    Ok(())
}

fn check(
    options: xtask::lab::AgentOptions,
    services: impl FnOnce(&World) -> Vec<(u8, Service)>,
    cluster_cidr: bool,
) -> Result<BTreeSet<Expected>> {
    let world = World::new(options)?;
    serve_on_hosts(&world)?;
    let services = services(&world);
    for (_, service) in &services {
        world.cluster.manifests.apply(service)?;
    }
    world.cluster.start()?;
    check_every_cell(&world, &services, cluster_cidr)
}
