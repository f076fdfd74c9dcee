//! Where the demo happens: pods, and Services with the ports that everybody knows from examples.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result};

use super::PREFIX;
use super::calls::{Target, Who};
use crate::lab::counters;
use crate::lab::server::Site;
use crate::lab::{AgentOptions, Cluster, Endpoint, Family, Lab, Node, Pod, Port, Protocol, Service};

pub(super) const PRODUCTPAGE: &str = "productpage";
pub(super) const FB_BACKENDS: &str = "fb-backends";
pub(super) const NGINX: &str = "nginx-svc";
pub(super) const WEB: &str = "web";
pub(super) const BACKEND: &str = "backend";
pub(super) const DNS: &str = "dns";
pub(super) const EMPTY: &str = "empty";

/// A pod of the demo, and what its containers listen on.
struct Part {
    name: &'static str,
    on_node_b: bool,
    ports: &'static [(Protocol, u16)],
}

const PARTS: [Part; 9] = [
    part("client-a", false, &[]),
    part("client-b", true, &[]),
    part("fb-backends-1", false, &[(Protocol::Tcp, 8001)]),
    part("fb-backends-2", true, &[(Protocol::Tcp, 8001)]),
    part("productpage-1", true, &[(Protocol::Tcp, 9080)]),
    part("nginx-1", false, &[(Protocol::Tcp, 80)]),
    part("web-1", true, &[(Protocol::Tcp, 80), (Protocol::Tcp, 8080)]),
    part("backend-1", false, &[(Protocol::Tcp, 3000)]),
    part("dns-1", true, &[(Protocol::Udp, 5353)]),
];

const fn part(name: &'static str, on_node_b: bool, ports: &'static [(Protocol, u16)]) -> Part {
    Part { name, on_node_b, ports }
}

/// The demo, up and running. Pods come before the cluster: they are dropped first.
pub(super) struct Scene {
    pods: BTreeMap<&'static str, Pod>,
    services: BTreeMap<&'static str, Service>,
    pub(super) cluster: Cluster,
}

impl Scene {
    pub(super) fn build(xtask: &Path, agent: &Path) -> Result<Self> {
        let lab = Lab::with_prefix(xtask, PREFIX)?;
        let mut pods = BTreeMap::new();
        let mut sites = Vec::new();
        for part in PARTS {
            let node = if part.on_node_b { &lab.node_b } else { &lab.node_a };
            let pod = lab.add_pod(node, part.name)?;
            sites.extend(part.ports.iter().map(|(protocol, port)| Site {
                ns: pod.ns.clone(),
                name: part.name.to_owned(),
                protocol: *protocol,
                addrs: pod.addrs.with_port(*port).to_vec(),
            }));
            pods.insert(part.name, pod);
        }
        lab.serve_by_itself(&sites)?;
        let scene = Self {
            services: services(&pods),
            pods,
            cluster: Cluster::new(lab, agent, AgentOptions::default())?,
        };
        for (name, service) in &scene.services {
            // The first chapter is about what happens without its targetPort.
            let first = if *name == PRODUCTPAGE { without_target_port(service) } else { service.clone() };
            scene.cluster.manifests.apply(&first)?;
        }
        scene.cluster.start()?;
        Ok(scene)
    }

    pub(super) fn keep(self, agent: &Path) -> Result<()> {
        let lab = &self.cluster.lab;
        let (manifests, cgroup) =
            (self.cluster.manifests.dir().display(), lab.node_a.cgroup.path().display());
        let pins = lab.pins(&lab.node_a);
        println!(
            "\nEverything stays up. As root:\n  \
             an outside client   ip netns exec {PREFIX}-outside curl http://192.0.2.1:30904\n  \
             a pod               ip netns exec {PREFIX}-client-a curl http://10.96.0.11:5001\n  \
             a node's process    sh -c 'echo $$ > {cgroup}/cgroup.procs;\n                      \
             exec ip netns exec {PREFIX}-node-a curl http://localhost:30066'\n  \
             packets             ip netns exec {PREFIX}-node-a tcpdump -ni any\n  \
             maps                bpftool map dump pinned {}\n  \
             the agent's view    {agent} services --bpffs {pins}\n                      \
             {agent} flows --bpffs {pins}\n  \
             agents' logs        {dir}/node-a.log, {dir}/node-b.log\n  \
             Services            edit the files in {manifests}; the agents follow\n\
             To remove it:         cargo xtask demo --down",
            counters::find(&pins, "SERVICES4")?.display(),
            dir = lab.dir().display(),
            agent = agent.display(),
            pins = pins.display(),
        );
        self.cluster.keep()
    }

    pub(super) fn service(&self, name: &str) -> Result<&Service> {
        self.services.get(name).with_context(|| format!("there is no Service {name}"))
    }

    /// `clusterIP:port`, where `port` need not be one of the Service's.
    pub(super) fn cluster_ip(&self, name: &str, family: Family, port: u16) -> Result<Target> {
        let service = self.service(name)?;
        let ip = service.cluster_ips.iter().find(|ip| ip.is_ipv4() == (family == Family::V4));
        let addr = SocketAddr::new(*ip.context("a Service of one family")?, port);
        Ok(Target { protocol: Protocol::Tcp, addr, text: format!("ClusterIP {addr}") })
    }

    pub(super) fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.get(name).with_context(|| format!("there is no pod {name}"))
    }

    pub(super) fn client(&self, name: &str) -> Result<Who<'_>> {
        let pod = self.pod(name)?;
        Ok(Who { caller: pod, text: format!("pod {name} on {}", pod.node) })
    }

    pub(super) fn outside(&self) -> Who<'_> {
        Who { caller: &self.cluster.lab.outside, text: "outside".to_owned() }
    }

    pub(super) fn far(&self) -> Who<'_> {
        Who { caller: &self.cluster.lab.far, text: "outside, behind a router".to_owned() }
    }

    pub(super) fn node_a(&self) -> &Node {
        &self.cluster.lab.node_a
    }

    pub(super) fn node_b(&self) -> &Node {
        &self.cluster.lab.node_b
    }
}

/// The Services, as their users would have written them.
fn services(pods: &BTreeMap<&'static str, Pod>) -> BTreeMap<&'static str, Service> {
    let tcp = |port, target, node_port| Port::new(Protocol::Tcp, port, target).node_port(node_port);
    let web = [tcp(80, 80, 31000).named("http"), tcp(8080, 8080, 31001).named("metrics")];
    let all = [
        (FB_BACKENDS, 11, vec![tcp(5001, 8001, 30904)], "fb-backends-"),
        (PRODUCTPAGE, 12, vec![tcp(9999, 9080, 30066)], "productpage-"),
        (NGINX, 13, vec![tcp(8222, 80, 30333)], "nginx-"),
        (WEB, 14, web.to_vec(), "web-"),
        (BACKEND, 15, vec![tcp(3000, 3000, 31263)], "backend-"),
        (DNS, 16, vec![Port::new(Protocol::Udp, 53, 5353).node_port(30053)], "dns-"),
        (EMPTY, 17, vec![tcp(80, 80, 30080)], "no pod is called so"),
    ];
    let make = |(name, number, ports, selector): (&'static str, u8, Vec<Port>, &str)| {
        let cluster_ips: [IpAddr; 2] = [
            Ipv4Addr::new(10, 96, 0, number).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
        ];
        let mut service = Service::new(name, &cluster_ips);
        service.ports = ports;
        let selected = pods.iter().filter(|(pod, _)| pod.starts_with(selector));
        service.endpoints = selected.map(|(_, pod)| Endpoint::from(pod)).collect();
        (name, service)
    };
    all.into_iter().map(make).collect()
}

/// The same Service by a user who forgot.
pub(super) fn without_target_port(service: &Service) -> Service {
    let mut service = service.clone();
    service.ports.iter_mut().for_each(|port| port.target_port = None);
    service
}

/// Why `port` of a Service is refused: its chain of ports, down to what the containers listen on.
pub(super) fn why_refused(service: &Service, port: u16) -> Result<String> {
    let found = service.ports.iter().find(|candidate| candidate.port == port);
    let found = found.with_context(|| format!("{} has no port {port}", service.name))?;
    let (target, because) = match found.target_port {
        Some(target) => (target, ""),
        None => (port, " (there is no targetPort, and then it is the same as port)"),
    };
    let pod = &service.endpoints.first().with_context(|| format!("{} has no endpoint", service.name))?.pod;
    let containers = PARTS.iter().filter(|candidate| candidate.name == pod).flat_map(|part| part.ports);
    let listens: Vec<_> = containers.map(|(_, port)| port.to_string()).collect();
    let name = &service.name;
    let listens = listens.join(", ");
    Ok(format!("why: {name}:{port} leads to {pod}:{target}{because}, where {pod} listens on {listens} only"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host;

    /// The address that the lab gives a pod of the demo: nodes number their pods from 10.
    fn address(name: &str) -> String {
        let part = PARTS.iter().find(|part| part.name == name).expect(name);
        let before = PARTS.iter().take_while(|part| part.name != name);
        let number = 10 + before.filter(|other| other.on_node_b == part.on_node_b).count();
        format!("10.244.{}.{number}", 1 + u8::from(part.on_node_b))
    }

    /// docs/packets/README.md says that its pictures show the demo.
    #[test]
    fn pictures_show_what_the_demo_has() {
        let productpage = services(&BTreeMap::new()).remove(PRODUCTPAGE).expect("the Service");
        let port = productpage.ports.first().expect("its port");
        let target = format!("{}:{}", address("productpage-1"), port.target_port.expect("its targetPort"));
        let node_port = format!(":{}", port.node_port.expect("its nodePort"));
        let cluster_ip = format!("{}:{}", productpage.cluster_ips[0], port.port);
        for (picture, frontend) in [
            ("outside-here", &node_port),
            ("outside-elsewhere", &node_port),
            ("pod", &cluster_ip),
            ("process", &node_port),
            ("errors", &node_port),
        ] {
            let path = host::workspace().join(format!("docs/packets/{picture}.picture"));
            let text = fs::read_to_string(path).expect(picture);
            assert!(text.contains(frontend) && text.contains(&target), "{picture}: {frontend}, {target}");
            for lane in text.lines().filter(|line| line.starts_with("lane ")) {
                let cells: Vec<_> = lane.split('|').map(str::trim).collect();
                if let Some(name) = cells[1].strip_prefix("pod ") {
                    let shown = cells[2].split([',', ' ']).next();
                    assert_eq!(shown, Some(&*address(name)), "{picture}: {lane}");
                }
            }
        }
    }
}
