//! The manifests in `deploy/` say what Kubernetes understands and the agent takes, and the pages about them are true.

mod chart;
mod helm;
mod kinds;
mod kustomize;
mod monitoring;
mod overlays;
mod pages;
mod promql;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use fairlead::cli::Cli;
use fairlead::sys::capabilities::{BEFORE_5_11, NEEDED};
use fairlead::sys::sysctl;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{PodSpec, Toleration};
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn docs(name: &str) -> String {
    fs::read_to_string(deploy().join("../docs").join(name)).unwrap_or_else(|e| panic!("docs/{name}: {e}"))
}

fn documents(path: &Path) -> Vec<Value> {
    documents_of(&fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())), path)
}

fn documents_of(text: &str, path: &Path) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect()
}

fn base() -> Vec<Value> {
    kustomize::build(&deploy().join("base"))
}

fn overlay(name: &str) -> Vec<Value> {
    kustomize::build(&deploy().join("overlays").join(name))
}

/// The base with all components.
fn with_monitoring() -> Vec<Value> {
    let components = ["monitoring", "network-policy"].map(|name| deploy().join("components").join(name));
    components.iter().fold(base(), |objects, component| kustomize::build_onto(component, objects))
}

fn one<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

fn of_kind<T: DeserializeOwned>(kind: &str) -> T {
    kinds::typed(one(&base(), kind))
}

/// The pod that the DaemonSet among these makes.
fn pod_of(objects: &[Value]) -> PodSpec {
    pod(kinds::typed(one(objects, "DaemonSet")))
}

fn pod(daemon_set: DaemonSet) -> PodSpec {
    daemon_set.spec.and_then(|spec| spec.template.spec).expect("a pod")
}

/// What the container is started with is what the command line takes, and every mount has its volume.
fn check_start(objects: &[Value]) {
    let pod = pod_of(objects);
    let container = &pod.containers[0];
    // As the kubelet does with `status.hostIP`.
    let args = container.args.iter().flatten().map(|arg| arg.replace("$(HOST_IP)", "192.0.2.1"));
    if let Err(error) = Cli::try_parse_from(["fairlead".to_owned()].into_iter().chain(args)) {
        panic!("{error}");
    }
    let uses = container.args.iter().flatten().any(|arg| arg.contains("$(HOST_IP)"));
    assert_eq!(container.env.iter().flatten().any(|env| env.name == "HOST_IP"), uses);
    // The kubelet asks where the agent answers.
    let port = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some("healthz"));
    let port = port.map(|port| port.container_port).expect("a port");
    let told = container.args.iter().flatten().find_map(|arg| arg.strip_prefix("--healthz-bind-address="));
    assert!(told.unwrap_or("0.0.0.0:10256").ends_with(&format!(":{port}")), "{told:?}, and {port} is asked");
    let volumes = pod.volumes.expect("volumes");
    let mounts = container.volume_mounts.clone().expect("mounts");
    let known = |name: &str| volumes.iter().any(|volume| volume.name == name);
    assert!(mounts.iter().all(|mount| known(&mount.name)), "a mount without its volume");
    assert_eq!(mounts.len(), volumes.len());
}

#[test]
fn manifests_have_no_field_that_kubernetes_does_not_know() {
    let objects = base();
    kinds::check_all(&objects);
    assert_eq!(objects.len(), 4);
    kinds::check_all(&with_monitoring());
}

/// What the kernel is asked for, docs/security.md explains and the DaemonSet gives.
#[test]
fn the_daemon_set_gives_the_agent_what_it_needs_and_no_more() {
    let needed = NEEDED.map(|capability| capability.name.to_owned());
    let pod = pod(of_kind("DaemonSet"));
    let context = pod.containers[0].security_context.clone().expect("a security context");
    let capabilities = context.capabilities.expect("capabilities");
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    assert_eq!(capabilities.add.as_deref(), Some(&needed[..]));
    assert_eq!(context.privileged, None);
    assert_eq!(context.allow_privilege_escalation, Some(false));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    assert_eq!(context.seccomp_profile.expect("a profile").type_, "RuntimeDefault");
    let settings = format!("{}/net", sysctl::HOST);
    let mounts = pod.containers[0].volume_mounts.clone().expect("mounts");
    assert!(mounts.iter().any(|mount| mount.mount_path == settings), "{settings} is not mounted");
    let explained = docs("security.md");
    for name in needed.iter().map(String::as_str).chain([BEFORE_5_11]) {
        assert!(explained.contains(&format!("`CAP_{name}`")), "docs/security.md does not explain {name}");
    }
    for word in explained.split('`').filter(|word| word.starts_with("CAP_")) {
        let name = &word["CAP_".len()..];
        assert!(needed.iter().any(|needed| needed == name) || name == BEFORE_5_11, "{word} is not needed");
    }
}

/// What must be so wherever it runs.
#[test]
fn every_node_has_one_agent_that_goes_first_and_is_replaced_one_by_one() {
    let spec = of_kind::<DaemonSet>("DaemonSet").spec.expect("a spec");
    let update = spec.update_strategy.clone().and_then(|update| update.rolling_update).expect("rolling");
    assert_eq!(update.max_unavailable, Some(IntOrString::Int(1)));
    let pod = spec.template.spec.expect("a pod");
    assert_eq!(pod.host_network, Some(true));
    // The cluster's is behind a Service.
    assert_eq!(pod.dns_policy.as_deref(), Some("Default"));
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    let tolerations = pod.tolerations.expect("tolerations");
    let all =
        |t: &Toleration| t.operator.as_deref() == Some("Exists") && t.key.is_none() && t.effect.is_none();
    assert!(tolerations.iter().any(all), "{tolerations:?}");
    let container = &pod.containers[0];
    let paths = [&container.startup_probe, &container.liveness_probe, &container.readiness_probe]
        .map(|probe| probe.as_ref().and_then(|p| p.http_get.as_ref()?.path.clone()));
    assert_eq!(paths.each_ref().map(Option::as_deref), [Some("/livez"), Some("/livez"), Some("/readyz")]);
    // What is kept outlives the container.
    let mounts = container.volume_mounts.clone().expect("mounts");
    assert!(mounts.iter().any(|mount| mount.mount_path == "/var/lib/fairlead"), "no place for the state");
    check_start(&base());
}

/// Least privilege: it reads what Services are made of, and writes Events.
#[test]
fn the_role_allows_what_the_agent_does_and_no_more() {
    let rules = of_kind::<ClusterRole>("ClusterRole").rules.expect("rules");
    let mut read = Vec::new();
    for rule in rules {
        let resources = rule.resources.expect("resources");
        if rule.verbs == ["list", "watch"] {
            read.extend(resources);
        } else {
            assert_eq!((resources, rule.verbs), (vec!["events".to_owned()], vec!["create".to_owned()]));
        }
    }
    read.sort();
    assert_eq!(read, ["endpointslices", "nodes", "pods", "servicecidrs", "services"]);
}
