//! The manifests in `deploy/` say what Kubernetes understands and the agent takes.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use fairlead::cli::Cli;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Deserialize as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/base")
}

fn documents(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect()
}

/// The files that the kustomization names.
fn resources() -> Vec<Value> {
    let kustomization = documents(&base().join("kustomization.yaml")).remove(0);
    let names = kustomization["resources"].as_array().expect("resources");
    names.iter().flat_map(|name| documents(&base().join(name.as_str().expect("a file's name")))).collect()
}

fn of_kind<T: DeserializeOwned>(kind: &str) -> T {
    let all = resources();
    let found = all.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"));
    serde_json::from_value(found.clone()).unwrap_or_else(|e| panic!("{kind}: {e}"))
}

/// What is in `given` but not in `known`: fields that Kubernetes would refuse or forget.
fn unknown(given: &Value, known: &Value, path: &str, found: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (name, value) in given {
                let path = format!("{path}.{name}");
                match known.get(name) {
                    Some(known) => unknown(value, known, &path, found),
                    None => found.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) if given.len() == known.len() => {
            for (i, (given, known)) in given.iter().zip(known).enumerate() {
                unknown(given, known, &format!("{path}[{i}]"), found);
            }
        }
        _ if given == known => {}
        _ => found.push(format!("{path}: {given}, not {known}")),
    }
}

fn check<T: DeserializeOwned + Serialize>(object: &Value) {
    let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
    let typed: T = serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let known = serde_json::to_value(&typed).expect("JSON");
    let mut found = Vec::new();
    unknown(object, &known, "", &mut found);
    assert!(found.is_empty(), "{name}: unknown: {found:?}");
}

#[test]
fn manifests_have_no_field_that_kubernetes_does_not_know() {
    let resources = resources();
    for object in &resources {
        match object["kind"].as_str() {
            Some("ServiceAccount") => check::<ServiceAccount>(object),
            Some("ClusterRole") => check::<ClusterRole>(object),
            Some("ClusterRoleBinding") => check::<ClusterRoleBinding>(object),
            Some("DaemonSet") => check::<DaemonSet>(object),
            kind => panic!("nothing here checks a {kind:?}"),
        }
    }
    assert_eq!(resources.len(), 4);
}

#[test]
fn the_daemon_set_starts_the_agent_as_its_command_line_wants() {
    let pod = of_kind::<DaemonSet>("DaemonSet").spec.and_then(|spec| spec.template.spec).expect("a pod");
    let args = pod.containers[0].args.clone().expect("arguments");
    if let Err(error) = Cli::try_parse_from(["fairlead".to_owned()].into_iter().chain(args)) {
        panic!("{error}");
    }
    let volumes = pod.volumes.expect("volumes");
    let mounts = pod.containers[0].volume_mounts.clone().expect("mounts");
    let known = |name: &str| volumes.iter().any(|volume| volume.name == name);
    assert!(mounts.iter().all(|mount| known(&mount.name)), "a mount without its volume");
    // What is kept outlives the container.
    assert!(mounts.iter().any(|mount| mount.mount_path == "/var/lib/fairlead"), "no place for the state");
    assert_eq!(pod.host_network, Some(true));
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
