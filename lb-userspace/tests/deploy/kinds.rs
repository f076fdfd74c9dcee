//! Objects as their kinds have them: with a field that nobody knows, they are refused.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Of the Prometheus Operator, as far as it is used here.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ServiceMonitor {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: ServiceMonitorSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ServiceMonitorSpec {
    job_label: String,
    selector: LabelSelector,
    endpoints: Vec<MonitorEndpoint>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MonitorEndpoint {
    port: String,
    interval: String,
    relabelings: Vec<Relabeling>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Relabeling {
    source_labels: Vec<String>,
    target_label: String,
}

/// Of the Prometheus Operator.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PrometheusRule {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    pub spec: PrometheusRuleSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrometheusRuleSpec {
    pub groups: Vec<RuleGroup>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleGroup {
    name: String,
    pub rules: Vec<Alert>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alert {
    #[serde(rename = "alert")]
    pub name: String,
    pub expr: String,
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub lasting: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

/// The object as a value of its kind.
pub fn typed<T: DeserializeOwned>(object: &Value) -> T {
    let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
    serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Every object has a kind that is known here, and no field that its kind has not.
pub fn check_all(objects: &[Value]) {
    assert!(!objects.is_empty());
    for object in objects {
        match object["kind"].as_str() {
            Some("ServiceAccount") => check::<ServiceAccount>(object),
            Some("ClusterRole") => check::<ClusterRole>(object),
            Some("ClusterRoleBinding") => check::<ClusterRoleBinding>(object),
            Some("DaemonSet") => check::<DaemonSet>(object),
            Some("ConfigMap") => check::<ConfigMap>(object),
            Some("Service") => check::<Service>(object),
            Some("NetworkPolicy") => check::<NetworkPolicy>(object),
            Some("ServiceMonitor") => check::<ServiceMonitor>(object),
            Some("PrometheusRule") => check::<PrometheusRule>(object),
            kind => panic!("nothing here checks a {kind:?}"),
        }
    }
}

pub fn check<T: DeserializeOwned + Serialize>(object: &Value) {
    let known = serde_json::to_value(typed::<T>(object)).expect("JSON");
    let mut found = Vec::new();
    unknown(object, &known, "", &mut found);
    assert!(found.is_empty(), "{} {}: unknown: {found:?}", object["kind"], object["metadata"]["name"]);
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
