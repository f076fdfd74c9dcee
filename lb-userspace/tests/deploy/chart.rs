//! The chart makes what kustomize makes.

use std::collections::BTreeSet;
use std::fs;

use clap::CommandFactory as _;
use fairlead::cli::Cli;
use fairlead::settings::Settings;
use serde_json::{Value, json};

use super::helm::{chart, dir, render, try_render, values};
use super::{base, check_start, kinds, one, overlay, pod_of, with_monitoring};

/// Settings that are the chart's to give, or that a pod does not use.
const NOT_IN_CONFIG: [&str; 7] = [
    "cgroup-root",
    "healthz-bind-address",
    "kubeconfig",
    "manifests",
    "master",
    "metrics-bind-address",
    "node-name",
];

fn sorted(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(|object| format!("{} {}", object["kind"], object["metadata"]["name"]));
    objects
}

fn assert_same(chart: Vec<Value>, kustomize: Vec<Value>) {
    kinds::check_all(&chart);
    check_start(&chart);
    let (chart, kustomize) = (sorted(chart), sorted(kustomize));
    assert_eq!(chart.len(), kustomize.len());
    for (chart, kustomize) in chart.iter().zip(&kustomize) {
        assert_eq!(chart, kustomize);
    }
}

#[test]
fn by_default_the_chart_is_the_base() {
    assert_same(render(&json!({})), base());
}

#[test]
fn with_everything_on_the_chart_is_the_base_with_monitoring() {
    let on = json!({ "enabled": true });
    let given = json!({
        "metrics": { "bindAddress": "$(HOST_IP)" },
        "serviceMonitor": on, "prometheusRule": on, "dashboard": on, "networkPolicy": on,
    });
    assert_same(render(&given), with_monitoring());
}

#[test]
fn privileged_is_the_privileged_overlay() {
    assert_same(render(&json!({ "privileged": true })), overlay("privileged"));
}

#[test]
fn beside_kube_proxy_is_the_overlay_of_that_name() {
    let given = json!({ "besideKubeProxy": true, "extraArgs": ["--takeover"] });
    assert_same(render(&given), overlay("beside-kube-proxy"));
}

#[test]
fn an_api_server_is_what_overlays_have() {
    let mut objects = render(&json!({ "apiServer": { "host": "127.0.0.1", "port": 6444 } }));
    let set = objects.iter_mut().find(|object| object["kind"] == "DaemonSet").expect("a DaemonSet");
    let template = set["spec"]["template"]["metadata"].as_object_mut().expect("metadata");
    // A pod that runs does not see a ConfigMap change.
    let digest = template.remove("annotations").expect("annotations");
    assert!(digest["checksum/apiserver"].is_string(), "{digest}");
    assert_same(objects, overlay("k3s"));
}

#[test]
fn settings_become_a_file_that_the_agent_reads() {
    let config = json!({ "max-flows": 1_000_000, "device": ["eth0", "eth1"], "log-format": "human" });
    let objects = render(&json!({ "config": config, "extraArgs": ["--takeover"] }));
    kinds::check_all(&objects);
    check_start(&objects);
    let text = one(&objects, "ConfigMap")["data"]["config.yaml"].as_str().expect("a file").to_owned();
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), &text).expect("written");
    let settings = Settings::read(file.path()).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_ne!(settings, Settings::default());
    let container = pod_of(&objects).containers.remove(0);
    let args = container.args.expect("arguments");
    let flags = ["--config=/etc/fairlead/config.yaml", "--takeover"];
    // The file's log format counts.
    assert_eq!(args[1..], ["--cgroup-root=/host/cgroup", flags[0], flags[1]]);
    let mounts = container.volume_mounts.expect("mounts");
    assert!(mounts.iter().any(|mount| mount.mount_path == "/etc/fairlead"), "the file is not mounted");
    let digest = |max: u32| {
        let objects = render(&json!({ "config": { "max-flows": max } }));
        one(&objects, "DaemonSet")["spec"]["template"]["metadata"]["annotations"].clone()
    };
    assert_ne!(digest(1), digest(2), "pods stay when settings change");
}

#[test]
fn what_pods_have_can_be_set() {
    let given = json!({
        "image": { "repository": "example/fairlead", "tag": "7", "pullPolicy": "Always",
            "pullSecrets": [{ "name": "secret" }] },
        "resources": { "limits": { "memory": "1Gi" } },
        "nodeSelector": { "kubernetes.io/os": "linux", "pool": "a" },
        "tolerations": [{ "key": "a", "operator": "Exists" }],
        "podAnnotations": { "a": "b" },
        "podLabels": { "c": "d" },
        "maxUnavailable": 3,
    });
    let objects = render(&given);
    kinds::check_all(&objects);
    let spec = &one(&objects, "DaemonSet")["spec"];
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(container["image"], "example/fairlead:7");
    assert_eq!(container["imagePullPolicy"], "Always");
    assert_eq!(container["resources"]["limits"], json!({ "memory": "1Gi" }));
    assert_eq!(pod["imagePullSecrets"], given["image"]["pullSecrets"]);
    assert_eq!(pod["nodeSelector"], given["nodeSelector"]);
    assert_eq!(pod["tolerations"], given["tolerations"]);
    assert_eq!(spec["template"]["metadata"]["annotations"], given["podAnnotations"]);
    assert_eq!(spec["template"]["metadata"]["labels"]["c"], "d");
    assert_eq!(spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 3);
}

#[test]
fn a_monitor_of_what_nobody_can_ask_is_refused() {
    let error = try_render(&json!({ "serviceMonitor": { "enabled": true } })).expect_err("refused");
    assert!(error.contains("serviceMonitor needs metrics.bindAddress"), "{error}");
}

#[test]
fn the_chart_has_the_version_of_the_agent() {
    let chart = chart();
    assert_eq!((&*chart.api_version, &*chart.type_, &*chart.name), ("v2", "application", "fairlead"));
    assert_eq!(
        (&*chart.version, &*chart.app_version),
        (env!("CARGO_PKG_VERSION"), env!("CARGO_PKG_VERSION"))
    );
    // `appArmorProfile` came with Kubernetes 1.30.
    assert_eq!(chart.kube_version, ">=1.30.0-0");
}

/// Where the schema describes an object field by field, it has the fields of values.yaml and lets no other pass.
fn compare(schema: &Value, values: &Value, path: &str) {
    let Some(properties) = schema["properties"].as_object() else { return };
    assert_eq!(schema["additionalProperties"], false, "{path}");
    let values = values.as_object().unwrap_or_else(|| panic!("{path} is no object"));
    // Helm puts it there if a parent chart has it.
    let described: BTreeSet<&String> = properties.keys().filter(|name| *name != "global").collect();
    assert_eq!(described, values.keys().collect(), "{path}");
    for (name, value) in values {
        compare(&properties[name], value, &format!("{path}.{name}"));
    }
}

#[test]
fn the_schema_knows_every_value_and_every_setting() {
    let text = fs::read_to_string(dir().join("values.schema.json")).expect("values.schema.json");
    let schema: Value = serde_json::from_str(&text).expect("JSON");
    compare(&schema, &values(), "");
    let names = schema["properties"]["config"]["propertyNames"]["enum"].as_array().expect("names");
    let names: BTreeSet<&str> = names.iter().filter_map(Value::as_str).collect();
    let command = Cli::command();
    let run = command.find_subcommand("run").expect("run");
    let settings = run.get_arguments().filter_map(|arg| arg.get_long());
    let settings =
        settings.filter(|name| *name != "config" && *name != "help" && !NOT_IN_CONFIG.contains(name));
    assert_eq!(names, settings.collect());
}

#[test]
fn the_readme_of_the_chart_names_every_value() {
    let text = fs::read_to_string(dir().join("README.md")).expect("README.md");
    let values = values();
    for (name, value) in values.as_object().expect("values") {
        assert!(text.contains(&format!("`{name}")), "{name}");
        if let (Some(fields), false) = (value.as_object(), name == "resources" || name == "nodeSelector") {
            for field in fields.keys() {
                let named = [format!("`{name}.{field}`"), format!("`.{field}`")];
                assert!(named.iter().any(|named| text.contains(named)), "{name}.{field}");
            }
        }
    }
}
