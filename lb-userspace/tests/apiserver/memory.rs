//! What a large cluster costs. The follower is a process of its own: this program, started once more.

use std::path::PathBuf;
use std::process::Command;

use fairlead::kept::{Identity, Kept, file};
use serde_json::{Value, json};

use super::scenarios::Follower;
use lb_double::{Double, NODES, SERVICES, SLICES};

/// Tells this program to be the follower, and of which API server.
pub(crate) const MASTER: &str = "FAIRLEAD_TEST_MASTER";
const SERVICES_HELD: usize = 10_000;
/// Tells the follower where it keeps what it knows.
const STATE: &str = "FAIRLEAD_TEST_STATE";
/// In KiB; the maps in memory that stand for the kernel's are among it.
const LIMIT: u64 = 128 * 1024;

fn service(n: usize) -> Value {
    // As much as three managers leave.
    let fields: Vec<String> = (0..60).map(|field| format!("f:field-{field}-of-service-{n}")).collect();
    let ip = format!("172.{}.{}.{}", 16 + n / 62_500, n / 250 % 250, n % 250 + 1);
    json!({
        "metadata": {
            "name": format!("service-{n}"), "namespace": "default",
            "managedFields": [{ "manager": "tests", "fieldsV1": { "f:spec": fields } }],
        },
        "spec": { "clusterIP": ip, "ports": [{ "name": "http", "port": 80 }] },
    })
}

fn slice(n: usize) -> Value {
    let endpoint = |e: usize| {
        let n = n * 10 + e;
        json!({
            "addresses": [format!("10.{}.{}.{}", n / 62_500, n / 250 % 250, n % 250 + 1)],
            "nodeName": format!("node-{}", n % 100),
            "conditions": { "ready": true, "serving": true, "terminating": false },
            "targetRef": { "kind": "Pod", "name": format!("service-{n}-pod-{e}"), "namespace": "default" },
        })
    };
    json!({
        "addressType": "IPv4",
        "metadata": {
            "name": format!("service-{n}-x"), "namespace": "default",
            "labels": { "kubernetes.io/service-name": format!("service-{n}") },
        },
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": (0..10).map(endpoint).collect::<Vec<_>>(),
    })
}

/// 10,000 Services with 100,000 endpoints.
pub(crate) async fn of_a_large_cluster_is_bounded() {
    let double = Double::with_pages(200).await;
    double.set(NODES, json!({ "metadata": { "name": "node-a" } }));
    for n in 0..SERVICES_HELD {
        double.set(SERVICES, service(n));
        double.set(SLICES, slice(n));
    }
    let dir = tempfile::tempdir().unwrap();
    // The second begins with what the first has kept.
    for _ in 0..2 {
        let mut follower = Command::new(std::env::current_exe().unwrap());
        follower.env(MASTER, format!("http://{}", double.addr)).env(STATE, dir.path().join("state"));
        let output = tokio::task::spawn_blocking(move || follower.output()).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let kib: u64 = text.trim().parse().unwrap_or_else(|_| panic!("{output:?}"));
        println!("{kib} KiB at most");
        assert!(kib < LIMIT, "{kib} KiB");
    }
}

/// The follower: prints the most memory that it ever had, in KiB.
pub(crate) async fn follow(master: String) {
    let path = PathBuf::from(std::env::var_os(STATE).unwrap());
    let identity = Identity { node: "node-a".into(), cluster: None };
    let mut follower = Follower::start_large(master, file::read(&path, &identity).unwrap()).await;
    follower.until_frontends(SERVICES_HELD as u64).await;
    let objects = follower.state().expect("everything is known");
    file::write(&path, &Kept { identity, saved: 0, objects }).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("{}", peak.trim().trim_end_matches(" kB"));
}
