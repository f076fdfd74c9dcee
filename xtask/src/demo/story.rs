//! What the demo shows, chapter by chapter.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Result, bail};

use super::calls::{Expect, Stage, Target, Who};
use super::scene::{
    BACKEND, DNS, EMPTY, FB_BACKENDS, NGINX, PRODUCTPAGE, WEB, why_refused, without_target_port,
};
use crate::lab::counters::Edge::{Nic, Pod, Socket};
use crate::lab::{Call, Family, eventually};

impl Stage<'_> {
    /// Makes every call.
    pub(super) fn play(&mut self) -> Result<()> {
        self.productpage_without_target_port()?;
        self.productpage()?;
        self.fb_backends()?;
        self.nginx()?;
        self.web()?;
        self.backend()?;
        self.dns()?;
        self.direct()?;
        self.must_not_work()?;
        self.empty()
    }

    fn productpage_without_target_port(&mut self) -> Result<()> {
        let scene = self.scene;
        self.table.chapter("productpage: port 9999, targetPort left out by mistake");
        let target = scene.cluster_ip(PRODUCTPAGE, Family::V4, 9999)?;
        self.call(&scene.client("client-a")?, &target, &Expect::Refused, &[(scene.node_a(), Pod)])?;
        let faulty = without_target_port(scene.service(PRODUCTPAGE)?);
        self.table.note(&why_refused(&faulty, 9999)?);

        scene.cluster.manifests.apply(scene.service(PRODUCTPAGE)?)?;
        eventually(Duration::from_secs(20), || {
            for node in scene.cluster.lab.nodes() {
                let outcome = node.ask(Call::tcp(target.addr))?;
                if outcome.server().is_none() {
                    bail!("{} does not follow the corrected manifest: {outcome}", node.name);
                }
            }
            Ok(())
        })
    }

    fn productpage(&mut self) -> Result<()> {
        let scene = self.scene;
        self.table.chapter("productpage: port 9999, targetPort 9080, nodePort 30066");
        let answer = Expect::From(&["productpage-1"]);
        let target = scene.cluster_ip(PRODUCTPAGE, Family::V4, 9999)?;
        self.call(&scene.client("client-a")?, &target, &answer, &[(scene.node_a(), Pod)])?;
        for node in scene.cluster.lab.nodes() {
            let target = Target::node_port(node, Family::V4, 30066);
            self.call(&scene.outside(), &target, &answer, &[(node, Nic)])?;
        }
        for target in [
            Target::loopback("localhost", Ipv4Addr::LOCALHOST.into(), 30066),
            Target::loopback("[::1]", Ipv6Addr::LOCALHOST.into(), 30066),
        ] {
            self.call(&Who::process(scene.node_a()), &target, &answer, &[(scene.node_a(), Socket)])?;
        }
        Ok(())
    }

    fn fb_backends(&mut self) -> Result<()> {
        let scene = self.scene;
        let (node_a, node_b) = (scene.node_a(), scene.node_b());
        self.table.chapter("fb-backends: port 5001, targetPort 8001, nodePort 30904; a pod on each node");
        let pods = ["fb-backends-1", "fb-backends-2"];
        let answer = Expect::From(&pods);
        let cluster_ip = scene.cluster_ip(FB_BACKENDS, Family::V4, 5001)?;
        self.call(&scene.client("client-b")?, &cluster_ip, &answer, &[(node_b, Pod)])?;
        self.call(&Who::process(node_b), &cluster_ip, &answer, &[(node_b, Socket)])?;
        let target = Target::node_port(node_a, Family::V4, 30904);
        self.call(&scene.outside(), &target, &answer, &[(node_a, Nic)])?;
        let target = Target::node_port(node_b, Family::V6, 30904);
        self.call(&scene.far(), &target, &answer, &[(node_b, Nic)])?;
        self.call(&scene.client("client-a")?, &cluster_ip, &Expect::Spread(&pods, 100), &[(node_a, Pod)])
    }

    fn nginx(&mut self) -> Result<()> {
        let scene = self.scene;
        let (node_a, node_b) = (scene.node_a(), scene.node_b());
        self.table.chapter("nginx-svc: port 8222, targetPort 80, nodePort 30333");
        let answer = Expect::From(&["nginx-1"]);
        let cluster_ip = scene.cluster_ip(NGINX, Family::V4, 8222)?;
        self.call(&scene.client("client-a")?, &cluster_ip, &answer, &[(node_a, Pod)])?;
        let target = scene.cluster_ip(NGINX, Family::V6, 8222)?;
        self.call(&scene.client("client-b")?, &target, &answer, &[(node_b, Pod)])?;
        for node in [node_a, node_b] {
            let target = Target::node_port(node, Family::V4, 30333);
            self.call(&scene.far(), &target, &answer, &[(node, Nic)])?;
        }
        self.call(&scene.client("nginx-1")?, &cluster_ip, &answer, &[(node_a, Pod)])?;
        self.table.note("a pod that reaches itself sees another source address than its own");
        Ok(())
    }

    fn web(&mut self) -> Result<()> {
        let scene = self.scene;
        self.table.chapter("web, two ports: http 80 with nodePort 31000, metrics 8080 with nodePort 31001");
        let answer = Expect::From(&["web-1"]);
        for (port, node_port) in [(80, 31000), (8080, 31001)] {
            let target = scene.cluster_ip(WEB, Family::V4, port)?;
            self.call(&scene.client("client-a")?, &target, &answer, &[(scene.node_a(), Pod)])?;
            let target = Target::node_port(scene.node_a(), Family::V4, node_port);
            self.call(&scene.outside(), &target, &answer, &[(scene.node_a(), Nic)])?;
        }
        Ok(())
    }

    fn backend(&mut self) -> Result<()> {
        let scene = self.scene;
        let (node_a, node_b) = (scene.node_a(), scene.node_b());
        self.table.chapter("backend: port 3000, targetPort 3000, nodePort 31263");
        let answer = Expect::From(&["backend-1"]);
        let client = scene.client("client-b")?;
        let target = scene.cluster_ip(BACKEND, Family::V4, 3000)?;
        self.call(&client, &target, &answer, &[(node_b, Pod)])?;
        let own = Target::node_port(node_b, Family::V4, 31263);
        self.call(&client, &own, &answer, &[(node_b, Pod)])?;
        let other = Target::node_port(node_a, Family::V4, 31263);
        self.call(&client, &other, &answer, &[(node_a, Nic)])?;
        self.call(&scene.outside(), &own, &answer, &[(node_b, Nic)])
    }

    fn dns(&mut self) -> Result<()> {
        let scene = self.scene;
        let node_a = scene.node_a();
        self.table.chapter("dns, UDP: port 53, targetPort 5353, nodePort 30053");
        let answer = Expect::From(&["dns-1"]);
        let target = scene.cluster_ip(DNS, Family::V4, 53)?.udp();
        self.call(&scene.client("client-a")?, &target, &answer, &[(node_a, Pod)])?;
        self.call(&Who::process(node_a), &target, &answer, &[(node_a, Socket)])?;
        for node in scene.cluster.lab.nodes() {
            let target = Target::node_port(node, Family::V6, 30053).udp();
            self.call(&scene.outside(), &target, &answer, &[(node, Nic)])?;
        }
        Ok(())
    }

    fn direct(&mut self) -> Result<()> {
        let scene = self.scene;
        self.table.chapter("podIP:targetPort, without any Service");
        for (pod, port) in [("fb-backends-2", 8001), ("nginx-1", 80)] {
            let target = Target::pod(scene.pod(pod)?, Family::V4, port);
            self.call(&scene.client("client-a")?, &target, &Expect::From(&[pod]), &[])?;
        }
        Ok(())
    }

    fn must_not_work(&mut self) -> Result<()> {
        let scene = self.scene;
        let (node_a, node_b) = (scene.node_a(), scene.node_b());
        self.table.chapter(
            "what must not work: clusterIP:targetPort, clusterIP:nodePort, a clusterIP from outside",
        );
        for port in [8001, 30904] {
            let target = scene.cluster_ip(FB_BACKENDS, Family::V4, port)?;
            self.call(&scene.client("client-a")?, &target, &Expect::Refused, &[(node_a, Pod)])?;
            self.call(&Who::process(node_b), &target, &Expect::Refused, &[(node_b, Socket)])?;
        }
        self.table.note(
            "why: a clusterIP has the Service's `port` only; targetPort is the pod's, nodePort the node's",
        );
        let target = scene.cluster_ip(FB_BACKENDS, Family::V4, 5001)?;
        self.call(&scene.outside(), &target, &Expect::Unreachable, &[])?;
        self.table.note("why: the network outside knows no way to clusterIPs");
        Ok(())
    }

    fn empty(&mut self) -> Result<()> {
        let scene = self.scene;
        let node_a = scene.node_a();
        self.table.chapter("empty: a Service without endpoints refuses at once");
        let target = scene.cluster_ip(EMPTY, Family::V4, 80)?;
        self.call(&scene.client("client-a")?, &target, &Expect::Refused, &[(node_a, Pod)])?;
        self.call(&Who::process(node_a), &target, &Expect::Refused, &[(node_a, Socket)])?;
        let target = Target::node_port(node_a, Family::V4, 30080);
        self.call(&scene.outside(), &target, &Expect::Refused, &[(node_a, Nic)])
    }
}
