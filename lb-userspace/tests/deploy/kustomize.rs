//! What `kubectl kustomize` makes of a directory, for the little of it that `deploy/` uses. Anything else is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::documents;

const CLUSTER_WIDE: [&str; 2] = ["ClusterRole", "ClusterRoleBinding"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Kustomization {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    #[serde(default)]
    labels: Vec<Labels>,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    config_map_generator: Vec<ConfigMapGenerator>,
    #[serde(default)]
    patches: Vec<Patch>,
}

/// On the objects alone: selectors stay.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    pairs: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigMapGenerator {
    name: String,
    files: Vec<String>,
    options: GeneratorOptions,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct GeneratorOptions {
    disable_name_suffix_hash: bool,
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    path: Option<String>,
    #[serde(rename = "patch")]
    changes: Option<String>,
    target: Option<Target>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

/// RFC 6902.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    op: String,
    path: String,
    value: Value,
}

/// The objects of a directory.
pub fn build(dir: &Path) -> Vec<Value> {
    build_onto(dir, vec![])
}

/// The objects of a component on top of `objects`, which it may change.
pub fn build_onto(dir: &Path, mut objects: Vec<Value>) -> Vec<Value> {
    let given = documents(&dir.join("kustomization.yaml")).remove(0);
    let given: Kustomization =
        serde_json::from_value(given).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    match &*given.kind {
        "Kustomization" => assert_eq!(given.api_version, "kustomize.config.k8s.io/v1beta1"),
        "Component" => assert_eq!(given.api_version, "kustomize.config.k8s.io/v1alpha1"),
        kind => panic!("{}: {kind}", dir.display()),
    }
    for path in given.resources.iter().map(|name| dir.join(name)) {
        objects.extend(if path.is_dir() { build(&path) } else { documents(&path) });
    }
    for component in &given.components {
        objects = build_onto(&dir.join(component), objects);
    }
    objects.extend(given.config_map_generator.iter().map(|generator| config_map(dir, generator)));
    for patch in &given.patches {
        apply(dir, patch, &mut objects);
    }
    for object in &mut objects {
        if let Some(namespace) = &given.namespace {
            set_namespace(object, namespace);
        }
        for labels in &given.labels {
            merge(object, json!({ "metadata": { "labels": labels.pairs } }));
        }
    }
    objects
}

fn config_map(dir: &Path, generator: &ConfigMapGenerator) -> Value {
    // A name that changes with the contents would have to be changed wherever it is used.
    assert!(generator.options.disable_name_suffix_hash);
    let data: Map<String, Value> = generator
        .files
        .iter()
        .map(|file| {
            let (key, name) = file.split_once('=').expect("KEY=FILE");
            (key.to_owned(), fs::read_to_string(dir.join(name)).expect(name).into())
        })
        .collect();
    let metadata = json!({ "name": generator.name, "labels": generator.options.labels });
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data })
}

fn apply(dir: &Path, patch: &Patch, objects: &mut [Value]) {
    match (&patch.path, &patch.changes, &patch.target) {
        (Some(name), None, None) => {
            let patch = documents(&dir.join(name)).remove(0);
            let of = |object: &&mut Value| {
                ["apiVersion", "kind"].iter().all(|field| object[field] == patch[field])
                    && object["metadata"]["name"] == patch["metadata"]["name"]
            };
            let object = objects.iter_mut().find(of).unwrap_or_else(|| panic!("{name} patches nothing"));
            merge(object, patch);
        }
        (None, Some(text), Some(target)) => {
            let of = |object: &&mut Value| {
                object["kind"] == target.kind && object["metadata"]["name"] == target.name
            };
            let object = objects.iter_mut().find(of).expect("a patch for an object that is there");
            let changes: Vec<Add> = serde_yaml_ng::from_str(text).expect("a list of changes");
            for change in changes {
                add(object, change);
            }
        }
        _ => panic!("{}: a patch is a file, or a text with a target", dir.display()),
    }
}

fn add(object: &mut Value, change: Add) {
    assert_eq!(change.op, "add");
    let (parent, last) = change.path.rsplit_once('/').expect("a path");
    match (object.pointer_mut(parent), last) {
        (Some(Value::Array(items)), "-") => items.push(change.value),
        (Some(Value::Object(fields)), name) => {
            fields.insert(name.to_owned(), change.value);
        }
        _ => panic!("{} is not there", change.path),
    }
}

/// A strategic merge. Lists of objects go by their key, other lists are replaced.
pub fn merge(object: &mut Value, patch: Value) {
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
        (Value::Array(object), Value::Array(patch)) if patch.iter().all(Value::is_object) => {
            for item in patch {
                let key = if item["mountPath"].is_null() { "name" } else { "mountPath" };
                match object.iter_mut().find(|known| known[key] == item[key]) {
                    Some(known) => merge(known, item),
                    None => object.push(item),
                }
            }
        }
        // Nothing is left of the nulls that remove what was not there.
        (object @ Value::Null, patch @ Value::Object(_)) => {
            *object = json!({});
            merge(object, patch);
        }
        (object, patch) => *object = patch,
    }
}

fn set_namespace(object: &mut Value, namespace: &str) {
    let kind = object["kind"].as_str().expect("a kind").to_owned();
    if !CLUSTER_WIDE.contains(&&*kind) {
        object["metadata"]["namespace"] = namespace.into();
    } else if let Some(subjects) = object.get_mut("subjects").and_then(Value::as_array_mut) {
        for subject in subjects {
            subject["namespace"] = namespace.into();
        }
    }
}
