//! Host ports of a Pod of this node: for each a frontend of its own, with the Pod as its only backend, for everybody.

use std::collections::btree_map::Entry;
use std::net::{IpAddr, SocketAddr};

use super::Output;
use crate::entries::{
    Algorithm, Backend, Compiled, Family, Frontend, FrontendKey, FrontendKind, Target, WhenEmpty,
};
use crate::finding::Finding;
use crate::model::{HostPort, Pod};

/// What the host ports of `pod` mean on its node, and what is wrong with them.
pub fn compile_pod(pod: &Pod) -> (Compiled, Vec<Finding>) {
    let mut out = Output { findings: pod.findings.clone(), ..Output::default() };
    for port in &pod.ports {
        out.add_host_port(pod, port);
    }
    (out.compiled, out.findings)
}

impl Output {
    fn add_host_port(&mut self, pod: &Pod, port: &HostPort) {
        let mut served = false;
        for family in [Family::V4, Family::V6] {
            let asked = port.host_ip.unwrap_or(family.unspecified());
            let own = pod.addrs.iter().find(|addr| Family::of(**addr) == family);
            let Some(own) = own.filter(|_| Family::of(asked) == family) else { continue };
            served = true;
            let key = FrontendKey { addr: asked, port: port.host_port, protocol: port.protocol };
            match self.compiled.frontends.entry(key) {
                Entry::Vacant(entry) => drop(entry.insert(frontend(*own, port))),
                Entry::Occupied(_) => self.findings.push(Finding::Duplicate { key }),
            }
        }
        if let (false, Some(addr)) = (served, port.host_ip) {
            self.findings.push(Finding::NoPodAddress { port: port.label(), addr });
        }
    }
}

fn frontend(pod: IpAddr, port: &HostPort) -> Frontend {
    let addr = SocketAddr::new(pod, port.container_port);
    let backend = Backend { addr, protocol: port.protocol, local: true };
    let target = Target { backends: [backend].into(), when_empty: WhenEmpty::Reject };
    Frontend {
        kind: FrontendKind::HostPort,
        // Of one there is nothing to choose.
        algorithm: Algorithm::Random,
        restricted: false,
        source_kept: true,
        dsr: false,
        port: port.host_port,
        affinity: 0,
        internal: target.clone(),
        external: target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entries::Protocol;
    use crate::owner::PodName;

    fn pod(addrs: &[&str], ports: Vec<HostPort>) -> Pod {
        let name = PodName { namespace: "ns".into(), name: "pod".into() };
        let addrs = addrs.iter().map(|addr| addr.parse().unwrap()).collect();
        Pod { addrs, ports, ..Pod::named(name) }
    }

    fn port(host_ip: &str, host_port: u16, container_port: u16, protocol: Protocol) -> HostPort {
        HostPort { name: String::new(), host_port, host_ip: host_ip.parse().ok(), container_port, protocol }
    }

    fn show(pod: &Pod) -> (Vec<String>, Vec<String>) {
        let (compiled, findings) = compile_pod(pod);
        let frontends = compiled.frontends.iter().map(|(key, frontend)| {
            assert_eq!((frontend.kind, &frontend.external), (FrontendKind::HostPort, &frontend.internal));
            let [backend] = frontend.internal.backends[..] else { panic!("{frontend:?}") };
            assert!(backend.local && backend.protocol == key.protocol);
            format!("{key} -> {}", backend.addr)
        });
        (frontends.collect(), findings.iter().map(ToString::to_string).collect())
    }

    const BOTH: [&str; 2] = ["10.0.0.1", "fd00::1"];

    #[test]
    fn a_host_ip_decides_the_addresses() {
        let ports = |host_ip| vec![port(host_ip, 80, 8080, Protocol::Tcp)];
        let v4 = "any IPv4 node address:80/TCP -> 10.0.0.1:8080";
        let v6 = "any IPv6 node address:80/TCP -> [fd00::1]:8080";
        for (host_ip, expected) in [
            ("", &[v4, v6][..]),
            ("0.0.0.0", &[v4]),
            ("::", &[v6]),
            ("192.0.2.2", &["192.0.2.2:80/TCP -> 10.0.0.1:8080"]),
            ("127.0.0.1", &["127.0.0.1:80/TCP -> 10.0.0.1:8080"]),
            ("2001:db8::2", &["[2001:db8::2]:80/TCP -> [fd00::1]:8080"]),
        ] {
            let (frontends, findings) = show(&pod(&BOTH, ports(host_ip)));
            assert_eq!((frontends, findings.len()), (expected.iter().map(|s| (*s).into()).collect(), 0));
        }
        assert_eq!(show(&pod(&["10.0.0.1"], ports(""))), (vec![v4.to_owned()], vec![]));
        let text = "port 80: hostIP :: is of a family in which the Pod has no address; it is left out";
        assert_eq!(show(&pod(&["10.0.0.1"], ports("::"))), (vec![], vec![text.to_owned()]));
    }

    /// Rule 147.
    #[test]
    fn one_host_port_by_address_and_protocol() {
        let ports = vec![
            port("127.0.0.1", 54321, 8080, Protocol::Tcp),
            port("192.0.2.2", 54321, 8081, Protocol::Tcp),
            port("192.0.2.2", 54321, 8082, Protocol::Udp),
            port("", 54321, 8083, Protocol::Tcp),
        ];
        let (frontends, findings) = show(&pod(&["10.0.0.1"], ports));
        let expected = [
            "any IPv4 node address:54321/TCP -> 10.0.0.1:8083",
            "127.0.0.1:54321/TCP -> 10.0.0.1:8080",
            "192.0.2.2:54321/TCP -> 10.0.0.1:8081",
            "192.0.2.2:54321/UDP -> 10.0.0.1:8082",
        ];
        assert_eq!((frontends, findings), (expected.map(Into::into).to_vec(), vec![]));
    }

    #[test]
    fn a_host_port_that_appears_twice_is_named() {
        let ports = vec![port("", 80, 8080, Protocol::Tcp), port("", 80, 8081, Protocol::Tcp)];
        let (frontends, findings) = show(&pod(&["10.0.0.1"], ports));
        assert_eq!(frontends, ["any IPv4 node address:80/TCP -> 10.0.0.1:8080"]);
        assert_eq!(findings, ["any IPv4 node address:80/TCP appears twice; the first is used"]);
    }
}
