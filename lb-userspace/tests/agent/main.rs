//! The agent as a process: manifests in, connections of node processes translated by the loaded programs.
//!
//! Needs root. Every test has a network namespace, a BPF file system and a cgroup of its own.
#![expect(clippy::unwrap_used, reason = "in tests, helpers included, a panic is the report")]

mod kept;
mod node;

use std::collections::BTreeSet;

use fairlead::datapath::Features;
use nix::sys::signal::Signal;
use node::{Node, eventually, fairlead, files, get, serve, status};
use serde_json::{Value, json};

fn service(name: &str, vip: &str, node_port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: NodePort\n  \
         clusterIP: {vip}\n  clusterIPs: [{vip}]\n  ports: [{{port: 80, nodePort: {node_port}}}]\n"
    )
}

fn slice(name: &str, addresses: &[&str]) -> String {
    let endpoints: Vec<String> =
        addresses.iter().map(|addr| format!("{{addresses: [\"{addr}\"], nodeName: node-a}}")).collect();
    let family = if addresses.iter().any(|addr| addr.contains(':')) { "IPv6" } else { "IPv4" };
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{family}\n  \
         labels: {{kubernetes.io/service-name: {name}}}\naddressType: {family}\n\
         ports: [{{name: \"\", port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// What `fairlead services` says of the frontend with this port and kind: its backends.
fn backends(node: &Node, kind: &str) -> Option<Vec<String>> {
    let services = node.read("services");
    let service = services.as_array().unwrap().iter().find(|service| service["kind"] == kind)?;
    let backends = service["internal"]["backends"].as_array().unwrap();
    Some(backends.iter().map(|backend| backend["address"].as_str().unwrap().to_owned()).collect())
}

#[test]
fn manifests_in_connections_translated_and_nothing_left_behind() {
    Node::with(|node| {
        serve("10.9.0.1:8080", "hello");
        node.write("web.yaml", &(service("web", "172.30.0.1", 30_080) + &slice("web", &["10.9.0.1"])));
        node.write("broken.yaml", "kind: [");
        let agent = node.start();
        assert!(agent.log().contains("broken.yaml"), "{}", agent.log());
        assert_eq!(status("/healthz"), Some(200));
        for (addr, port) in [("172.30.0.1", 80), ("127.0.0.1", 30_080), ("10.9.0.1", 30_080)] {
            assert_eq!(node.call(addr, port).as_deref(), Ok("hello"), "{addr}:{port}\n{}", agent.log());
        }
        let manifests = node.path("manifests");
        let explain = |subject| {
            let output = node.fairlead(&[
                "explain",
                subject,
                "--node-name=node-a",
                "-o=json",
                "--manifests",
                manifests.to_str().unwrap(),
            ]);
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        for client in explain("svc/web")["clients"].as_array().unwrap() {
            let expected = json!({ "present": true, "inside": 1, "outside": 1, "agrees": true });
            assert_eq!(client["programmed"], expected, "{client}");
        }
        let refused = |addr: &str, port| node.call(addr, port).unwrap_err();
        // A port of the Service that it does not have.
        // Before 5.18 a program cannot say which error.
        let error = if Features::probe().set_retval { "refused" } else { "not permitted" };
        assert!(refused("172.30.0.1", 8080).contains(error), "{}", refused("172.30.0.1", 8080));

        // No endpoints.
        node.write("web.yaml", &service("web", "172.30.0.1", 30_080));
        eventually("the endpoint is gone", || backends(node, "ClusterIP") == Some(vec![]));
        assert!(refused("172.30.0.1", 80).contains(error), "{}", refused("172.30.0.1", 80));
        // And one again.
        node.write("web.yaml", &(service("web", "172.30.0.1", 30_080) + &slice("web", &["10.9.0.1"])));
        eventually("the endpoint is back", || node.call("172.30.0.1", 80).is_ok());

        assert_eq!(node.read("status")["agent_pid"], agent.pid());
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        assert_eq!(node.read("status")["agent_pid"], Value::Null);
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"));

        assert!(!files(&node.pins()).is_empty());
        let output = node.fairlead(&["cleanup"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(files(&node.pins()), Vec::<std::path::PathBuf>::new());
    });
}

/// The names that docs/metrics.md has.
fn documented() -> BTreeSet<String> {
    let lines = include_str!("../../../docs/metrics.md").lines();
    lines.filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned())).collect()
}

/// The names that are exported.
fn exported(metrics: &str) -> BTreeSet<String> {
    let described = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let total = |(name, kind): (&str, &str)| {
        if kind == "counter" { format!("{name}_total") } else { name.to_owned() }
    };
    described.map(total).collect()
}

/// The value of a sample; `None`: there is no such sample.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(value.parse().unwrap())
}

#[test]
fn metrics_of_what_was_served() {
    let scrape = || get(10249, "/metrics").unwrap().1;
    let connections = "fairlead_service_connections_total{namespace=\"default\",name=\"web\"}";
    Node::with(move |node| {
        serve("10.9.0.1:8080", "hello");
        node.write("web.yaml", &(service("web", "172.30.0.1", 30_080) + &slice("web", &["10.9.0.1"])));
        node.write("empty.yaml", &service("empty", "172.30.0.2", 30_081));
        let agent = node.start();
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"), "{}", agent.log());
        assert!(node.call("172.30.0.2", 80).is_err());
        let metrics = scrape();
        assert_eq!(exported(&metrics), documented(), "{metrics}");
        for (name, value) in [
            (connections, 1.0),
            ("fairlead_service_refused_total{namespace=\"default\",name=\"empty\"}", 1.0),
            ("fairlead_packets_total{hook=\"connect\",reason=\"translated\"}", 1.0),
            ("fairlead_drops_total{reason=\"no_endpoints\"}", 1.0),
            ("fairlead_services", 2.0),
            ("fairlead_frontends", 4.0),
            ("fairlead_map_entries{map=\"SERVICES4\"}", 4.0),
            ("fairlead_map_entries{map=\"BACKENDS4\"}", 1.0),
            ("fairlead_map_capacity{map=\"FLOWS4\"}", 1024.0),
            ("fairlead_metrics_errors_total", 0.0),
            ("kubeproxy_sync_proxy_rules_service_changes_total", 2.0),
            ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
        ] {
            assert_eq!(sample(&metrics, name), Some(value), "{name}\n{metrics}");
        }
        // The counts are in the maps: the next agent goes on with them.
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));
        let agent = node.start();
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"), "{}", agent.log());
        let metrics = scrape();
        assert_eq!(sample(&metrics, connections), Some(2.0), "{metrics}");
        drop(agent);
        let agent = node.spawn(&["--metrics-bind-address="]);
        eventually("the agent is ready", || status("/readyz") == Some(200));
        assert_eq!(get(10249, "/metrics"), None);
        drop(agent);
    });
}

#[test]
fn ipv6_and_dual_stack() {
    Node::with(|node| {
        serve("[fd09::1]:8080", "six");
        serve("10.9.0.1:8080", "four");
        let dual =
            service("web", "172.30.0.1", 30_080).replace("[172.30.0.1]", "[172.30.0.1, \"fd00:30::1\"]");
        node.write("web.yaml", &(dual + &slice("web", &["10.9.0.1"]) + &slice("web", &["fd09::1"])));
        let agent = node.start();
        for (addr, port, text) in [
            ("172.30.0.1", 80, "four"),
            ("fd00:30::1", 80, "six"),
            ("127.0.0.1", 30_080, "four"),
            ("::1", 30_080, "six"),
        ] {
            assert_eq!(node.call(addr, port).as_deref(), Ok(text), "{addr}:{port}\n{}", agent.log());
        }
    });
}

#[test]
fn a_killed_agent_is_not_missed_and_its_successor_repairs_what_changed() {
    Node::with(|node| {
        serve("10.9.0.1:8080", "hello");
        node.write("web.yaml", &(service("web", "172.30.0.1", 30_080) + &slice("web", &["10.9.0.1"])));
        node.write("old.yaml", &service("old", "172.30.0.2", 30_081));
        let agent = node.start();
        // Without who uses them.
        let backends = || {
            let mut backends = node.read("backends");
            for backend in backends.as_array_mut().unwrap() {
                backend.as_object_mut().unwrap().remove("services");
            }
            backends
        };
        let before = backends();
        assert_eq!(agent.end(Signal::SIGKILL), None);
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"));

        node.remove("old.yaml");
        node.write("new.yaml", &(service("new", "172.30.0.3", 30_082) + &slice("new", &["10.9.0.1"])));
        let agent = node.start();
        assert_eq!(node.call("172.30.0.3", 80).as_deref(), Ok("hello"));
        assert_eq!(node.call("172.30.0.1", 80).as_deref(), Ok("hello"));
        let services = node.read("services");
        let addresses: Vec<_> = services.as_array().unwrap().iter().map(|s| s["address"].clone()).collect();
        assert!(!addresses.contains(&"172.30.0.2".into()), "{addresses:?}");
        // What was right is untouched: the backend has its id and generation.
        assert_eq!(backends(), before);
        drop(agent);
    });
}

/// Map operations of the agent that started last, until it was ready.
fn operations(agent: &node::Agent) -> u32 {
    let log = agent.log();
    let ready = log.lines().rfind(|line| line.contains(" ready ")).unwrap();
    ready.rsplit_once("operations=").unwrap().1.trim().parse().unwrap()
}

#[test]
fn a_new_agent_writes_what_has_changed_and_no_more() {
    const SERVICES: u8 = 12;
    Node::with(|node| {
        let text = |n: u8, pods: &[&str]| {
            let name = format!("svc-{n}");
            service(&name, &format!("172.30.0.{n}"), 30_000 + u16::from(n)) + &slice(&name, pods)
        };
        let file = |n| format!("svc-{n}.yaml");
        for n in 1..=SERVICES {
            node.write(&file(n), &text(n, &["10.9.0.1", &format!("10.9.1.{n}")]));
        }
        let agent = node.start();
        assert!(operations(&agent) > 5 * u32::from(SERVICES), "{}", operations(&agent));
        let before = node.read("services");
        assert_eq!(agent.end(Signal::SIGKILL), None);
        let agent = node.start();
        assert_eq!(operations(&agent), 0, "nothing has changed");
        assert_eq!(agent.end(Signal::SIGTERM), Some(0));

        node.remove(&file(1));
        node.write(&file(2), &text(2, &["10.9.0.1"]));
        node.write("svc-13.yaml", &text(13, &["10.9.0.1"]));
        let agent = node.start();
        let written = operations(&agent);
        assert!((10..30).contains(&written), "{written}");
        let of = |services: &Value, n: u8| -> Vec<Value> {
            let name = format!("svc-{n}");
            services.as_array().unwrap().iter().filter(|service| service["name"] == *name).cloned().collect()
        };
        let after = node.read("services");
        assert_eq!([1, 2, 13].map(|n| of(&after, n).len()), [0, 2, 2]);
        for n in 3..=SERVICES {
            assert_eq!(of(&after, n), of(&before, n), "nobody has touched it");
        }

        // The cluster is no more.
        assert_eq!(agent.end(Signal::SIGKILL), None);
        for n in 2..=SERVICES + 1 {
            node.remove(&file(n));
        }
        let agent = node.start();
        assert_eq!(node.read("services").as_array().unwrap().len(), 0);
        eventually("no backend is left", || node.read("backends").as_array().unwrap().is_empty());
        drop(agent);
    });
}

#[test]
fn what_goes_wrong_is_one_line_and_exit_status_1() {
    Node::with(|node| {
        let fails = |arguments: &[&str], text: &str| {
            let output = fairlead().args(arguments).output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
            let last = stderr.lines().last().unwrap();
            assert!(last.starts_with("fairlead: ") && last.contains(text), "{arguments:?}: {stderr}");
        };
        let pins = node.pins();
        let pins = pins.to_str().unwrap();
        let manifests = node.path("manifests");
        let manifests = manifests.to_str().unwrap();
        fails(&["services", "--bpffs", pins], "no datapath under");
        fails(&["run", "--bpffs", pins], "no way to the API server");
        fails(&["run", "--bpffs", pins, "--manifests", "/nowhere"], "--manifests /nowhere: No such file");
        fails(&["run", "--config", "/nowhere"], "--config /nowhere: No such file");
        fails(&["run", "--kubeconfig", "/nowhere"], "kubeconfig /nowhere: ");
        fails(&["run", "--log-level", "x=loud"], "--log-level \"x=loud\"");
        fails(&["run", "--manifests", manifests, "--bpffs", "/tmp/not-a-bpffs"], "not on a BPF file system");
        assert_eq!(files(&node.pins()), Vec::<std::path::PathBuf>::new());

        let agent = node.start();
        // The port is taken, and so is the directory.
        fails(&["run", "--manifests", manifests, "--bpffs", pins], "--healthz-bind-address 0.0.0.0:10256");
        let again = ["run", "--manifests", manifests, "--bpffs", pins, "--healthz-bind-address="];
        fails(&again, "--metrics-bind-address 127.0.0.1:10249");
        fails(&[&again[..], &["--metrics-bind-address="]].concat(), "another agent is running");
        fails(&["cleanup", "--bpffs", pins], "an agent is running");
        drop(agent);
    });
}

#[test]
fn wrong_usage_is_exit_status_2() {
    for arguments in [
        &["run", "--no-such-flag"][..],
        &["run", "--xdp", "fast"],
        &["no-such-command"],
        &["services", "-o", "xml"],
        &["explain"],
        &["flows", "--client", "10.0.0.1:http"],
        &["flows", "--sort", "idle"],
        &["services", "shop/web", "-n", "other"],
    ] {
        let output = fairlead().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    Node::with(|node| {
        let agent = node.start();
        let script = format!(
            "set -o pipefail; {} status --bpffs {} | head -n 1",
            env!("CARGO_BIN_EXE_fairlead"),
            node.pins().display()
        );
        let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for subcommand in ["status", "services", "backends", "flows", "top"] {
            assert!(node.fairlead(&[subcommand]).status.success());
            assert!(!node.read(subcommand).is_null());
        }
        drop(agent);
    });
}
