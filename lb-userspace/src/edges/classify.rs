//! Which devices are edges: a pure function of what netlink says and what the flags ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::datapath::Observed;

/// Default of `--pod-device`.
pub const DEFAULT_POD_DEVICES: [&str; 7] = ["veth*", "cali*", "lxc*", "eni*", "azv*", "gke*", "nic*"];
/// Bridges whose ports are pods, whatever the ports' names.
const POD_BRIDGES: [&str; 2] = ["cni0", "cbr0"];
/// Bridges that containers or virtual machines hang on: their node address is the gateway of those.
const GUEST_BRIDGES: [&str; 4] = ["docker*", "virbr*", "lxcbr*", "lxdbr*"];

/// A network device of the node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts that netlink states one by one")]
pub struct Device {
    pub ifindex: u32,
    pub name: String,
    /// `veth`, `bridge`, `vxlan`, …; empty for hardware.
    pub kind: String,
    pub up: bool,
    pub loopback: bool,
    /// It carries Ethernet frames.
    pub ethernet: bool,
    /// Interface index of the bridge or bond it is a port of.
    pub master: Option<u32>,
    /// VLAN devices stand on it.
    pub vlans: bool,
    /// Its Ethernet address.
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<Address>,
    /// What is on its XDP hook.
    pub xdp: Option<Observed>,
}

/// An address of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts that netlink states one by one")]
pub struct Address {
    pub addr: IpAddr,
    pub prefix_len: u8,
    /// Scope `global`: other nodes can reach it.
    pub global: bool,
    /// The kernel does not choose it as a source by itself (IPv4 secondary, IPv6 temporary).
    pub secondary: bool,
    /// IPv6: on its way out, or not checked for duplicates yet.
    pub unsettled: bool,
    /// Does not run out.
    pub permanent: bool,
}

/// `--device`, `--pod-device`, and what `--detect-local-mode` says of devices.
#[derive(Clone, Debug)]
pub struct Rules {
    devices: GlobSet,
    pod_devices: GlobSet,
    guest_bridges: GlobSet,
    /// Pods are on the ports of this bridge, too.
    pod_bridge: Option<String>,
    /// Pods hang on devices whose names begin so, too.
    pod_prefix: Option<String>,
}

impl Rules {
    /// `devices`: `--device`, empty if not given; `pod_devices`: `--pod-device`, empty for its default.
    pub fn new(devices: &[String], pod_devices: &[String]) -> Result<Self, globset::Error> {
        let pod_devices = if pod_devices.is_empty() {
            globs(DEFAULT_POD_DEVICES)?
        } else {
            globs(pod_devices.iter().map(String::as_str))?
        };
        Ok(Self {
            devices: globs(devices.iter().map(String::as_str))?,
            pod_devices,
            guest_bridges: globs(GUEST_BRIDGES.into_iter().chain(POD_BRIDGES))?,
            pod_bridge: None,
            pod_prefix: None,
        })
    }

    /// Pods are on the ports of this bridge, too.
    #[must_use]
    pub fn with_pod_bridge(self, name: String) -> Self {
        Self { pod_bridge: Some(name), ..self }
    }

    /// Pods hang on devices whose names begin so, too.
    #[must_use]
    pub fn with_pod_prefix(self, prefix: String) -> Self {
        Self { pod_prefix: Some(prefix), ..self }
    }

    fn is_pod_bridge(&self, name: &str) -> bool {
        POD_BRIDGES.contains(&name) || self.pod_bridge.as_deref() == Some(name)
    }
}

fn globs<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<GlobSet, globset::Error> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern)?);
    }
    set.build()
}

/// What a device is to the datapath.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Clients outside of the node are behind it. The addresses are the sources of what is sent on
    /// through it; unspecified: none of that family.
    External { addr4: Ipv4Addr, addr6: Ipv6Addr },
    /// A pod is behind it.
    Pod,
    /// No edge.
    None(Why),
}

/// Why a device is no edge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    Loopback,
    NotListed,
    NoGlobalAddress,
    Down,
    NotEthernet,
    PodBridge,
    GuestBridge,
    Dummy,
    BondPort,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::NotListed => "not in --device",
            Self::NoGlobalAddress => "it has no global address",
            Self::Down => "it is down",
            Self::NotEthernet => "it does not carry Ethernet frames",
            Self::PodBridge => "pods are on its ports",
            Self::GuestBridge => "it is the bridge of containers or virtual machines",
            Self::Dummy => "a dummy receives nothing",
            Self::BondPort => "it is a port of a bond, which is the edge in its place",
        })
    }
}

/// The role of every device, by interface index.
pub fn classify(devices: &[Device], rules: &Rules) -> BTreeMap<u32, Role> {
    let pods: BTreeSet<u32> =
        devices.iter().filter(|device| is_pod(device, devices, rules)).map(|device| device.ifindex).collect();
    let pod_bridges: BTreeSet<u32> = devices
        .iter()
        .filter(|device| pods.contains(&device.ifindex))
        .filter_map(|device| device.master)
        .collect();
    devices.iter().map(|device| (device.ifindex, role(device, devices, rules, &pods, &pod_bridges))).collect()
}

/// `--device` wins: a node's uplink may be a veth, in kind or in a lab.
fn is_pod(device: &Device, devices: &[Device], rules: &Rules) -> bool {
    if rules.devices.is_match(&device.name) || device.loopback {
        return false;
    }
    let on_pod_bridge = device.master.is_some_and(|master| {
        devices.iter().any(|bridge| bridge.ifindex == master && rules.is_pod_bridge(&bridge.name))
    });
    let has_prefix = rules.pod_prefix.as_ref().is_some_and(|prefix| device.name.starts_with(prefix));
    on_pod_bridge || has_prefix || rules.pod_devices.is_match(&device.name)
}

fn role(
    device: &Device,
    devices: &[Device],
    rules: &Rules,
    pods: &BTreeSet<u32>,
    pod_bridges: &BTreeSet<u32>,
) -> Role {
    if device.loopback {
        return Role::None(Why::Loopback);
    }
    let pod = pods.contains(&device.ifindex);
    if !pod
        && !rules.devices.is_match(&device.name)
        && let Some(why) = not_external(device, rules, pod_bridges)
    {
        return Role::None(why);
    }
    if !device.ethernet {
        return Role::None(Why::NotEthernet);
    }
    if is_bond_port(device, devices) {
        return Role::None(Why::BondPort);
    }
    if !device.up {
        return Role::None(Why::Down);
    }
    if pod {
        return Role::Pod;
    }
    let (addr4, addr6) = sources(device, devices);
    Role::External { addr4, addr6 }
}

/// What a port of a bond receives is the bond's, and is seen there; the kernel runs the bond's XDP program in the
/// drivers of its ports (5.15).
fn is_bond_port(device: &Device, devices: &[Device]) -> bool {
    let is_bond = |other: &Device| ["bond", "team"].contains(&other.kind.as_str());
    device.master.is_some_and(|master| devices.iter().any(|it| it.ifindex == master && is_bond(it)))
}

/// The devices that routes to pods name, and the source addresses of what is sent on through each: the pod's own, or the
/// bridge it is a port of. One with a pod behind it whose answers nobody sees (`unserved`) is left out.
pub(super) fn ways_to_pods(
    devices: &[Device],
    roles: &BTreeMap<u32, Role>,
    unserved: &BTreeSet<u32>,
) -> BTreeMap<u32, (Ipv4Addr, Ipv6Addr)> {
    let by_index: BTreeMap<u32, &Device> = devices.iter().map(|device| (device.ifindex, device)).collect();
    let way = |device: &Device| {
        let master = device.master.and_then(|master| by_index.get(&master));
        master.filter(|master| master.kind == "bridge").map_or(device.ifindex, |bridge| bridge.ifindex)
    };
    let pods = devices.iter().filter(|device| roles.get(&device.ifindex) == Some(&Role::Pod));
    let mut ways: BTreeSet<u32> = pods.clone().map(way).collect();
    for pod in pods.filter(|pod| unserved.contains(&pod.ifindex)) {
        ways.remove(&way(pod));
    }
    ways.retain(|ifindex| !matches!(roles.get(ifindex), Some(Role::External { .. })));
    ways.into_iter().filter_map(|i| Some((i, sources(by_index.get(&i)?, devices)))).collect()
}

/// The source addresses of what is sent on through a device; unspecified: the node has none of that family.
fn sources(device: &Device, devices: &[Device]) -> (Ipv4Addr, Ipv6Addr) {
    (
        source(device, devices, addr4).unwrap_or(Ipv4Addr::UNSPECIFIED),
        source(device, devices, addr6).unwrap_or(Ipv6Addr::UNSPECIFIED),
    )
}

/// What speaks against a device that `--device` does not name.
fn not_external(device: &Device, rules: &Rules, pod_bridges: &BTreeSet<u32>) -> Option<Why> {
    let is_bridge = device.kind == "bridge";
    if !rules.devices.is_empty() {
        Some(Why::NotListed)
    } else if is_bridge && pod_bridges.contains(&device.ifindex) {
        Some(Why::PodBridge)
    } else if is_bridge && rules.guest_bridges.is_match(&device.name) {
        Some(Why::GuestBridge)
    } else if device.kind == "dummy" {
        Some(Why::Dummy)
    } else if !device.addresses.iter().any(|address| address.global) {
        Some(Why::NoGlobalAddress)
    } else {
        None
    }
}

/// The source address that masquerading would choose: the device's own, else the first global one of the
/// node, as `inet_select_addr` does (unnumbered uplinks have theirs on the loopback device).
fn source<A>(device: &Device, devices: &[Device], family: impl Fn(IpAddr) -> Option<A>) -> Option<A> {
    let primary = |device: &Device| {
        device
            .addresses
            .iter()
            .filter(|address| address.global)
            .filter_map(|address| Some((preference(address), family(address.addr)?)))
            // The first of the best: the kernel lists addresses in the order it prefers them.
            .min_by_key(|(preference, _)| *preference)
            .map(|(_, addr)| addr)
    };
    primary(device).or_else(|| {
        let mut others: Vec<&Device> = devices.iter().collect();
        others.sort_by_key(|other| other.ifindex);
        others.into_iter().find_map(primary)
    })
}

/// Less is better.
fn preference(address: &Address) -> (bool, bool, bool, bool) {
    // A host address among others is most often a virtual address that moves between nodes.
    let host = address.addr.is_ipv6() && address.prefix_len == 128;
    (address.unsettled, address.secondary, host, !address.permanent)
}

fn addr4(addr: IpAddr) -> Option<Ipv4Addr> {
    match addr {
        IpAddr::V4(addr) => Some(addr),
        IpAddr::V6(_) => None,
    }
}

fn addr6(addr: IpAddr) -> Option<Ipv6Addr> {
    match addr {
        IpAddr::V4(_) => None,
        IpAddr::V6(addr) => Some(addr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(ifindex: u32, name: &str, kind: &str, addresses: &[&str]) -> Device {
        Device {
            ifindex,
            name: name.into(),
            kind: kind.into(),
            up: true,
            loopback: name == "lo",
            ethernet: true,
            master: None,
            vlans: false,
            mac: None,
            addresses: addresses.iter().map(|text| address(text)).collect(),
            xdp: None,
        }
    }

    fn address(text: &str) -> Address {
        let (addr, prefix_len) = text.split_once('/').unwrap();
        let addr: IpAddr = addr.parse().unwrap();
        let global = match addr {
            IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
            IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
        };
        Address {
            addr,
            prefix_len: prefix_len.parse().unwrap(),
            global,
            secondary: false,
            unsettled: false,
            permanent: true,
        }
    }

    fn rules(devices: &[&str], pod_devices: &[&str]) -> Rules {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        Rules::new(&owned(devices), &owned(pod_devices)).unwrap()
    }

    /// Roles as text, in the order of the devices.
    fn roles(devices: &[Device], rules: &Rules) -> Vec<String> {
        let by_index = classify(devices, rules);
        devices
            .iter()
            .map(|device| match by_index[&device.ifindex] {
                Role::External { addr4, addr6 } => format!("{}: external {addr4} {addr6}", device.name),
                Role::Pod => format!("{}: pod", device.name),
                Role::None(why) => format!("{}: {why}", device.name),
            })
            .collect()
    }

    #[test]
    fn kube_proxy_names_bridges_and_prefixes_of_pods() {
        let mut port = device(3, "tap7", "tun", &[]);
        port.master = Some(2);
        let devices = [device(2, "pods", "bridge", &["10.1.0.1/24"]), port, device(4, "tapir", "tun", &[])];
        let rules = || rules(&[], &[]);
        assert!(!roles(&devices, &rules()).iter().any(|role| role.ends_with(": pod")));
        let bridge = roles(&devices, &rules().with_pod_bridge("pods".into()));
        assert_eq!(bridge[..2], ["pods: pods are on its ports", "tap7: pod"]);
        assert_ne!(bridge[2], "tapir: pod");
        let prefix = roles(&devices, &rules().with_pod_prefix("tap".into()));
        assert_eq!(prefix[1..], ["tap7: pod", "tapir: pod"]);
    }

    #[test]
    fn a_bridge_node() {
        let mut port = device(4, "veth0a1b", "veth", &["fe80::1/64"]);
        port.master = Some(3);
        let mut oddly_named = device(6, "tap7", "tun", &[]);
        oddly_named.master = Some(3);
        let devices = [
            device(1, "lo", "", &["127.0.0.1/8", "::1/128"]),
            device(2, "eth0", "", &["192.0.2.7/24", "2001:db8::7/64", "fe80::2/64"]),
            device(3, "cni0", "bridge", &["10.1.0.1/24"]),
            port,
            device(5, "docker0", "bridge", &["172.17.0.1/16"]),
            oddly_named,
            device(7, "eth1", "", &["fe80::3/64"]),
            device(8, "flannel.1", "vxlan", &["10.1.0.0/32"]),
        ];
        assert_eq!(
            roles(&devices, &rules(&[], &[])),
            [
                "lo: loopback",
                "eth0: external 192.0.2.7 2001:db8::7",
                "cni0: pods are on its ports",
                "veth0a1b: pod",
                "docker0: it is the bridge of containers or virtual machines",
                "tap7: pod",
                "eth1: it has no global address",
                // It has no IPv6 address: the node's first one, as masquerading would choose.
                "flannel.1: external 10.1.0.0 2001:db8::7",
            ]
        );
    }

    #[test]
    fn a_routed_node() {
        let mut down = device(4, "calidown", "veth", &[]);
        down.up = false;
        let mut tunnel = device(5, "wg0", "wireguard", &["10.9.0.1/24"]);
        tunnel.ethernet = false;
        let devices = [
            device(2, "bond0", "bond", &["192.0.2.7/24"]),
            // Routed pods: the gateway's address on the host's end does not make it an uplink.
            device(3, "cali1234", "veth", &["169.254.1.1/32", "10.0.0.1/32"]),
            down,
            tunnel,
            device(6, "nodelocaldns", "dummy", &["10.96.0.10/32"]),
            device(7, "br-ex", "bridge", &["198.51.100.7/24"]),
        ];
        assert_eq!(
            roles(&devices, &rules(&[], &[])),
            [
                "bond0: external 192.0.2.7 ::",
                "cali1234: pod",
                "calidown: it is down",
                "wg0: it does not carry Ethernet frames",
                "nodelocaldns: a dummy receives nothing",
                "br-ex: external 198.51.100.7 ::",
            ]
        );
    }

    #[test]
    fn a_listed_device_wins_over_the_pod_globs() {
        let devices = [
            device(2, "veth-up", "veth", &["192.0.2.7/24"]),
            device(3, "veth-pod", "veth", &[]),
            device(4, "eth9", "", &["198.51.100.1/24"]),
        ];
        assert_eq!(
            roles(&devices, &rules(&["veth-up"], &[])),
            ["veth-up: external 192.0.2.7 ::", "veth-pod: pod", "eth9: not in --device"]
        );
        assert_eq!(
            roles(&devices, &rules(&["veth-u*", "eth9"], &["nothing"])),
            ["veth-up: external 192.0.2.7 ::", "veth-pod: not in --device", "eth9: external 198.51.100.1 ::"]
        );
    }

    #[test]
    fn a_listed_uplink_on_a_bridge_of_pods_is_still_external() {
        let mut port = device(3, "veth1", "veth", &[]);
        port.master = Some(2);
        let mut uplink = device(4, "veth-up", "veth", &[]);
        uplink.master = Some(2);
        let devices = [device(2, "cni0", "bridge", &["10.1.0.1/24"]), port, uplink];
        assert_eq!(
            roles(&devices, &rules(&["veth-up"], &[])),
            ["cni0: not in --device", "veth1: pod", "veth-up: external 10.1.0.1 ::"]
        );
    }

    #[test]
    fn a_bond_and_the_devices_on_it_are_edges_and_its_ports_are_not() {
        let port = |ifindex, name| Device { master: Some(4), ..device(ifindex, name, "", &[]) };
        let devices = [
            port(2, "eth0"),
            port(3, "eth1"),
            device(4, "bond0", "bond", &["192.0.2.7/24"]),
            device(5, "bond0.7", "vlan", &["198.51.100.7/24"]),
            device(6, "mac0", "macvlan", &["203.0.113.7/24"]),
        ];
        let others = [
            "bond0: external 192.0.2.7 ::",
            "bond0.7: external 198.51.100.7 ::",
            "mac0: external 203.0.113.7 ::",
        ];
        let unlisted = roles(&devices, &rules(&[], &[]));
        assert_eq!(unlisted[..2], ["eth0: it has no global address", "eth1: it has no global address"]);
        assert_eq!(unlisted[2..], others);
        let listed = roles(&devices, &rules(&["eth*", "bond*", "mac*"], &[]));
        let why = "it is a port of a bond, which is the edge in its place";
        assert_eq!(listed[..2], [format!("eth0: {why}"), format!("eth1: {why}")]);
        assert_eq!(listed[2..], others);
    }

    #[test]
    fn an_uplink_in_a_bridge_leaves_its_addresses_to_the_bridge() {
        let port = Device { master: Some(3), ..device(2, "eth0", "", &[]) };
        let devices = [
            port,
            device(3, "br-ex", "bridge", &["192.0.2.7/24"]),
            device(4, "br-ex.7", "vlan", &["10.7.0.7/24"]),
        ];
        assert_eq!(
            roles(&devices, &rules(&[], &[])),
            [
                "eth0: it has no global address",
                "br-ex: external 192.0.2.7 ::",
                "br-ex.7: external 10.7.0.7 ::"
            ]
        );
    }

    #[test]
    fn a_bridge_of_guests_with_pods_on_it_is_found_by_its_ports() {
        let mut port = device(3, "veth1", "veth", &[]);
        port.master = Some(2);
        let devices = [device(2, "br-1a2b3c", "bridge", &["172.18.0.1/16"]), port];
        assert_eq!(roles(&devices, &rules(&[], &[])), ["br-1a2b3c: pods are on its ports", "veth1: pod"]);
    }

    #[test]
    fn ways_to_pods_are_their_devices_or_bridges() {
        let port =
            |ifindex, name, master| Device { master: Some(master), ..device(ifindex, name, "veth", &[]) };
        let devices = [
            device(1, "lo", "", &["127.0.0.1/8"]),
            device(2, "eth0", "", &["192.0.2.7/24", "2001:db8::7/64"]),
            device(3, "cni0", "bridge", &["10.1.0.1/24"]),
            port(4, "veth1", 3),
            port(5, "veth2", 3),
            device(6, "cali1", "veth", &[]),
            device(7, "red", "vrf", &[]),
            port(8, "cali2", 7),
            device(9, "br-9", "bridge", &["10.2.0.1/24"]),
            port(10, "veth3", 9),
        ];
        let ways = |unserved: &[u32], names: &[&str]| {
            let roles = classify(&devices, &rules(names, &[]));
            ways_to_pods(&devices, &roles, &unserved.iter().copied().collect())
                .into_iter()
                .map(|(ifindex, (addr4, addr6))| format!("{ifindex} {addr4} {addr6}"))
                .collect::<Vec<_>>()
        };
        let all = [
            "3 10.1.0.1 2001:db8::7",
            "6 192.0.2.7 2001:db8::7",
            "8 192.0.2.7 2001:db8::7",
            "9 10.2.0.1 2001:db8::7",
        ];
        assert_eq!(ways(&[], &[]), all);
        assert_eq!(ways(&[5, 6], &[]), all[2..]);
        // What is listed is an external edge, whatever hangs on it.
        assert_eq!(ways(&[], &["br-9"]), all[..3]);
    }

    #[test]
    fn the_source_address_is_the_settled_primary_one() {
        let with = |change: fn(&mut Address), text| {
            let mut address = address(text);
            change(&mut address);
            address
        };
        let mut eth0 = device(2, "eth0", "", &[]);
        eth0.addresses = vec![
            with(|a| a.secondary = true, "192.0.2.9/24"),
            address("192.0.2.7/24"),
            address("192.0.2.8/25"),
            with(|a| a.unsettled = true, "2001:db8::1/64"),
            with(|a| a.secondary = true, "2001:db8::2/64"),
            address("2001:db8::3/128"),
            with(|a| a.permanent = false, "2001:db8::4/64"),
            address("2001:db8::5/64"),
        ];
        assert_eq!(roles(&[eth0], &rules(&[], &[])), ["eth0: external 192.0.2.7 2001:db8::5"]);
    }

    #[test]
    fn an_unnumbered_uplink_uses_the_node_address_on_loopback() {
        let devices = [
            device(1, "lo", "", &["127.0.0.1/8", "192.0.2.7/32", "2001:db8::7/128"]),
            device(2, "eth0", "", &["fe80::1/64"]),
            device(3, "eth1", "", &["198.51.100.1/24"]),
        ];
        assert_eq!(
            roles(&devices, &rules(&["eth0"], &[])),
            ["lo: loopback", "eth0: external 192.0.2.7 2001:db8::7", "eth1: not in --device"]
        );
    }
}
