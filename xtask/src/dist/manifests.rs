//! `deploy/base` as one file, for those who have no kustomize: what `kubectl kustomize deploy/base` makes, for the little
//! of it that the base uses. Anything else in its kustomization is an error.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_yaml_ng::{Deserializer, Mapping, Value};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Kustomization {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    namespace: String,
    labels: Vec<Labels>,
    resources: Vec<String>,
}

/// On the objects alone: selectors stay.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    pairs: BTreeMap<String, String>,
}

/// Kinds that are in no namespace.
const CLUSTER_WIDE: [&str; 2] = ["ClusterRole", "ClusterRoleBinding"];

/// The objects of a directory, as documents of one file.
pub fn render(dir: &Path) -> Result<String> {
    let path = dir.join("kustomization.yaml");
    let kustomization: Kustomization = serde_yaml_ng::from_str(&read(&path)?)
        .with_context(|| format!("{} asks for what is not rendered here", path.display()))?;
    let mut documents = Vec::new();
    for name in &kustomization.resources {
        let path = dir.join(name);
        for document in Deserializer::from_str(&read(&path)?) {
            let mut object =
                Value::deserialize(document).with_context(|| format!("cannot read {}", path.display()))?;
            adapt(&mut object, &kustomization).with_context(|| format!("{} is no object", path.display()))?;
            documents.push(serde_yaml_ng::to_string(&object)?);
        }
    }
    ensure!(!documents.is_empty(), "{} has no objects", dir.display());
    Ok(documents.join("---\n"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn adapt(object: &mut Value, kustomization: &Kustomization) -> Option<()> {
    let kind = object.get("kind")?.as_str()?.to_owned();
    let namespace = Value::from(kustomization.namespace.as_str());
    if CLUSTER_WIDE.contains(&&*kind) {
        for subject in object.get_mut("subjects").and_then(Value::as_sequence_mut).into_iter().flatten() {
            subject.as_mapping_mut()?.insert("namespace".into(), namespace.clone());
        }
    }
    let metadata = object.get_mut("metadata")?.as_mapping_mut()?;
    if !CLUSTER_WIDE.contains(&&*kind) {
        metadata.insert("namespace".into(), namespace);
    }
    let labels = metadata.entry("labels".into()).or_insert_with(|| Mapping::new().into()).as_mapping_mut()?;
    for (name, value) in kustomization.labels.iter().flat_map(|labels| &labels.pairs) {
        labels.insert(name.as_str().into(), value.as_str().into());
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;

    #[test]
    fn the_base_is_rendered_as_kustomize_would() {
        let text = render(&host::workspace().join("deploy/base")).unwrap();
        let objects: Vec<Value> =
            Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap()).collect();
        let kinds: Vec<_> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"]);
        for object in &objects {
            assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/part-of"], "fairlead", "{object:?}");
            let cluster_wide = CLUSTER_WIDE.contains(&object["kind"].as_str().unwrap());
            assert_eq!(object["metadata"].get("namespace").is_none(), cluster_wide, "{object:?}");
        }
        assert_eq!(objects[2]["subjects"][0]["namespace"], "kube-system");
        // Selectors are immutable, and pods are selected by them: they have no new labels.
        assert_eq!(objects[3]["spec"]["selector"]["matchLabels"].as_mapping().unwrap().len(), 1);
    }

    #[test]
    fn what_is_not_rendered_is_an_error() {
        let refused = render(&host::workspace().join("deploy/overlays/kind")).unwrap_err();
        assert!(refused.to_string().contains("asks for what is not rendered here"), "{refused:#}");
    }
}
