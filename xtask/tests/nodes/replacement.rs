//! Every endpoint of a Service is replaced while clients open connections: none fails.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask::lab::client::{OpenCall, Tally};
use xtask::lab::{Call, Caller, Endpoint, Family, Node, Pod, Protocol, eventually};

use crate::cells::Frontend;
use crate::world::{Findings, SOON, TARGET_PORT, World, balanced, options};

/// A connection that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(2);
/// Connections between two looks at who answers.
const BATCH: u32 = 20;
/// So many batches without an answer of an endpoint show that nobody is sent there any more.
const CLEAN: usize = 3;

/// A pod whose server is a process of its own, which ends.
struct Server {
    // Before the pod: it lives there.
    process: Caller,
    pod: Pod,
}

impl Server {
    fn start(world: &World, node: &Node, name: &str) -> Result<Self> {
        let pod = world.lab().add_pod(node, name)?;
        let process = world.lab().process_in_pod(node, &pod)?;
        process.serve(Protocol::Tcp, &pod.addrs.with_port(TARGET_PORT))?;
        Ok(Self { process, pod })
    }

    fn end(self, world: &World, node: &Node) -> Result<()> {
        drop(self.process);
        world.lab().remove_pod(node, self.pod)
    }
}

/// What one client has seen.
#[derive(Default)]
struct Seen {
    all: Tally,
    /// Who answered in each batch.
    batches: Vec<BTreeSet<String>>,
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep_asking(caller: &Caller, call: &Call, seen: &Mutex<Seen>, done: &AtomicBool) -> Result<()> {
    while !done.load(Ordering::Relaxed) {
        let tally = caller.ask_many(call.clone(), BATCH)?;
        let mut seen = lock(seen);
        seen.batches.push(tally.answers.keys().cloned().collect());
        seen.all.add(tally);
        drop(seen);
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until connections that begin from now on no more come to `server`.
fn until_left(server: &str, seen: &[Mutex<Seen>]) -> Result<()> {
    // The batch that runs now began before.
    let begun: Vec<usize> = seen.iter().map(|seen| lock(seen).batches.len() + 1).collect();
    eventually(SOON, || {
        for (seen, begun) in seen.iter().zip(&begun) {
            let seen = lock(seen);
            let since = seen.batches.get(*begun..).unwrap_or_default();
            let clean = since.iter().rev().take_while(|batch| !batch.contains(server)).count();
            ensure!(clean >= CLEAN, "{server} is still asked: {:?}", seen.all);
        }
        Ok(())
    })
}

/// A connection to `server`, through the Service.
fn connection_to<'a>(caller: &'a Caller, server: &str) -> Result<OpenCall<'a>> {
    eventually(SOON, || {
        let (call, first) = caller.open(Call::tcp(Frontend::ClusterIp.target(1, Family::V4)))?;
        ensure!(first.server() == Some(server), "{first}, not {server}");
        Ok(call)
    })
}

/// Rules 50, 126, 148 (policies Cluster and Local) and 149: ready, then terminating and serving, then gone.
#[test]
fn all_endpoints_are_replaced_under_load_without_a_failed_connection() -> Result<()> {
    let world = World::new(options())?;
    let (node_a, node_b) = (world.node_a(), world.node_b());
    let [a, b] = [Server::start(&world, node_a, "old-a")?, Server::start(&world, node_b, "old-b")?];
    let apply = |endpoints: Vec<Endpoint>| {
        let mut local = balanced(2, endpoints.clone());
        local.spec["externalTrafficPolicy"] = json!("Local");
        world.cluster.manifests.apply(&balanced(1, endpoints))?;
        world.cluster.manifests.apply(&local)
    };
    apply(vec![(&a.pod).into(), (&b.pod).into()])?;
    world.cluster.start()?;
    world.route_services_through(node_b)?;
    let call = |frontend: Frontend<'_>, n, family| Call::tcp(frontend.target(n, family)).patience(PATIENCE);
    let clients: [(&Caller, Call); 5] = [
        (&world.lab().outside, call(Frontend::NodePort(node_a), 2, Family::V4)),
        (&world.lab().far, call(Frontend::LoadBalancerIp, 1, Family::V6)),
        (&world.a2, call(Frontend::ClusterIp, 1, Family::V4)),
        (&world.b2, call(Frontend::ClusterIp, 1, Family::V6)),
        (node_a, call(Frontend::ClusterIp, 1, Family::V4)),
    ];
    let seen: [Mutex<Seen>; 5] = Default::default();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load: Vec<_> = clients
            .iter()
            .zip(&seen)
            .map(|((caller, call), seen)| {
                let done = &done;
                scope.spawn(move || keep_asking(caller, call, seen, done))
            })
            .collect();
        let replace = |old: Server, node: &Node, other: &Pod, name: &str| -> Result<Server> {
            let long = [&world.a1, &world.b1].map(|caller| connection_to(caller, old.pod.name()));
            let new = Server::start(&world, node, name)?;
            let [old_endpoint, other, new_endpoint] = [&old.pod, other, &new.pod].map(Endpoint::from);
            apply(vec![old_endpoint.clone(), other.clone(), new_endpoint.clone()])?;
            apply(vec![old_endpoint.terminating(true), other.clone(), new_endpoint.clone()])?;
            until_left(old.pod.name(), &seen)?;
            for long in long {
                let outcome = long?.again()?;
                ensure!(outcome.server() == Some(old.pod.name()), "a connection from before: {outcome}");
            }
            old.end(&world, node)?;
            apply(vec![other, new_endpoint])?;
            Ok(new)
        };
        let roll = || -> Result<(Server, Server)> {
            let a = replace(a, node_a, &b.pod, "new-a").context("the first")?;
            let b = replace(b, node_b, &a.pod, "new-b").context("the second")?;
            until_left("old-b", &seen)?;
            Ok((a, b))
        };
        let rolled = roll();
        done.store(true, Ordering::Relaxed);
        for thread in load {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        rolled
    })?;
    let mut findings = Findings::default();
    for ((caller, call), seen) in clients.iter().zip(&seen) {
        let Seen { all, batches } = &*lock(seen);
        eprintln!("{} -> {}: {:?}", caller.name(), call.target, all.answers);
        findings.check(all.failures.is_empty(), || format!("{} -> {call:?}: {all:?}", caller.name()));
        let asked = u32::try_from(batches.len())? * BATCH;
        findings.check(all.answers.values().sum::<u32>() == asked, || format!("not {asked}: {all:?}"));
        // Policy Local keeps outside clients on the node.
        let servers: &[&str] = if caller.name() == "outside" {
            &["new-a", "old-a"]
        } else {
            &["new-a", "new-b", "old-a", "old-b"]
        };
        findings.check(all.answers.keys().eq(servers), || format!("{}: {all:?}", caller.name()));
    }
    findings.report();
    Ok(())
}
