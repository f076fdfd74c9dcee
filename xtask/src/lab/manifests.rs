//! The Kubernetes objects that agents read: what the API server, its controllers and kubelets would have
//! written, as YAML in a directory.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Node, Pod, Protocol};

/// A directory of manifests, one file per Service, Pod or Node.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    pub fn create(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes or replaces a Service and its EndpointSlices.
    pub fn apply(&self, service: &Service) -> Result<()> {
        self.write(&service.name, &service.documents())
    }

    /// Writes or replaces a Node.
    pub fn apply_node(&self, node: &Node) -> Result<()> {
        self.write(&node.name, &[node_manifest(node)])
    }

    /// Writes or replaces a Pod with these host ports: protocol, hostIP (may be empty), hostPort, containerPort.
    pub fn apply_pod(&self, pod: &Pod, ports: &[(Protocol, &str, u16, u16)]) -> Result<()> {
        self.write(&format!("pod-{}", pod.name()), &[pod_manifest(pod, ports)])
    }

    /// Deletes a Pod.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        self.delete(&format!("pod-{}", pod.name()))
    }

    /// Replaces a Node by one in this zone.
    pub fn apply_node_in_zone(&self, node: &Node, zone: &str) -> Result<()> {
        let mut manifest = node_manifest(node);
        manifest["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
        self.write(&node.name, &[manifest])
    }

    /// Deletes what is called `name`.
    pub fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Deletes everything but the nodes.
    pub fn delete_services(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).context("cannot list the manifests")? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml")
                && !path.file_stem().is_some_and(|name| name.to_string_lossy().starts_with("node-"))
            {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Writes a file with any text: also what is no manifest.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        // A reader sees the old file or the new one, as with a volume of a ConfigMap.
        let fresh = self.dir.join(format!(".{name}.tmp"));
        fs::write(&fresh, text).with_context(|| format!("cannot write {}", fresh.display()))?;
        fs::rename(&fresh, self.path(name)).with_context(|| format!("cannot write {name}"))
    }

    /// Writes or replaces the file `name` with these objects.
    pub fn write(&self, name: &str, documents: &[Value]) -> Result<()> {
        let texts: Result<Vec<_>, _> = documents.iter().map(serde_yaml_ng::to_string).collect();
        self.write_text(name, &texts.context("cannot write YAML")?.join("---\n"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.yaml"))
    }
}

/// A Service and the endpoints that its selector finds.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub cluster_ips: Vec<IpAddr>,
    pub ports: Vec<Port>,
    pub endpoints: Vec<Endpoint>,
    /// Annotations of the Service.
    pub annotations: Vec<(String, String)>,
    /// Merged into `spec`: policies and whatever else a test is about.
    pub spec: Value,
    /// `status.loadBalancer.ingress`.
    pub ingress: Vec<Value>,
}

/// A port of a Service.
#[derive(Clone, Debug)]
pub struct Port {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    /// Kubernetes takes `port` if it is absent.
    pub target_port: Option<u16>,
    /// Makes the Service one of type NodePort.
    pub node_port: Option<u16>,
}

/// An endpoint with its conditions.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub pod: String,
    pub node: String,
    pub addrs: Vec<IpAddr>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// `hints`.
    pub hints: Value,
}

impl Port {
    pub fn new(protocol: Protocol, port: u16, target_port: u16) -> Self {
        let name = format!("{}-{port}", protocol.to_string().to_lowercase());
        Self { name, protocol, port, target_port: Some(target_port), node_port: None }
    }

    #[must_use]
    pub fn node_port(self, port: u16) -> Self {
        Self { node_port: Some(port), ..self }
    }

    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// As if the user had left `targetPort` out.
    #[must_use]
    pub fn without_target_port(self) -> Self {
        Self { target_port: None, ..self }
    }
}

impl Endpoint {
    pub fn new(pod: &str, node: &str, addrs: &[IpAddr]) -> Self {
        Self {
            pod: pod.to_owned(),
            node: node.to_owned(),
            addrs: addrs.to_vec(),
            ready: true,
            serving: true,
            terminating: false,
            hints: json!({}),
        }
    }

    /// It is about to go; `serving`: and answers as long as it is there.
    #[must_use]
    pub fn terminating(self, serving: bool) -> Self {
        Self { ready: false, serving, terminating: true, ..self }
    }

    /// It has not come up, or has failed.
    #[must_use]
    pub fn unready(self) -> Self {
        Self { ready: false, serving: false, ..self }
    }

    /// Whom it is meant for.
    #[must_use]
    pub fn hints(self, zones: &[&str], nodes: &[&str]) -> Self {
        let list = |names: &[&str]| names.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        Self { hints: json!({ "forZones": list(zones), "forNodes": list(nodes) }), ..self }
    }
}

impl From<&Pod> for Endpoint {
    fn from(pod: &Pod) -> Self {
        Self::new(pod.name(), &pod.node, &pod.addrs.both())
    }
}

impl Service {
    pub fn new(name: &str, cluster_ips: &[IpAddr]) -> Self {
        Self {
            name: name.to_owned(),
            cluster_ips: cluster_ips.to_vec(),
            ports: Vec::new(),
            endpoints: Vec::new(),
            annotations: Vec::new(),
            spec: json!({}),
            ingress: Vec::new(),
        }
    }

    #[must_use]
    pub fn port(mut self, port: Port) -> Self {
        self.ports.push(port);
        self
    }

    #[must_use]
    pub fn endpoint(mut self, endpoint: impl Into<Endpoint>) -> Self {
        self.endpoints.push(endpoint.into());
        self
    }

    /// The Service object and its EndpointSlices.
    pub fn documents(&self) -> Vec<Value> {
        let mut documents = vec![self.manifest()];
        documents.extend(self.slices());
        documents
    }

    /// The Service object.
    pub fn manifest(&self) -> Value {
        let node_ports = self.ports.iter().any(|port| port.node_port.is_some());
        let families: Vec<_> = self.cluster_ips.iter().map(family_name).collect();
        let mut spec = json!({
            "type": if node_ports { "NodePort" } else { "ClusterIP" },
            "clusterIP": self.cluster_ips.first(),
            "clusterIPs": self.cluster_ips,
            "ipFamilies": families,
            "ipFamilyPolicy": if families.len() > 1 { "PreferDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": "Cluster",
            "selector": { "app": self.name },
            "sessionAffinity": "None",
            "ports": self.ports.iter().map(Port::manifest).collect::<Vec<_>>(),
        });
        if node_ports {
            spec["externalTrafficPolicy"] = json!("Cluster");
        }
        merge(&mut spec, &self.spec);
        let mut metadata = json!({ "name": self.name, "namespace": "default" });
        for (key, value) in &self.annotations {
            metadata["annotations"][key] = json!(value);
        }
        let status = json!({ "loadBalancer": { "ingress": self.ingress } });
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status })
    }

    /// What the EndpointSlice controller makes of it: a slice for each family of the Service.
    pub fn slices(&self) -> Vec<Value> {
        let slice = |cluster_ip: &IpAddr| {
            let v4 = cluster_ip.is_ipv4();
            let endpoints: Vec<_> =
                self.endpoints.iter().filter_map(|endpoint| endpoint.manifest(v4)).collect();
            // A slice without endpoints has no ports either.
            let ports: Vec<_> =
                self.ports.iter().filter(|_| !endpoints.is_empty()).map(Port::slice_manifest).collect();
            let family = family_name(cluster_ip);
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}", self.name, family.to_lowercase()),
                    "namespace": "default",
                    "labels": {
                        "kubernetes.io/service-name": self.name,
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": ports,
            })
        };
        self.cluster_ips.iter().map(slice).collect()
    }
}

impl Port {
    fn manifest(&self) -> Value {
        let mut port = json!({ "name": self.name, "protocol": self.protocol.to_string().to_uppercase(), "port": self.port });
        if let Some(target_port) = self.target_port {
            port["targetPort"] = json!(target_port);
        }
        if let Some(node_port) = self.node_port {
            port["nodePort"] = json!(node_port);
        }
        port
    }

    fn slice_manifest(&self) -> Value {
        json!({
            "name": self.name,
            "protocol": self.protocol.to_string(),
            "port": self.target_port.unwrap_or(self.port),
        })
    }
}

impl Endpoint {
    fn manifest(&self, v4: bool) -> Option<Value> {
        let addr = self.addrs.iter().find(|addr| addr.is_ipv4() == v4)?;
        Some(json!({
            "addresses": [addr],
            "conditions": { "ready": self.ready, "serving": self.serving, "terminating": self.terminating },
            "nodeName": self.node,
            "hints": self.hints,
            "targetRef": { "kind": "Pod", "name": self.pod, "namespace": "default" },
        }))
    }
}

fn pod_manifest(pod: &Pod, ports: &[(Protocol, &str, u16, u16)]) -> Value {
    let ports = ports.iter().map(|(protocol, host_ip, host_port, container_port)| {
        let protocol = protocol.to_string().to_uppercase();
        json!({ "containerPort": container_port, "hostPort": host_port, "hostIP": host_ip, "protocol": protocol })
    });
    let containers = json!([{ "name": "server", "image": "server", "ports": ports.collect::<Vec<_>>() }]);
    let [first, second] = pod.addrs.both();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": pod.name(), "namespace": "default" },
        "spec": { "nodeName": pod.node, "containers": containers },
        "status": { "phase": "Running", "podIP": first, "podIPs": [{ "ip": first }, { "ip": second }] },
    })
}

fn node_manifest(node: &Node) -> Value {
    let pod_cidrs = node.pod_cidrs();
    let mut addresses: Vec<_> =
        node.addrs.both().iter().map(|addr| json!({ "type": "InternalIP", "address": addr })).collect();
    addresses.push(json!({ "type": "Hostname", "address": node.name }));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.name, "labels": { "kubernetes.io/hostname": node.name } },
        "spec": { "podCIDR": pod_cidrs[0], "podCIDRs": pod_cidrs },
        "status": {
            "addresses": addresses,
            "conditions": [{
                "type": "Ready",
                "status": "True",
                "lastHeartbeatTime": "2026-01-01T00:00:00Z",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }],
        },
    })
}

fn family_name(addr: &IpAddr) -> &'static str {
    if addr.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn merge(into: &mut Value, from: &Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from.clone());
    }
}
