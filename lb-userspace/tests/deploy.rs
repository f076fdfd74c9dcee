//! The manifests in `deploy/` say what Kubernetes understands and the agent takes.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use fairlead::cli::Cli;
use fairlead::sys::capabilities::{BEFORE_5_11, NEEDED};
use fairlead::sys::sysctl;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Deserialize as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn base() -> PathBuf {
    deploy().join("base")
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
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

/// The DaemonSet of an overlay: that of the base with the patches that the overlay's kustomization names.
fn overlay(name: &str) -> Value {
    let dir = deploy().join("overlays").join(name);
    let kustomization = documents(&dir.join("kustomization.yaml")).remove(0);
    assert_eq!(kustomization["resources"], serde_json::json!(["../../base"]));
    let mut object =
        resources().into_iter().find(|object| object["kind"] == "DaemonSet").expect("a DaemonSet");
    for patch in kustomization["patches"].as_array().expect("patches") {
        let patch = documents(&dir.join(patch["path"].as_str().expect("a file's name"))).remove(0);
        for field in ["kind", "apiVersion", "metadata"] {
            let known = &object[field];
            let meant = patch[field].as_object().map_or(&patch[field] == known, |names| {
                names.iter().all(|(name, value)| &known[name] == value)
            });
            assert!(meant, "a patch for another {field}: {}", patch[field]);
        }
        merge(&mut object, patch);
    }
    object
}

/// A strategic merge, for what the overlays use of it.
fn merge(object: &mut Value, patch: Value) {
    match (object, patch) {
        (Value::Object(object), Value::Object(patch)) => {
            for (name, value) in patch {
                if value.is_null() {
                    object.remove(&name);
                } else {
                    merge(object.entry(name).or_insert(Value::Null), value);
                }
            }
        }
        (Value::Array(object), Value::Array(patch)) => {
            for item in patch {
                let key = if item["mountPath"].is_null() { "name" } else { "mountPath" };
                match object.iter_mut().find(|known| known[key] == item[key]) {
                    Some(known) => merge(known, item),
                    None => object.push(item),
                }
            }
        }
        (object, patch) => *object = patch,
    }
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

fn pod(daemon_set: DaemonSet) -> PodSpec {
    daemon_set.spec.and_then(|spec| spec.template.spec).expect("a pod")
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
    let explained = fs::read_to_string(deploy().join("../docs/security.md")).expect("docs/security.md");
    for name in needed.iter().map(String::as_str).chain([BEFORE_5_11]) {
        assert!(explained.contains(&format!("`CAP_{name}`")), "docs/security.md does not explain {name}");
    }
    for word in explained.split('`').filter(|word| word.starts_with("CAP_")) {
        let name = &word["CAP_".len()..];
        assert!(needed.iter().any(|needed| needed == name) || name == BEFORE_5_11, "{word} is not needed");
    }
}

#[test]
fn the_privileged_overlay_is_valid() {
    let object = overlay("privileged");
    check::<DaemonSet>(&object);
    let pod = pod(serde_json::from_value(object).expect("a DaemonSet"));
    let volumes = self::pod(of_kind("DaemonSet")).volumes.map(|volumes| volumes.len());
    assert_eq!((pod.containers.len(), pod.volumes.map(|volumes| volumes.len())), (1, volumes));
    let container = &pod.containers[0];
    let context = container.security_context.clone().expect("a security context");
    assert_eq!((context.privileged, context.read_only_root_filesystem), (Some(true), Some(true)));
    // The API server refuses the contrary of `privileged` beside it.
    assert_eq!((context.allow_privilege_escalation, context.capabilities), (None, None));
    let mounts = container.volume_mounts.clone().expect("mounts");
    let bpffs = mounts.iter().find(|mount| mount.mount_path == "/sys/fs/bpf").expect("bpffs");
    assert_eq!(bpffs.mount_propagation.as_deref(), Some("Bidirectional"));
}

#[test]
fn the_daemon_set_starts_the_agent_as_its_command_line_wants() {
    let pod = pod(of_kind("DaemonSet"));
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
