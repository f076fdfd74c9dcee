//! UDP clients that keep their socket while endpoints come and go.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use xtask::lab::client::OpenCall;
use xtask::lab::{Call, Caller, Endpoint, Family, Outcome, Protocol, Service, eventually};

use crate::cells::Frontend;
use crate::world::{AT_ONCE, SILENCE, SOON, TARGET_PORT, World, balanced, options, until_only};

type Socket<'a> = (String, OpenCall<'a>);

/// Asks until every socket is answered as expected.
fn all_become(sockets: &[Socket<'_>], what: &str, expected: impl Fn(&Outcome) -> bool) -> Result<()> {
    let begin = Instant::now();
    for (who, socket) in sockets {
        eventually(SOON, || {
            let outcome = socket.again()?;
            ensure!(expected(&outcome), "{who}, {what}: {outcome}");
            Ok(())
        })?;
    }
    eprintln!("{what}: after {:?}", begin.elapsed());
    Ok(())
}

fn answered_by(server: &str, port: u16) -> impl Fn(&Outcome) -> bool {
    move |outcome| match outcome {
        Outcome::Answer(answer) => {
            answer.introduction.server == server && answer.introduction.at.port() == port
        }
        _ => false,
    }
}

/// Rules 97, 121, 133, 134, 136, 139 and 150.
#[test]
fn udp_sockets_follow_every_change_of_endpoints_down_to_none_and_back() -> Result<()> {
    const OTHER_PORT: u16 = 8081;
    let world = World::with_services(options(), |_| vec![balanced(1, [] as [Endpoint; 0])])?;
    world.route_services_through(world.node_b())?;
    world.b1.listen(Protocol::Udp, OTHER_PORT)?;
    let (lab, node_port) = (world.lab(), Frontend::NodePort(world.node_a()));
    // A node's process is connected to an endpoint for good; it asks again with each datagram otherwise.
    let clients: [(&Caller, Frontend<'_>, Family, bool); 8] = [
        (&world.a2, Frontend::ClusterIp, Family::V4, true),
        (&world.a2, node_port, Family::V6, false),
        (&world.b2, Frontend::ClusterIp, Family::V6, true),
        (&lab.outside, node_port, Family::V4, true),
        (&lab.outside, Frontend::LoadBalancerIp, Family::V6, true),
        (&lab.far, Frontend::ExternalIp, Family::V4, true),
        (world.node_a(), Frontend::ClusterIp, Family::V6, false),
        (world.node_b(), Frontend::LoadBalancerIp, Family::V4, false),
    ];
    let refused = |outcome: &Outcome| *outcome == Outcome::Refused;
    let mut sockets = Vec::new();
    let mut silent = Vec::new();
    for (caller, frontend, family, connected) in clients {
        let call = Call::udp(frontend.target(1, family)).patience(SILENCE);
        let call = if connected { call } else { call.unconnected() };
        let (socket, first) = caller.open(call)?;
        let who = format!("{} -> {}", caller.name(), frontend.target(1, family));
        // An unconnected socket is told nothing of ICMP, except by the socket programs.
        let told = connected || caller.name().starts_with("node-");
        let fine = if told { refused(&first) } else { first == Outcome::TimedOut };
        ensure!(fine, "{who}: {first} without endpoints");
        if told { &mut sockets } else { &mut silent }.push((who, socket));
    }
    let apply = |service: &Service| world.cluster.manifests.apply(service);
    let [a1, b1] = [&world.a1, &world.b1].map(|pod| balanced(1, [pod]));
    for round in ["the first endpoint", "one again"] {
        apply(&b1)?;
        for sockets in [&sockets, &silent] {
            all_become(sockets, round, answered_by("b1", TARGET_PORT))?;
        }
        apply(&a1)?;
        for sockets in [&sockets, &silent] {
            all_become(sockets, "another endpoint", answered_by("a1", TARGET_PORT))?;
        }
        let mut other_port = b1.clone();
        for port in &mut other_port.ports {
            port.target_port = Some(OTHER_PORT);
        }
        apply(&other_port)?;
        for sockets in [&sockets, &silent] {
            all_become(sockets, "another target port", answered_by("b1", OTHER_PORT))?;
        }
        apply(&balanced(1, [] as [Endpoint; 0]))?;
        all_become(&sockets, "no endpoint", refused)?;
        for (who, socket) in &sockets {
            let begin = Instant::now();
            let outcome = socket.again()?;
            ensure!(refused(&outcome) && begin.elapsed() < AT_ONCE, "{who}: {outcome}");
        }
    }
    Ok(())
}

/// Rules 91 and 133, policy Local: from one endpoint of the node to the next, with silence between the two.
#[test]
fn udp_sockets_follow_the_endpoints_of_their_node() -> Result<()> {
    let local = |endpoints: Vec<Endpoint>| {
        let mut service = balanced(1, endpoints);
        service.spec["internalTrafficPolicy"] = json!("Local");
        service.spec["externalTrafficPolicy"] = json!("Local");
        service
    };
    let world = World::with_services(options(), |world| vec![local(vec![(&world.a1).into()])])?;
    let a3 = world.lab().add_pod(world.node_a(), "a3")?;
    a3.listen(Protocol::Udp, TARGET_PORT)?;
    let mut sockets = Vec::new();
    for (caller, frontend) in [
        (&*world.a2, Frontend::ClusterIp),
        (&**world.node_a(), Frontend::ClusterIp),
        (&*world.lab().outside, Frontend::NodePort(world.node_a())),
    ] {
        for family in Family::ALL {
            let call = Call::udp(frontend.target(1, family)).unconnected().patience(SILENCE / 2);
            let (socket, first) = caller.open(call)?;
            ensure!(first.server() == Some("a1"), "{}: {first}", caller.name());
            sockets.push((caller.name().to_owned(), socket));
        }
    }
    let [a1, a3] = [&world.a1, &a3].map(Endpoint::from);
    let b1 = Endpoint::from(&world.b1);
    let nobody = |outcome: &Outcome| matches!(outcome, Outcome::TimedOut | Outcome::Unreachable(_));
    let apply = |endpoints| world.cluster.manifests.apply(&local(endpoints));
    apply(vec![b1.clone()])?;
    all_become(&sockets, "no endpoint here", nobody)?;
    apply(vec![b1, a3.clone()])?;
    all_become(&sockets, "a new endpoint here", answered_by("a3", TARGET_PORT))?;
    // Who still serves keeps its clients; new ones come to others.
    apply(vec![a3.clone().terminating(true), a1.clone()])?;
    for family in Family::ALL {
        until_only(&world.a2, &Call::udp(Frontend::ClusterIp.target(1, family)), &["a1"])?;
    }
    for (who, socket) in &sockets {
        let outcome = socket.again()?;
        ensure!(outcome.server() == Some("a3"), "{who}: {outcome}");
    }
    apply(vec![a3.terminating(false), a1])?;
    all_become(&sockets, "the endpoint does not serve any more", answered_by("a1", TARGET_PORT))
}
