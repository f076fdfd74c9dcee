//! Flows under load: floods, a table that is too small, ports that come back, backends that go.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::testing::{tcp, udp};
use lb_common::wire::tcp_flags::SYN;
use socket2::{Domain, Protocol as Number, Socket, Type};
use xtask::lab::client::OpenCall;
use xtask::lab::netns::Netns;
use xtask::lab::{AgentOptions, Call, Caller, Endpoint, Family, Outcome, eventually};

use crate::cells::Frontend;
use crate::world::{AT_ONCE, SOON, World, balanced, options, until_only};

/// Options of the agents with more arguments.
fn with(args: &[&str]) -> AgentOptions {
    let mut options = options();
    options.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    options
}

/// Connections that stay open, and who answers on each.
struct Open<'a>(Vec<(String, OpenCall<'a>, String)>);

impl<'a> Open<'a> {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn add(&mut self, caller: &'a Caller, target: SocketAddr, count: usize) -> Result<()> {
        for _ in 0..count {
            let (call, first) = caller.open(Call::tcp(target))?;
            let server = first.server().with_context(|| format!("{target}: {first}"))?.to_owned();
            self.0.push((format!("{} -> {target}", caller.name()), call, server));
        }
        Ok(())
    }

    /// Asks once on each: the same server answers.
    fn all_live(&self) -> Result<()> {
        for (who, call, server) in &self.0 {
            let outcome = call.again()?;
            ensure!(outcome.server() == Some(server), "{who}, connected to {server}: {outcome}");
        }
        Ok(())
    }
}

/// Both ends of a backend's life: connections go on while it terminates; once it is gone the next packet is answered with
/// a RST, where that is wanted.
#[test]
fn tcp_to_a_removed_backend_is_kept_or_reset_as_asked() -> Result<()> {
    for (reset, option) in
        [(true, "--tcp-to-removed-backend=reset"), (false, "--tcp-to-removed-backend=keep")]
    {
        let world = World::with_services(with(&[option]), |world| vec![balanced(1, [&world.b1])])?;
        let mut calls = Vec::new();
        for family in Family::ALL {
            for (caller, frontend) in [
                (&*world.a2, Frontend::ClusterIp),
                (&*world.lab().outside, Frontend::NodePort(world.node_a())),
                (&*world.lab().outside, Frontend::NodePort(world.node_b())),
            ] {
                let (call, first) = caller.open(Call::tcp(frontend.target(1, family)))?;
                ensure!(first.server() == Some("b1"), "{}: {first}", caller.name());
                calls.push((caller.name(), call));
            }
        }
        let apply = |endpoints: Vec<Endpoint>| world.cluster.manifests.apply(&balanced(1, endpoints));
        let new = Call::tcp(Frontend::ClusterIp.target(1, Family::V4));
        apply(vec![Endpoint::from(&world.b1).terminating(true), (&world.a1).into()])?;
        until_only(&world.a2, &new, &["a1"])?;
        for (who, call) in &calls {
            let outcome = call.again()?;
            ensure!(outcome.server() == Some("b1"), "{who}, terminating: {outcome}");
        }
        apply(vec![(&world.a1).into()])?;
        if reset {
            for (who, call) in &calls {
                eventually(SOON, || {
                    let begin = Instant::now();
                    let outcome = call.again()?;
                    let at_once = begin.elapsed() < AT_ONCE;
                    ensure!(outcome == Outcome::Reset && at_once, "{who}, {option}: {outcome}");
                    Ok(())
                })?;
            }
        } else {
            // Longer than it takes until the backend is out of use.
            thread::sleep(Duration::from_secs(3));
            for (who, call) in &calls {
                let outcome = call.again()?;
                ensure!(outcome.server() == Some("b1"), "{who}, {option}: {outcome}");
            }
        }
        until_only(&world.a2, &new, &["a1"])?;
    }
    Ok(())
}

/// Sends first packets with sources that nobody has, in half a minute or so: what is lost in the queues of a device whose
/// machine can do no more is no matter of flows. Returns when all are sent.
fn flood(ns: &Netns, target: SocketAddr, packets: u32, seed: u32, datagrams: bool) -> Result<()> {
    const TIME: Duration = Duration::from_secs(25);
    const BURST: u32 = 32;
    let begin = Instant::now();
    ns.run(|| -> Result<()> {
        // IPPROTO_RAW: the IP header is ours.
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Number::from(255)))?;
        let mut state = seed;
        for n in 0..packets {
            if n % BURST == 0 {
                thread::sleep((TIME / packets * n).saturating_sub(begin.elapsed()));
            }
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // 198.18.0.0/15 is for such tests (RFC 2544).
            let [a, b, c, d] = state.to_be_bytes();
            let source = SocketAddr::from((
                Ipv4Addr::new(198, 18 + (c & 1), a, b),
                u16::from_be_bytes([b | 4, c ^ d]),
            ));
            let frame = if datagrams { udp(source, target, b"who 1") } else { tcp(source, target, SYN) };
            // A full queue is a flood's own loss.
            let _ = socket.send_to(&frame[14..], &target.into());
        }
        Ok(())
    })?
}

/// Rule 3 of the design: a million spoofed first packets, answered by the backends, cost no established connection a
/// byte, idle ones included, and keep no new one out.
#[test]
fn a_flood_of_first_packets_costs_no_connection_a_byte() -> Result<()> {
    const SYNS: u32 = 500_000;
    const DATAGRAMS: u32 = 100_000;
    // Chosen at random, a connection whose flow was lost would come to another backend.
    let args = ["--max-flows=262144", "--max-services=1024", "--max-backends=1024", "--algorithm=random"];
    let options = AgentOptions { args: args.map(str::to_owned).to_vec(), ..AgentOptions::default() };
    let world = World::with_services(options, |world| {
        // The second has a backend of its own: what a flood does to the queue of a listening socket is not ours.
        vec![balanced(1, [&world.a1, &world.b1]), balanced(2, [&world.a2])]
    })?;
    let other = Frontend::NodePort(world.node_a()).target(2, Family::V4);
    let node_port = Frontend::NodePort(world.node_a()).target(1, Family::V4);
    let cluster_ip = Frontend::ClusterIp.target(1, Family::V4);
    let lab = world.lab();
    let (mut busy, mut idle) = (Open::new(), Open::new());
    busy.add(&lab.far, node_port, 25)?;
    busy.add(&world.a2, cluster_ip, 25)?;
    idle.add(&lab.far, node_port, 10)?;
    idle.add(&world.a2, cluster_ip, 10)?;
    let done = AtomicBool::new(false);
    let begin = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let senders: Vec<_> = [(1, SYNS, false), (2, SYNS, false), (3, DATAGRAMS, true)]
            .map(|(seed, packets, datagrams)| {
                scope.spawn(move || flood(&lab.outside.ns, node_port, packets, seed, datagrams))
            })
            .into();
        let rounds = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                busy.all_live()?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let fresh =
            scope.spawn(|| connect_often(&lab.far.ns, other, u32::MAX, || !done.load(Ordering::Relaxed)));
        let sent: Vec<Result<()>> =
            senders.into_iter().map(|sender| sender.join().expect("no panic")).collect();
        done.store(true, Ordering::Relaxed);
        let rounds = rounds.join().expect("no panic")?;
        let fresh = fresh.join().expect("no panic")?;
        sent.into_iter().collect::<Result<()>>()?;
        eprintln!(
            "{:?}; {rounds} rounds of 50 connections, new ones: {}, {:?}",
            begin.elapsed(),
            fresh.fine,
            fresh.failures
        );
        let failed = fresh.failures.len() as u64;
        ensure!(fresh.fine > 100 && failed * 100 <= u64::from(fresh.fine), "{:?}", fresh.failures);
        ensure!(rounds > 0, "the flood was over too soon");
        Ok(())
    })?;
    busy.all_live()?;
    idle.all_live()?;
    // What is seen of the flood.
    let metrics = eventually(SOON, || {
        let (_, page) = world.node_a().get(SocketAddr::from(([127, 0, 0, 1], 10249)), "/metrics")?;
        let opening = sample(&page, "fairlead_flows{family=\"ipv4\",state=\"opening\"}")?;
        ensure!(opening > 1000.0, "{opening} opening flows");
        Ok(page)
    })?;
    let begun =
        sample(&metrics, "fairlead_service_connections_total{namespace=\"default\",name=\"service-1\"}")?;
    ensure!(begun > f64::from(SYNS), "{begun} connections were counted");
    Ok(())
}

/// Rule 2 of the design: in a table that is too small for all the connections that come and go, those that are used
/// stay with the backend that they have.
#[test]
fn churn_in_a_small_table_moves_no_connection() -> Result<()> {
    const FLOWS: u32 = 1024;
    // Each takes two entries: the table is turned over many times.
    const CONNECTIONS: u32 = 20 * FLOWS;
    // An eighth of the table comes between two uses of an open connection, however fast and busy the machine is.
    const BETWEEN: u32 = FLOWS / 16;
    let args =
        [&format!("--max-flows={FLOWS}"), "--max-services=1024", "--max-backends=1024", "--algorithm=random"];
    let options = AgentOptions { args: args.map(str::to_owned).to_vec(), ..AgentOptions::default() };
    let world = World::with_services(options, |world| {
        vec![balanced(1, [&world.a1, &world.b1]), balanced(2, [&world.a1])]
    })?;
    let lab = world.lab();
    let mut open = Open::new();
    for family in Family::ALL {
        open.add(&lab.far, Frontend::NodePort(world.node_a()).target(1, family), 10)?;
        open.add(&world.a2, Frontend::ClusterIp.target(1, family), 10)?;
    }
    let (permits, wanted) = mpsc::sync_channel(BETWEEN as usize);
    let wanted = Mutex::new(wanted);
    let permitted = || wanted.lock().is_ok_and(|wanted| wanted.recv().is_ok());
    thread::scope(|scope| -> Result<()> {
        let churns: Vec<_> = Family::ALL
            .map(|family| Frontend::NodePort(world.node_a()).target(2, family))
            .map(|target| scope.spawn(move || connect_often(&lab.outside.ns, target, CONNECTIONS, permitted)))
            .into();
        let used = (0..2 * CONNECTIONS / BETWEEN).try_for_each(|_| {
            open.all_live()?;
            (0..BETWEEN).try_for_each(|_| permits.send(()).context("nobody connects any more"))
        });
        drop(permits);
        for churn in churns {
            let short = churn.join().expect("no panic")?;
            eprintln!("{} connections in {:?}", short.fine, short.took);
            ensure!(short.failures.is_empty(), "{:?}", short.failures);
            ensure!(used.is_err() || short.fine == CONNECTIONS, "{} connections", short.fine);
        }
        used
    })?;
    open.all_live()
}

/// The value of a sample.
fn sample(page: &str, name: &str) -> Result<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.with_context(|| format!("no {name} among\n{page}"))?.trim().parse()?)
}

/// What short connections, one after the other, from several threads of one machine came to.
struct Short {
    fine: u32,
    failures: Vec<String>,
    took: Duration,
}

/// Connects so many times, asks and closes; before each time waits for `go_on`.
fn connect_often(
    ns: &Netns,
    target: SocketAddr,
    count: u32,
    go_on: impl Fn() -> bool + Sync,
) -> Result<Short> {
    const THREADS: u32 = 4;
    let (fine, begin) = (AtomicU32::new(0), Instant::now());
    let failures = ns.run(|| {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut failures = Vec::new();
                        for _ in 0..count / THREADS {
                            if !go_on() {
                                break;
                            }
                            match connect_once(target) {
                                Ok(()) => drop(fine.fetch_add(1, Ordering::Relaxed)),
                                Err(err) => failures.push(format!("after {:?}: {err:#}", begin.elapsed())),
                            }
                        }
                        failures
                    })
                })
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("no panic")).collect()
        })
    })?;
    Ok(Short { fine: fine.into_inner(), failures, took: begin.elapsed() })
}

fn connect_once(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10)).context("connect")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"who\n").context("send")?;
    let mut answer = [0; 256];
    let from = stream.local_addr()?;
    let read = stream.read(&mut answer).with_context(|| format!("{from}: receive"))?;
    ensure!(read > 0, "{from}: closed without an answer");
    Ok(())
}

/// Rule 5: ports come back, on the client's side and on ours, and each time it is a new connection.
#[test]
fn thirty_thousand_short_connections_to_one_node_port() -> Result<()> {
    const CONNECTIONS: u32 = 30_000;
    let world = World::with_services(options(), |world| vec![balanced(1, [&world.a1])])?;
    let outside = &world.lab().outside;
    // Fewer ports than connections: each is used again while the other end, and the flow, remember it.
    outside.ns.sysctl(&[("ipv4/ip_local_port_range", "20000 29999"), ("ipv4/tcp_tw_reuse", "1")])?;
    let share = [(world.node_a(), CONNECTIONS), (world.node_b(), CONNECTIONS)];
    for (node, count) in share {
        let target = Frontend::NodePort(node).target(1, Family::V4);
        let short = connect_often(&outside.ns, target, count, || true)?;
        eprintln!("{target}: {} in {:?}", short.fine, short.took);
        ensure!(short.failures.is_empty() && short.fine == count, "{target}: {:?}", short.failures);
    }
    Ok(())
}
