//! Rules of the shape that kube-proxy 1.36 writes, for Services at ClusterIPs and one NodePort: in the order and with the
//! chains that packets meet (pkg/proxy/iptables/proxier.go, pkg/proxy/nftables/proxier.go), without what stands there for
//! policies that no Service here has.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

/// A Service with one port and one endpoint, of one family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Service {
    pub cluster_ip: IpAddr,
    pub port: u16,
    pub node_port: Option<u16>,
    pub endpoint: SocketAddr,
}

/// Bits of the mark by which kube-proxy has packets masqueraded.
const MARK: &str = "0x4000";

/// For `iptables-restore`, or `ip6tables-restore`.
pub fn iptables(services: &[Service], cluster_cidr: &str) -> String {
    let mut chains = String::new();
    let mut jumps = String::new();
    let mut node_ports = String::new();
    let mut rules = String::new();
    for protocol in ["tcp", "udp"] {
        for (number, service) in services.iter().enumerate() {
            let Service { cluster_ip, port, node_port, endpoint } = service;
            let host = if cluster_ip.is_ipv4() { 32 } else { 128 };
            let id = format!("{}{number:015}", &protocol[..1].to_uppercase());
            let name = format!("\"default/service-{number}:{protocol}\"");
            // Writing to a String cannot fail.
            let _ = write!(chains, ":KUBE-SVC-{id} - [0:0]\n:KUBE-SEP-{id} - [0:0]\n");
            let _ = writeln!(
                jumps,
                "-A KUBE-SERVICES -d {cluster_ip}/{host} -p {protocol} -m comment --comment {name} \
                 -m {protocol} --dport {port} -j KUBE-SVC-{id}"
            );
            if let Some(node_port) = node_port {
                let _ = writeln!(chains, ":KUBE-EXT-{id} - [0:0]");
                let _ = writeln!(
                    node_ports,
                    "-A KUBE-NODEPORTS -p {protocol} -m comment --comment {name} \
                     -m {protocol} --dport {node_port} -j KUBE-EXT-{id}"
                );
                let _ = write!(
                    rules,
                    "-A KUBE-EXT-{id} -m comment --comment {name} -j KUBE-MARK-MASQ\n\
                     -A KUBE-EXT-{id} -j KUBE-SVC-{id}\n"
                );
            }
            let _ = write!(
                rules,
                "-A KUBE-SVC-{id} ! -s {cluster_cidr} -d {cluster_ip}/{host} -p {protocol} -m comment --comment {name} \
                 -m {protocol} --dport {port} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SVC-{id} -m comment --comment {name} -j KUBE-SEP-{id}\n\
                 -A KUBE-SEP-{id} -s {ip}/{host} -m comment --comment {name} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{id} -p {protocol} -m comment --comment {name} \
                 -m {protocol} -j DNAT --to-destination {endpoint}\n",
                ip = endpoint.ip(),
            );
        }
    }
    format!(
        "*nat\n\
         :KUBE-SERVICES - [0:0]\n\
         :KUBE-NODEPORTS - [0:0]\n\
         :KUBE-POSTROUTING - [0:0]\n\
         :KUBE-MARK-MASQ - [0:0]\n\
         {chains}\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark {MARK}/{MARK} -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark {MARK}\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark {MARK}\n\
         {jumps}\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
         {node_ports}{rules}COMMIT\n"
    )
}

/// For `nft -f`; of the family of the node's address.
pub fn nftables(services: &[Service], cluster_cidr: &str, node: IpAddr) -> String {
    let (ip, kind) = if node.is_ipv4() { ("ip", "ipv4_addr") } else { ("ip6", "ipv6_addr") };
    let mut chains = String::new();
    let mut ips = Vec::new();
    let mut ports = Vec::new();
    for protocol in ["tcp", "udp"] {
        for (number, service) in services.iter().enumerate() {
            let Service { cluster_ip, port, node_port, endpoint } = service;
            let id = format!("{number:08}/{protocol}/{port}");
            let (svc, sep) = (format!("service-{id}"), format!("endpoint-{id}"));
            let (svc, sep) = (svc.replace('/', "_"), sep.replace('/', "_"));
            let _ = write!(
                chains,
                "chain {sep} {{\n  {ip} saddr {own} jump mark-for-masquerade\n  meta l4proto {protocol} dnat to {endpoint}\n}}\n\
                 chain {svc} {{\n  {ip} daddr {cluster_ip} {protocol} dport {port} {ip} saddr != {cluster_cidr} jump mark-for-masquerade\n  \
                 numgen random mod 1 vmap {{ 0 : goto {sep} }}\n}}\n",
                own = endpoint.ip(),
            );
            ips.push(format!("{cluster_ip} . {protocol} . {port} : goto {svc}"));
            if let Some(node_port) = node_port {
                let external = svc.replace("service-", "external-");
                let _ = write!(chains, "chain {external} {{\n  jump mark-for-masquerade\n  goto {svc}\n}}\n");
                ports.push(format!("{protocol} . {node_port} : goto {external}"));
            }
        }
    }
    let (ips, ports) = (ips.join(",\n    "), ports.join(", "));
    format!(
        "table {ip} kube-proxy {{\n\
         chain mark-for-masquerade {{\n  mark set mark or {MARK}\n}}\n\
         chain masquerading {{\n  mark and {MARK} == 0 return\n  mark set mark xor {MARK}\n  masquerade fully-random\n}}\n\
         {chains}\
         set nodeport-ips {{\n  type {kind}\n  elements = {{ {node} }}\n}}\n\
         map service-nodeports {{\n  type inet_proto . inet_service : verdict\n  elements = {{ {ports} }}\n}}\n\
         map service-ips {{\n  type {kind} . inet_proto . inet_service : verdict\n  elements = {{ {ips} }}\n}}\n\
         chain services {{\n  {ip} daddr . meta l4proto . th dport vmap @service-ips\n  \
         {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports\n}}\n\
         chain nat-prerouting {{\n  type nat hook prerouting priority dstnat; policy accept;\n  jump services\n}}\n\
         chain nat-output {{\n  type nat hook output priority -100; policy accept;\n  jump services\n}}\n\
         chain nat-postrouting {{\n  type nat hook postrouting priority srcnat; policy accept;\n  jump masquerading\n}}\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Family;

    fn services(family: Family) -> [Service; 2] {
        let service = |number, node_port| {
            let [cluster_ip, endpoint] = match family {
                Family::V4 => [format!("10.96.0.{number}"), format!("10.244.1.{number}")],
                Family::V6 => [format!("fd00:10:96::{number}"), format!("fd00:10:244:1::{number}")],
            };
            let endpoint = SocketAddr::new(endpoint.parse().unwrap(), 8080);
            Service { cluster_ip: cluster_ip.parse().unwrap(), port: 80, node_port, endpoint }
        };
        [service(1, None), service(2, Some(30_002))]
    }

    #[test]
    fn every_chain_that_is_jumped_to_is_there() {
        for (family, cidr, node) in
            [(Family::V4, "10.244.0.0/16", "192.0.2.1"), (Family::V6, "fd00:10:244::/48", "fd00::1")]
        {
            let text = iptables(&services(family), cidr);
            for target in text.split_whitespace().filter(|word| word.starts_with("KUBE-")) {
                assert!(text.contains(&format!(":{target} - [0:0]\n")), "{target}:\n{text}");
            }
            let text = nftables(&services(family), cidr, node.parse().unwrap());
            for verdict in ["jump ", "goto "] {
                for part in text.split(verdict).skip(1) {
                    let target = part.split([' ', ',', '\n']).next().unwrap();
                    assert!(text.contains(&format!("chain {target} {{\n")), "{target}:\n{text}");
                }
            }
            assert_eq!(text.matches(" . 80 : goto service-").count(), 4, "{text}");
            assert_eq!(text.matches(" . 30002 : goto external-").count(), 2, "{text}");
        }
    }

    #[test]
    fn rules_of_ipv6_name_nothing_of_ipv4() {
        let text = nftables(&services(Family::V6), "fd00:10:244::/48", "fd00::1".parse().unwrap());
        for part in
            ["table ip6 ", "type ipv6_addr ", " dnat to [fd00:10:244:1::1]:8080", "ip6 daddr fd00:10:96::1 "]
        {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        assert!(!text.contains("ip saddr") && !text.contains("ip daddr") && !text.contains("ipv4"), "{text}");
        let text = iptables(&services(Family::V6), "fd00:10:244::/48");
        assert!(
            text.contains("-d fd00:10:96::1/128 ")
                && text.contains("--to-destination [fd00:10:244:1::1]:8080")
        );
    }
}
