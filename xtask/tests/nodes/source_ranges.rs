//! Who may ask for load-balancer IPs, and which of them are ours.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use xtask::lab::{Call, Family, Outcome, Port, Protocol, Service};

use crate::cells::{Client, Frontend, Kind, each_at_once};
use crate::world::{
    Findings, PORT, TARGET_PORT, World, announced, balanced, external_ips, lb_ips, of_family, options, until,
    vip,
};

/// How long silence is listened to.
const QUIET: Duration = Duration::from_millis(200);
const EVERYBODY: &[&str] = &["a2", "b2", "node-a", "node-b", "outside", "far"];

/// Service number `n`, which these networks may ask, with a second load-balancer IP of each family.
fn restricted(world: &World, n: u8, ranges: &Value) -> Service {
    let mut service = balanced(n, [&world.a1]);
    service.ingress.extend(announced(50, n).iter().map(|addr| json!({ "ip": addr, "ipMode": "VIP" })));
    service.spec["loadBalancerSourceRanges"] = ranges.clone();
    service
}

/// Rules 16 to 21, 23 to 25, and 148.
#[test]
fn source_ranges_admit_those_they_name_to_load_balancer_ips() -> Result<()> {
    // By family, who is in them.
    let rows: [(Value, [&[&str]; 2]); 5] = [
        (json!([" 192.0.2.100/32", "198.51.100.0/24\t"]), [&["outside", "far"], EVERYBODY]),
        (json!(["192.0.2.1/32", "2001:db8::2/128"]), [&["node-a"], &["node-b"]]),
        (json!(["0.0.0.0/0", "2001:db8::100/128"]), [EVERYBODY, &["outside"]]),
        // The bridge of node-b has an address of its pods' network.
        (json!(["10.244.1.0/24", "fd00:10:244:2::/64"]), [&["a2"], &["b2", "node-b"]]),
        (json!(["2001:db8::/32"]), [EVERYBODY, &["node-a", "node-b", "outside", "far"]]),
    ];
    let world = World::with_services(options(), |world| {
        (1..).zip(&rows).map(|(n, (ranges, _))| restricted(world, n, ranges)).collect()
    })?;
    world.route_services_through(world.node_a())?;
    let node_port = Frontend::NodePort(world.node_a());
    let findings = each_at_once(&world.clients(), |client| {
        let mut findings = Findings::default();
        for (n, (_, admitted)) in (1..).zip(&rows) {
            for (family, admitted) in Family::ALL.into_iter().zip(admitted) {
                let fits = admitted.contains(&client.caller.name());
                let second = SocketAddr::new(of_family(announced(50, n), family), PORT);
                for (target, protocol, open) in [
                    (Frontend::LoadBalancerIp.target(n, family), Protocol::Tcp, fits),
                    (second, Protocol::Udp, fits),
                    // Nothing else of the Service is restricted.
                    (Frontend::ClusterIp.target(n, family), Protocol::Udp, true),
                    (Frontend::ExternalIp.target(n, family), Protocol::Tcp, true),
                    (node_port.target(n, family), Protocol::Tcp, true),
                ] {
                    check(client, Call::new(protocol, target), open, &mut findings)?;
                }
            }
        }
        Ok(findings)
    })?;
    let mut all = Findings::default();
    for findings in findings {
        all.add(findings);
    }
    all.report();
    Ok(())
}

fn check(client: &Client<'_>, call: Call, open: bool, findings: &mut Findings) -> Result<()> {
    if findings.enough() {
        return Ok(());
    }
    let call = if open { call } else { call.patience(QUIET) };
    let outcome = client.caller.ask(call.clone())?;
    let fine = match (open, client.kind) {
        (true, _) => outcome.server() == Some("a1"),
        // A socket cannot be met with silence.
        (false, Kind::Process) => matches!(outcome, Outcome::Unreachable(_)),
        (false, _) => outcome == Outcome::TimedOut,
    };
    findings.check(fine, || format!("{} -> {call:?}: {outcome}, open: {open}", client.caller.name()));
    Ok(())
}

/// Rules 22 and 148: ranges are followed; a load balancer may do without NodePorts.
#[test]
fn changes_of_source_ranges_are_followed() -> Result<()> {
    let mut service = Service::new("service-1", &vip(1)).port(Port::new(Protocol::Tcp, PORT, TARGET_PORT));
    service.ingress = lb_ips(1).iter().map(|addr| json!({ "ip": addr })).collect();
    service.spec = json!({ "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false });
    let world = World::with_services(options(), |world| vec![service.clone().endpoint(&world.a1)])?;
    service.endpoints = vec![(&world.a1).into()];
    world.route_services_through(world.node_a())?;
    let clients = [
        (&*world.lab().outside, "192.0.2.100/32"),
        (&*world.lab().far, "198.51.100.100/32"),
        (&*world.b2, "10.244.2.11/32"),
        (&**world.node_b(), "192.0.2.2/32"),
    ];
    let call = Call::tcp(Frontend::LoadBalancerIp.target(1, Family::V4));
    let follow = |admitted: &[bool; 4]| -> Result<()> {
        for ((caller, _), open) in clients.into_iter().zip(admitted) {
            until(caller, &call, |outcome| match outcome {
                Outcome::Answer(_) => *open,
                other => !open && matches!(other, Outcome::TimedOut | Outcome::Unreachable(_)),
            })?;
        }
        Ok(())
    };
    follow(&[true; 4])?;
    for admitted in [[true, false, false, true], [false, true, true, false], [false; 4], [true; 4]] {
        let ranges = clients.iter().zip(admitted).filter(|(_, open)| *open).map(|((_, range), _)| *range);
        let nobody = ["192.0.2.77/32"];
        service.spec["loadBalancerSourceRanges"] = json!(ranges.chain(nobody).collect::<Vec<_>>());
        world.cluster.manifests.apply(&service)?;
        follow(&admitted)?;
    }
    Ok(())
}

/// Rule 63, and 112: an externalIP that nobody has is served, the address of a load balancer that proxies is not.
#[test]
fn the_address_of_a_load_balancer_that_proxies_is_left_alone() -> Result<()> {
    let world = World::new(options())?;
    let far = &world.lab().far;
    for node in world.lab().nodes() {
        let pods = node.pod_cidrs();
        world.lab().route_through(node, &[&pods[0], &pods[1]])?;
    }
    far.serve(Protocol::Tcp, &far.addrs.with_port(PORT))?;
    let mut service = balanced(1, [&world.a1]);
    let ingress = |mode: &str| far.addrs.both().map(|addr| json!({ "ip": addr, "ipMode": mode })).to_vec();
    service.ingress = ingress("Proxy");
    world.cluster.manifests.apply(&service)?;
    world.cluster.start()?;
    let answers = |server| -> Result<()> {
        for family in Family::ALL {
            for client in world.clients().into_iter().filter(|client| client.kind != Kind::Outside) {
                let proxy = Call::tcp(SocketAddr::new(far.addrs.of(family), PORT));
                until(client.caller, &proxy, |outcome| outcome.server() == Some(server))?;
                let external = Call::tcp(SocketAddr::new(of_family(external_ips(1), family), PORT));
                until(client.caller, &external, |outcome| outcome.server() == Some("a1"))?;
            }
        }
        Ok(())
    };
    answers("far")?;
    service.ingress = ingress("VIP");
    world.cluster.manifests.apply(&service)?;
    answers("a1")?;
    service.ingress = ingress("Proxy");
    world.cluster.manifests.apply(&service)?;
    answers("far")
}
