//! Datagrams beyond the MTU, in both directions, on every way from a client to a backend where packets are translated.
use anyhow::{Result, ensure};
use xtask::lab::{AgentOptions, Call, Caller, Family, Xdp};

use crate::world::{Findings, PORT, World, at_vip, node_port, options, service};

/// Bytes of a datagram: three fragments, and six.
const SIZES: [usize; 2] = [3000, 8000];
/// Datagrams on each way.
const COUNT: u64 = 20;

#[test]
fn long_datagrams_come_through_xdp_and_tcx() -> Result<()> {
    every_way(AgentOptions { xdp: Xdp::Native, ..options() })
}

#[test]
fn long_datagrams_come_through_tcx() -> Result<()> {
    every_way(AgentOptions { xdp: Xdp::Off, ..options() })
}

#[test]
fn long_datagrams_come_through_clsact() -> Result<()> {
    every_way(AgentOptions { xdp: Xdp::Off, clsact: true, ..options() })
}

fn every_way(options: AgentOptions) -> Result<()> {
    let world =
        World::with_services(options, |world| vec![service(1, [&world.a1]), service(2, [&world.b1])])?;
    let mut findings = Findings::default();
    let lab = world.lab();
    for family in Family::ALL {
        for (number, backend) in [(1, "a1"), (2, "b1")] {
            // To a backend of the node that is called, and to one of another; by way of routed and bridged pods.
            let node_ports = lab.nodes().map(|node| node.at(family, node_port(number)));
            let outside: [&Caller; 2] = [&lab.outside, &lab.far];
            let pods: [&Caller; 2] = [&world.a2, &world.b2];
            let from_outside =
                outside.into_iter().flat_map(|caller| node_ports.map(|target| (caller, target)));
            let from_pods = pods.into_iter().map(|caller| (caller, at_vip(number, family, PORT)));
            for (caller, target) in from_outside.chain(from_pods) {
                for size in SIZES {
                    if findings.enough() {
                        break;
                    }
                    let what = format!("{} -> {target}, backend {backend}, {size} bytes", caller.name());
                    findings.take(transfer(caller, Call::udp(target).datagram(size), backend), || what);
                }
            }
        }
    }
    findings.report();
    Ok(())
}

fn transfer(caller: &Caller, call: Call, backend: &str) -> Result<()> {
    let size = u64::try_from(call.datagram)?;
    let transfer = caller.transfer(call, COUNT * size)?;
    ensure!(transfer.server == backend, "it went to {}", transfer.server);
    Ok(())
}
