//! Every overlay is the base with what it says, and nothing else.

use std::collections::BTreeSet;
use std::fs;

use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::{Value, json};

use super::kustomize::merge;
use super::{base, check_start, deploy, documents, kinds, one, overlay, pod_of};

const ALL: [&str; 9] =
    ["beside-kube-proxy", "drain", "dual-stack", "eks", "gke", "k3s", "kind", "kubeadm", "privileged"];
/// Of `components/other-ports`.
const OTHER_PORTS: [&str; 2] =
    ["--healthz-bind-address=0.0.0.0:10266", "--metrics-bind-address=127.0.0.1:10269"];

fn args(objects: &[Value]) -> Vec<String> {
    pod_of(objects).containers[0].args.clone().expect("arguments")
}

#[test]
fn every_overlay_is_valid_and_starts_the_agent() {
    let there: BTreeSet<String> = fs::read_dir(deploy().join("overlays"))
        .expect("overlays")
        .map(|entry| entry.expect("a directory").file_name().into_string().expect("a name"))
        .collect();
    assert_eq!(there, ALL.map(str::to_owned).into());
    let names = ["fairlead", "fairlead-apiserver"];
    for name in ALL {
        let objects = overlay(name);
        kinds::check_all(&objects);
        check_start(&objects);
        for object in &objects {
            let metadata = &object["metadata"];
            assert!(names.iter().any(|known| metadata["name"] == *known), "{name}: {metadata}");
            let namespaced = !object["kind"].as_str().expect("a kind").starts_with("Cluster");
            assert_eq!(metadata["namespace"] == "kube-system", namespaced, "{name}: {metadata}");
        }
    }
}

/// What each starts the agent with, behind what the base does.
#[test]
fn overlays_add_these_flags() {
    let common = args(&base());
    for (name, more) in [
        (
            "dual-stack",
            &["--healthz-bind-address=[::]:10256", "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56"][..],
        ),
        ("eks", &["--device=eth*,ens*", "--pod-device=eni*"]),
        ("gke", &[OTHER_PORTS[0], OTHER_PORTS[1], "--device=eth0,ens*", "--pod-device=gke*,veth*"]),
        ("beside-kube-proxy", &[OTHER_PORTS[0], OTHER_PORTS[1], "--takeover"]),
        ("drain", &[OTHER_PORTS[0], OTHER_PORTS[1], "--drain"]),
        ("k3s", &[]),
        ("kind", &["--max-flows=65536", "--max-services=8192", "--max-backends=32768"]),
        ("kubeadm", &["--takeover"]),
        ("privileged", &[]),
    ] {
        let all = args(&overlay(name));
        let expected: Vec<&str> = common.iter().map(String::as_str).chain(more.iter().copied()).collect();
        assert_eq!(all, expected, "{name}");
    }
}

#[test]
fn the_privileged_overlay_is_privileged_and_else_the_base() {
    let objects = overlay("privileged");
    let pod = pod_of(&objects);
    assert_eq!((pod.containers.len(), pod.volumes.map(|volumes| volumes.len())), (1, Some(5)));
    let container = &pod.containers[0];
    let context = container.security_context.clone().expect("a security context");
    assert_eq!((context.privileged, context.read_only_root_filesystem), (Some(true), Some(true)));
    // The API server refuses the contrary of `privileged` beside it.
    assert_eq!((context.allow_privilege_escalation, context.capabilities), (None, None));
    let mounts = container.volume_mounts.clone().expect("mounts");
    let bpffs = mounts.iter().find(|mount| mount.mount_path == "/sys/fs/bpf").expect("bpffs");
    assert_eq!(bpffs.mount_propagation.as_deref(), Some("Bidirectional"));
}

/// kube-proxy as kubeadm installs it, as far as the patches meet it.
#[test]
fn kube_proxy_goes_and_comes_back() {
    let selector = json!({ "kubernetes.io/os": "linux" });
    let container = json!({ "name": "kube-proxy", "image": "registry.k8s.io/kube-proxy:v1.33.0" });
    let pod = json!({ "nodeSelector": selector, "containers": [container] });
    let labels = json!({ "k8s-app": "kube-proxy" });
    let template = json!({ "metadata": { "labels": labels }, "spec": pod });
    let spec = json!({ "selector": { "matchLabels": labels }, "template": template });
    let before = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "kube-proxy" }, "spec": spec
    });
    let patched = |object: &Value, file: &str| {
        let mut object = object.clone();
        let mut patches = documents(&deploy().join("overlays/kubeadm").join(file));
        assert_eq!(patches.len(), 1);
        merge(&mut object, patches.remove(0));
        kinds::check::<DaemonSet>(&object);
        object
    };
    let off = patched(&before, "kube-proxy-off.yaml");
    let selector = &off["spec"]["template"]["spec"]["nodeSelector"];
    assert_eq!(selector, &json!({ "kubernetes.io/os": "linux", "fairlead.io/kube-proxy": "true" }));
    assert_eq!(patched(&off, "kube-proxy-on.yaml"), before);
}

#[test]
fn where_no_kube_proxy_was_there_is_another_way_to_the_api_server() {
    for name in ["k3s", "kind"] {
        let objects = overlay(name);
        let map = one(&objects, "ConfigMap");
        let host = map["data"]["KUBERNETES_SERVICE_HOST"].as_str().expect("a host");
        let port = map["data"]["KUBERNETES_SERVICE_PORT"].as_str().expect("a port as text");
        assert!(!host.is_empty() && port.parse::<u16>().is_ok(), "{name}: {host}:{port}");
        let from = pod_of(&objects).containers[0].env_from.clone().expect("envFrom").remove(0);
        let used = from.config_map_ref.expect("a ConfigMap");
        assert_eq!((map["metadata"]["name"].as_str(), used.optional), (Some(&*used.name), Some(true)));
    }
}

/// kind refuses fields that it does not know.
#[test]
fn the_cluster_of_kind_has_no_kube_proxy() {
    let cluster = documents(&deploy().join("overlays/kind/cluster.yaml")).remove(0);
    let nodes = json!([{ "role": "control-plane" }, { "role": "worker" }]);
    let networking = json!({ "kubeProxyMode": "none" });
    let known = json!({
        "kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "networking": networking, "nodes": nodes
    });
    assert_eq!(cluster, known);
}
