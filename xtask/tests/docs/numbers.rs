//! The numbers of fields on docs/bpftool.md are those of the code.

use std::fs;

use anyhow::{Result, ensure};
use lb_common::abi::{
    Carry, Side, address_flags, backend_flags, backend_state, flow_flags, frontend_kind, service_flags,
};
use lb_common::reason::Hook;
use xtask::host;

/// `1 this, 2 that`.
fn listed<'a>(values: impl IntoIterator<Item = (u32, &'a str)>) -> String {
    values.into_iter().map(|(value, name)| format!("{value} {name}")).collect::<Vec<_>>().join(", ")
}

#[test]
fn every_field_has_its_row() -> Result<()> {
    let page = fs::read_to_string(host::workspace().join("docs/bpftool.md"))?;
    let sides = [
        (Side::NicIn, "from outside"),
        (Side::NicOut, "to outside"),
        (Side::PodIn, "from a pod"),
        (Side::PodOut, "to a pod"),
    ];
    let carries = [
        (Carry::Stack, "to the stack"),
        (Carry::Forward, "sent on"),
        (Carry::Bounce, "turned around"),
        (Carry::Tunnel, "tunnelled"),
    ];
    let rows = [
        (
            "`kind` in `SERVICES`",
            listed([
                (frontend_kind::CLUSTER_IP.into(), "ClusterIP"),
                (frontend_kind::NODE_PORT.into(), "NodePort"),
                (frontend_kind::LOAD_BALANCER.into(), "LoadBalancer"),
                (frontend_kind::EXTERNAL_IP.into(), "ExternalIP"),
                (frontend_kind::HOST_PORT.into(), "HostPort"),
            ]),
        ),
        (
            "`flags` in `SERVICES`",
            listed([
                (service_flags::MAGLEV.into(), "Maglev"),
                (service_flags::INTERNAL_DROP.into(), "without an internal backend: drop"),
                (service_flags::EXTERNAL_DROP.into(), "without an external one: drop"),
                (service_flags::SOURCE_RANGES.into(), "source ranges"),
                (service_flags::NODE_ALLOWED.into(), "this node is in them"),
                (service_flags::SOURCE_KEPT.into(), "source kept"),
                (service_flags::DSR.into(), "direct server return"),
            ]),
        ),
        (
            "`state` in `BACKENDS`",
            listed([
                (backend_state::UNUSED.into(), "free"),
                (backend_state::ACTIVE.into(), "active"),
                (backend_state::TERMINATING.into(), "terminating"),
            ]),
        ),
        ("`flags` in `BACKENDS`", listed([(backend_flags::LOCAL.into(), "on this node")])),
        (
            "`flags` in `ADDRESSES`",
            listed([
                (address_flags::NODE, "this node's"),
                (address_flags::NODE_PORT, "NodePorts answer"),
                (address_flags::SERVICE, "a Service's"),
                (address_flags::LOOPBACK, "loopback"),
                (address_flags::HOST_PORT, "host ports answer"),
                (address_flags::FRONTEND, "a load balancer's or external"),
                (address_flags::BACKEND_TCP, "a TCP backend's"),
                (address_flags::BACKEND_UDP, "UDP"),
                (address_flags::BACKEND_SCTP, "SCTP"),
                (address_flags::PEER, "another node's"),
            ]),
        ),
        ("`side` in `FLOWS`", listed(sides.map(|(side, name)| (side as u32, name)))),
        (
            "`flags` in `FLOWS`",
            listed([
                (flow_flags::REPLY.into(), "reply"),
                (flow_flags::FIN.into(), "FIN seen"),
                (flow_flags::PEER_FIN.into(), "FIN seen of the other direction"),
                (flow_flags::RST.into(), "RST"),
                (flow_flags::ANSWERED.into(), "answered"),
                (flow_flags::CROSS.into(), "sides of both classes"),
            ]),
        ),
        ("`carry` in `FLOWS`", listed(carries.map(|(carry, name)| (carry as u32, name)))),
        ("hook in `COUNTERS`", listed(Hook::ALL.map(|hook| (hook as u32, hook.name())))),
    ];
    for (field, values) in rows {
        let row = format!("| {field} | {values} |\n");
        ensure!(page.contains(&row), "docs/bpftool.md has no row {row}");
    }
    Ok(())
}
