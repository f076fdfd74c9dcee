//! The API server is away when the agent starts.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use crate::node::{Node, eventually, files, get, serve, status};
use lb_double::{Double, NODES, SERVICES, SLICES};

/// In the network namespace of the thread that calls.
fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn service(name: &str, vip: &str, port: u16) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "default" },
        "spec": { "clusterIP": vip, "clusterIPs": [vip], "ports": [{ "name": "p", "port": port }] },
    })
}

fn slice(service: &str, addrs: &[&str], port: u16) -> Value {
    let endpoints: Vec<Value> = addrs.iter().map(|addr| json!({ "addresses": [addr] })).collect();
    json!({
        "addressType": "IPv4",
        "metadata": {
            "name": format!("{service}-x"), "namespace": "default",
            "labels": { "kubernetes.io/service-name": service },
        },
        "ports": [{ "name": "p", "port": port }],
        "endpoints": endpoints,
    })
}

/// The value of a metric without labels.
fn sample(name: &str) -> Option<f64> {
    let (_, text) = get(10249, "/metrics")?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// What a reboot leaves: no link, no program, no map.
fn reboot(node: &Node) {
    let output = node.fairlead(&["cleanup"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(files(&node.pins()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_node_that_reboots_without_its_api_server_serves_what_it_knew() {
    Node::with(|node| {
        let runtime = runtime();
        serve("10.9.0.1:8080", "hello");
        let double = runtime.block_on(Double::at("127.0.0.1:6443", 2));
        double.set(NODES, json!({ "metadata": { "name": "node-a" } }));
        double.set(SERVICES, service("web", "172.30.0.1", 80));
        double.set(SLICES, slice("web", &["10.9.0.1"], 8080));
        double.set(SERVICES, service("old", "172.30.0.2", 80));
        double.set(SLICES, slice("old", &["10.9.0.1"], 8080));
        let file = node.path("kept/state");
        let state = ["--state-file", file.to_str().unwrap()];
        let arguments = [&["--master", "http://127.0.0.1:6443"], &state[..]].concat();
        let agent = node.spawn_following(&arguments);
        eventually("the agent is ready", || status("/readyz") == Some(200));
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"), "{}", agent.log());
        assert_eq!(sample("fairlead_source_stale"), Some(0.0));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        assert!(file.exists(), "it is written at the end");

        reboot(node);
        runtime.block_on(double.go_away());
        let agent = node.spawn_following(&arguments);
        eventually("what was kept is served", || status("/healthz") == Some(200));
        for vip in ["172.30.0.1", "172.30.0.2"] {
            assert_eq!(node.call(vip, 80).as_deref(), Ok("hello"), "{vip}\n{}", agent.log());
        }
        assert_eq!(status("/readyz"), Some(503));
        let (_, body) = get(10256, "/healthz").unwrap();
        assert!(body.contains("staleSince"), "{body}");
        assert_eq!(sample("fairlead_source_stale"), Some(1.0));
        let written = sample("fairlead_state_last_write_timestamp_seconds").unwrap();
        assert!(written > 1.7e9, "{written}");

        // It is back, and half of it is another.
        double.delete(SERVICES, "old");
        double.delete(SLICES, "old-x");
        double.set(SERVICES, service("new", "172.30.0.3", 80));
        double.set(SLICES, slice("new", &["10.9.0.1"], 8080));
        double.forget();
        runtime.block_on(double.come_back());
        eventually("the agent is ready", || status("/readyz") == Some(200));
        assert_eq!(node.call("172.30.0.3", 80).as_deref(), Ok("hello"), "{}", agent.log());
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"), "{}", agent.log());
        let services = node.read("services");
        let of = |vip: &str| services.as_array().unwrap().iter().any(|service| service["address"] == vip);
        assert!(of("172.30.0.3") && !of("172.30.0.2"), "{services}");
        eventually("it is not stale", || sample("fairlead_source_stale") == Some(0.0));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        // Bytes that nobody has written are one line, and no state.
        reboot(node);
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let before = node.spawn_following(&arguments);
        eventually("the agent is ready", || status("/readyz") == Some(200));
        let log = before.log();
        assert_eq!(log.matches("is of no use: it is damaged").count(), 1, "{log}");
        drop(before);
        let output = node.fairlead(&["cleanup", state[0], state[1]]);
        let removed = String::from_utf8(output.stdout).unwrap();
        assert!(removed.contains(&format!("removed state {}", state[1])) && !file.exists(), "{removed}");
    });
}

/// The agent connects to the address of `default/kubernetes`, and translates its own connections.
#[test]
fn an_agent_is_not_cut_off_from_the_api_server_it_reaches_by_a_service() {
    Node::with(|node| {
        let runtime = runtime();
        let double = runtime.block_on(Double::at("10.9.0.1:6443", 2));
        double.set(NODES, json!({ "metadata": { "name": "node-a" } }));
        double.set(SERVICES, service("kubernetes", "172.30.0.1", 443));
        double.set(SLICES, slice("kubernetes", &["10.9.0.1"], 6443));
        let file = node.path("state");
        let state = ["--state-file", file.to_str().unwrap()];
        let agent = node.spawn_following(&[&["--master", "http://10.9.0.1:6443"], &state[..]].concat());
        eventually("the agent is ready", || status("/readyz") == Some(200));
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        // Nothing but what was kept tells where the server is.
        reboot(node);
        let agent = node.spawn_following(&[&["--master", "http://172.30.0.1:443"], &state[..]].concat());
        eventually("the agent is ready", || status("/readyz") == Some(200));
        assert!(agent.log().contains("what was kept is served"), "{}", agent.log());

        // A server that starts anew says at first that it is nowhere.
        double.set(SLICES, slice("kubernetes", &[], 6443));
        eventually("the endpoints are held", || sample("fairlead_apiserver_frontend_held") == Some(1.0));
        runtime.block_on(double.go_away());
        runtime.block_on(double.come_back());
        double.set(SERVICES, service("web", "172.30.0.2", 80));
        let known = || node.read("services").as_array().unwrap().len();
        eventually("the agent hears of another Service", || known() == 2);
        assert_eq!(agent.log().matches("has lost all endpoints").count(), 1, "{}", agent.log());
        double.set(SLICES, slice("kubernetes", &["10.9.0.1"], 6443));
        eventually("nothing is held", || sample("fairlead_apiserver_frontend_held") == Some(0.0));
    });
}
