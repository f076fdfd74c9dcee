//! `fairlead explain` as people run it: on files, a directory, an API server, and on what the agent kept.
#![expect(clippy::unwrap_used, reason = "in tests, helpers included, a panic is the report")]

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use fairlead::kept::{self, Identity, Kept};
use fairlead::model::Objects;
use fairlead::source::convert;
use serde_json::{Value, json};
use tempfile::TempDir;

fn fairlead(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fairlead"));
    for name in ["NODE_NAME", "KUBECONFIG", "RUST_LOG", "KUBERNETES_SERVICE_HOST"] {
        command.env_remove(name);
    }
    command.arg("explain").args(arguments).args(["--bpffs", "/nowhere"]).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output of a success.
fn well(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.10", "selector": { "app": "web" },
            "ports": [{ "name": "http", "port": 80, "targetPort": "http", "nodePort": 30080 }],
        },
    })
}

fn pod(port_name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "app": "web" } },
        "spec": {
            "nodeName": "node-a",
            "containers": [{ "name": "c", "ports": [{ "name": port_name, "containerPort": 8080 }] }],
        },
        "status": { "podIP": "10.1.0.1", "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

fn slice() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "web-x", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" },
        },
        "ports": [{ "name": "http", "port": 8080 }],
        "endpoints": [{ "addresses": ["10.1.0.1"], "nodeName": "node-a" }],
    })
}

fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-a" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.2" }] },
    })
}

fn list(items: &[Value]) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

fn write(dir: &Path, name: &str, object: &Value) {
    std::fs::write(dir.join(name), serde_yaml_ng::to_string(object).unwrap()).unwrap();
}

#[test]
fn a_directory_of_manifests() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().to_str().unwrap();
    write(dir.path(), "service.yaml", &list(&[service(), slice(), node()]));
    write(dir.path(), "pod.yaml", &pod("http"));
    std::fs::write(dir.path().join("broken.yaml"), "kind: [").unwrap();
    let arguments = ["svc/web", "-n", "shop", "--manifests", path];
    let printed = well(&fairlead(&arguments).output().unwrap());
    let lines: Vec<Vec<&str>> = printed.lines().map(|line| line.split_whitespace().collect()).collect();
    for expected in [
        &["http", "nodePort", "30080", "yes"][..],
        &["http", "port", "80/TCP", "yes"],
        &["http", "targetPort", "http", "yes"],
        &["http", "containerPort", "8080/TCP", "(http)", "yes"],
        &["http", "10.1.0.1:8080", "shop/web-1", "node-a", "ready", "used:", "ready", "used:", "ready"],
        &["ClusterIP", "10.96.0.10:80/TCP", "all", "served:", "1", "endpoint"],
        &["nothing", "is", "wrong", "with", "it"],
    ] {
        assert!(lines.iter().any(|line| line.starts_with(expected)), "{expected:?}\n{printed}");
    }
    assert!(printed.contains("broken.yaml: "), "{printed}");

    let output = fairlead(&[&arguments[..], &["-o", "json"]].concat()).output().unwrap();
    let json: Value = serde_json::from_str(&well(&output)).unwrap();
    assert_eq!(json["service"]["ports"][0]["steps"][2]["value"], "http");
    assert_eq!(json["findings"], json!([]));
    assert_eq!(json["node"], "node-a");
}

#[test]
fn what_kubectl_prints() {
    let objects = list(&[service(), slice(), pod("web"), node()]);
    for printed in [serde_yaml_ng::to_string(&objects).unwrap(), objects.to_string()] {
        let mut command = fairlead(&["192.0.2.2:30080", "-f", "-", "-o", "json"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(printed.as_bytes()).unwrap();
        let json: Value = serde_json::from_str(&well(&child.wait_with_output().unwrap())).unwrap();
        assert_eq!(json["claimants"][0]["name"], "web");
        assert_eq!(json["findings"][0]["code"], "named-port-missing");
        assert_eq!(json["findings"][0]["field"], "spec.ports[0].targetPort");
    }
}

/// What the agent and the API server are told, who are not here to be asked.
#[test]
fn settings_of_node_ports() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), "all.yaml", &list(&[service(), slice(), pod("http"), node()]));
    let codes = |more: &[&str]| {
        let arguments = ["192.0.2.2:30080", "-o", "json", "--manifests", dir.path().to_str().unwrap()];
        let output = fairlead(&[&arguments[..], more].concat()).output().unwrap();
        let json: Value = serde_json::from_str(&well(&output)).unwrap();
        let findings = json["findings"].as_array().unwrap().iter();
        findings.map(|finding| finding["code"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(codes(&[]), [""; 0]);
    assert_eq!(codes(&["--nodeport-addresses", "192.0.2.0/24"]), ["node-port-addresses"]);
    assert_eq!(codes(&["--nodeport-addresses", "primary"]), ["node-port-addresses"]);
    let elsewhere = codes(&["--nodeport-addresses", "198.51.100.0/24,fd00::/8"]);
    assert_eq!(elsewhere, ["node-port-address", "node-port-addresses"]);
    assert_eq!(codes(&["--service-node-port-range", "20000-30079"]), ["node-port-range"]);
    for wrong in [["--nodeport-addresses", "eth0"], ["--service-node-port-range", "2-1"]] {
        let output = fairlead(&[&["svc/web"][..], &wrong].concat()).output().unwrap();
        let error = text(&output.stderr);
        assert!(
            !output.status.success() && error.lines().count() == 1 && error.contains(wrong[1]),
            "{error}"
        );
    }
}

#[test]
fn exit_statuses() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().to_str().unwrap();
    write(dir.path(), "all.yaml", &list(&[service(), node()]));
    let at = |arguments: &[&str]| {
        let output = fairlead(arguments).output().unwrap();
        (output.status.code(), text(&output.stderr))
    };
    for (arguments, said) in [
        (&["svc/none", "--manifests", path][..], "fairlead: there is no Service default/none\n"),
        (&["svc/web", "-f", "/nowhere"], "fairlead: cannot read /nowhere: No such file"),
        (&["svc/web", "--state-file", "/nowhere"], "fairlead: no way to the API server"),
        (&["svc/Web", "--manifests", path], "fairlead: \"Web\" is no name"),
        (&["203.0.113.1:80", "--manifests", path], "fairlead: nobody has 203.0.113.1:80"),
    ] {
        let (status, error) = at(arguments);
        assert_eq!(status, Some(1), "{arguments:?}");
        assert!(error.starts_with(said) && error.lines().count() == 1, "{error}");
    }
    for arguments in [&["web"][..], &["10.0.0.1:80/ICMP"], &["svc/web", "-f", "a", "--manifests", "b"]] {
        assert_eq!(at(arguments).0, Some(2), "{arguments:?}");
    }
}

/// What the double of an API server has, and whether it shows Pods.
struct Store {
    pods: bool,
}

/// Answers lists only, in pages of one object, with label selectors of one label.
async fn answer(
    State(store): State<Arc<Store>>,
    uri: Uri,
    Query(query): Query<Vec<(String, String)>>,
) -> Response {
    let parameter = |name: &str| query.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str());
    let (kind, objects) = match uri.path() {
        "/api/v1/services" => ("ServiceList", vec![service(), other_service()]),
        "/api/v1/nodes" => ("NodeList", vec![node()]),
        "/api/v1/pods" | "/api/v1/namespaces/shop/pods" if !store.pods => {
            let status = json!({ "kind": "Status", "status": "Failure", "code": 403, "message": "no pods",
                                 "reason": "Forbidden" });
            return (StatusCode::FORBIDDEN, Json(status)).into_response();
        }
        // None has a host port.
        "/api/v1/pods" => ("PodList", vec![]),
        "/api/v1/namespaces/shop/pods" => ("PodList", vec![pod("web")]),
        "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices" => ("EndpointSliceList", vec![slice()]),
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    let wanted = parameter("labelSelector").and_then(|selector| selector.split_once('='));
    let objects: Vec<Value> = objects
        .into_iter()
        .filter(|object| wanted.is_none_or(|(key, value)| object["metadata"]["labels"][key] == value))
        .map(|mut object| {
            // As API servers list them.
            object
                .as_object_mut()
                .unwrap()
                .retain(|field, _| !matches!(field.as_str(), "kind" | "apiVersion"));
            object
        })
        .collect();
    let page: usize = parameter("continue").map_or(0, |page| page.parse().unwrap());
    let more = if page + 1 < objects.len() { (page + 1).to_string() } else { String::new() };
    let version = if kind == "EndpointSliceList" { "discovery.k8s.io/v1" } else { "v1" };
    let items: Vec<_> = objects.into_iter().skip(page).take(1).collect();
    Json(json!({ "kind": kind, "apiVersion": version, "metadata": { "continue": more }, "items": items }))
        .into_response()
}

fn other_service() -> Value {
    let mut other = service();
    other["metadata"] =
        json!({ "name": "old", "namespace": "shop", "creationTimestamp": "2020-01-01T00:00:00Z" });
    other["spec"]["clusterIP"] = "10.96.0.11".into();
    other
}

/// What the binary says of `svc/web` with an API server of these objects.
fn asked(pods: bool) -> Value {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let addr: SocketAddr = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Arc::new(Store { pods }));
        tokio::spawn(async move { serve(listener, router).await });
        addr
    });
    let master = format!("http://{addr}");
    let arguments = ["svc/web", "-n", "shop", "--master", &master, "--node-name", "node-a", "-o", "json"];
    serde_json::from_str(&well(&fairlead(&arguments).output().unwrap())).unwrap()
}

async fn serve(listener: tokio::net::TcpListener, router: Router) {
    use hyper_util::rt::TokioIo;
    use hyper_util::service::TowerToHyperService;

    while let Ok((stream, _)) = listener.accept().await {
        let service = TowerToHyperService::new(router.clone());
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

fn codes(json: &Value) -> Vec<&str> {
    json["findings"].as_array().unwrap().iter().filter_map(|finding| finding["code"].as_str()).collect()
}

#[test]
fn an_api_server() {
    let json = asked(true);
    assert_eq!(json["source"], "the API server");
    assert_eq!(codes(&json), ["named-port-missing", "taken"]);
    assert_eq!(json["service"]["pods"], 1);
    assert_eq!(json["service"]["ports"][0]["endpoints"][0]["address"], "10.1.0.1");
    assert_eq!(json["notes"], json!([]));
}

#[test]
fn an_api_server_that_shows_no_pods() {
    let json = asked(false);
    assert_eq!(codes(&json), ["taken"]);
    assert_eq!(json["service"]["pods"], Value::Null);
    assert!(json["notes"][0].as_str().unwrap().contains("no pods"), "{json}");
}

#[test]
fn what_the_agent_kept_when_the_api_server_is_away() {
    let dir = TempDir::new().unwrap();
    let state = dir.path().join("state");
    let read = |object| serde_json::from_value(object).unwrap();
    let objects = Objects {
        services: vec![convert::service(read(service())).into()],
        slices: vec![convert::slice(serde_json::from_value(slice()).unwrap()).into()],
        node: Some(convert::node(serde_json::from_value(node()).unwrap())),
        ..Objects::default()
    };
    let identity = Identity { node: "node-a".into(), cluster: None };
    kept::file::write(&state, &Kept { identity, saved: 1_767_225_600, objects }).unwrap();
    let state = state.to_str().unwrap();
    let arguments = ["svc/web", "-n", "shop", "--master", "http://127.0.0.1:1", "--state-file", state];
    let printed = well(&fairlead(&arguments).output().unwrap());
    assert!(printed.contains("what the agent kept at 2026-01-01T00:00:00Z"), "{printed}");
    assert!(printed.contains("10.1.0.1:8080") && printed.contains("as node node-a has it"), "{printed}");
}
