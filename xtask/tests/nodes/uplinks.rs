//! A second uplink is served as the first one is, whatever it is made of, and answers leave by it.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask::lab::netns::Netns;
use xtask::lab::{Call, Family, Protocol, Xdp, eventually};
use xtask::process;

use crate::devices::{SERVERS, edges, here_and_there, node_a_serves};
use crate::sharing::link;
use crate::world::{SOON, node_port, until};

/// What an uplink is made of; below it is a pair of `eth1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Made {
    Plain,
    /// VLAN 7 of `eth1`, at both ends.
    Vlan,
    /// A bond whose only port is `eth1`, at the node's end.
    Bond,
}

impl Made {
    /// The device with addresses, at the node's end and at the far one.
    const fn devices(self) -> [&'static str; 2] {
        match self {
            Self::Plain => ["eth1"; 2],
            Self::Vlan => ["eth1.7"; 2],
            Self::Bond => ["bond1", "eth1"],
        }
    }

    /// Makes it of `eth1`, which is down.
    fn make(self, node: &Netns, far: &Netns) -> Result<()> {
        const VLAN: &str = "link add link eth1 name eth1.7 type vlan id 7\nlink set eth1 up\n";
        match self {
            Self::Plain => Ok(()),
            Self::Vlan => [node, far].into_iter().try_for_each(|ns| ns.ip(VLAN)),
            Self::Bond => node.ip("link add bond1 type bond mode active-backup miimon 100\n\
                 link set eth1 master bond1\n"),
        }
    }

    /// Whether there are such devices. Some kernels are built without; those of `cargo xtask kernels` have them.
    fn is_possible(self, ns: &Netns) -> bool {
        let probe = match self {
            Self::Plain => return true,
            Self::Vlan => "link add link eth0 name probe type vlan id 4000\n",
            Self::Bond => "link add probe type bond\n",
        };
        let made = ns.ip(probe);
        if let Err(error) = &made {
            eprintln!("not on this kernel, which has no {self:?} devices: {error:#}");
        }
        made.and_then(|()| ns.ip("link del probe\n")).is_ok()
    }
}

fn a_second_uplink(made: Made, xdp: Xdp) -> Result<()> {
    let world = here_and_there(xdp)?;
    let (node, far) = (world.node_a(), &world.lab().far);
    if !made.is_possible(&node.ns) {
        return Ok(());
    }
    node.ns.ip(&format!("link add eth1 type veth peer name eth1 netns {}\n", far.ns.name()))?;
    made.make(&node.ns, &far.ns)?;
    let [here, there] = made.devices();
    for (ns, device, host) in [(&node.ns, here, 1), (&far.ns, there, 100)] {
        ns.ip(&format!(
            "link set eth1 up\n\
             addr add 198.18.0.{host}/24 dev {device}\n\
             addr add 2001:db8:18::{host}/64 dev {device} nodad\n\
             link set {device} up\n"
        ))?;
        for device in ["eth1", device] {
            // Checksums are complete on a wire.
            let mut tx_off = Command::new("ethtool");
            tx_off.args(["-K", device, "tx", "off"]);
            ns.run(|| process::output(&mut tx_off))??;
        }
    }
    let sent = || link(&node.ns, here)?["stats64"]["tx"]["packets"].as_u64().context("no count");
    let mut open = Vec::new();
    for addr in ["198.18.0.1", "2001:db8:18::1"] {
        for (number, server) in SERVERS {
            for protocol in Protocol::ALL {
                let target = (addr.parse::<std::net::IpAddr>()?, node_port(number)).into();
                let call = Call::new(protocol, target);
                until(far, &call, |outcome| outcome.server() == Some(server))?;
                let before = sent()?;
                let moved = far.transfer(call.clone(), 200_000)?;
                ensure!(moved.server == server, "{moved:?}");
                let after = sent()?;
                ensure!(after > before + 10, "answers to {target} left elsewhere: {before}, {after}");
                open.push((far.open(call)?, target));
            }
        }
    }
    // The first one serves as before, and goes on when the second one leaves.
    node_a_serves(&world, &Family::ALL)?;
    for ((call, first), target) in &open {
        ensure!(call.again()? == *first, "{target}");
    }
    drop(open);
    node.ns.ip(&format!("link del {here}\n"))?;
    node_a_serves(&world, &Family::ALL)?;
    let agent = world.cluster.agent(node)?;
    eventually(SOON, || {
        let left = edges(&agent)?;
        ensure!(left.len() == 1, "{left:?}");
        Ok(())
    })
}

#[test]
fn a_second_uplink_is_served_by_xdp() -> Result<()> {
    a_second_uplink(Made::Plain, Xdp::Native)
}

#[test]
fn a_second_uplink_is_served_by_tc() -> Result<()> {
    a_second_uplink(Made::Plain, Xdp::Off)
}

#[test]
fn a_vlan_is_served_by_what_xdp_leaves() -> Result<()> {
    a_second_uplink(Made::Vlan, Xdp::Native)
}

#[test]
fn a_vlan_is_served_by_tc() -> Result<()> {
    a_second_uplink(Made::Vlan, Xdp::Off)
}

#[test]
fn a_bond_is_served_by_xdp_where_bonds_run_it() -> Result<()> {
    a_second_uplink(Made::Bond, Xdp::Native)
}

#[test]
fn a_bond_is_served_by_tc() -> Result<()> {
    a_second_uplink(Made::Bond, Xdp::Off)
}
