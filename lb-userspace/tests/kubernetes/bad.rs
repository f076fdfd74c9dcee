//! One bad object never stops another: whatever is in an object, the rest of it and all others are in the maps, and
//! what is wrong is told once, of that object.

use std::net::Ipv4Addr;

use fairlead::events::{Events, Outcomes};
use fairlead::metrics::Metrics;
use serde_json::json;

use crate::*;
use lb_double::Double;

const LIMITS: Limits =
    Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };

/// A Service `name` with the cluster IP `172.30.0.N`, changed by `rest`; its frontends; how much is wrong with it.
struct Bad {
    name: String,
    n: u8,
    rest: Value,
    frontends: Vec<String>,
    wrong: usize,
}

fn bad(name: &str, n: u8, rest: Value, frontends: &[&str], wrong: usize) -> Bad {
    let frontends = frontends.iter().map(|text| (*text).to_owned()).collect();
    Bad { name: name.into(), n, rest, frontends, wrong }
}

fn all_of_them() -> Vec<Bad> {
    let long = "ü".repeat(200);
    vec![
        // Rule 64: nothing is wrong with these.
        bad(
            "zeros",
            10,
            json!({
                "spec": {
                    "type": "LoadBalancer", "clusterIP": "172.030.000.010", "externalIPs": ["203.0.113.007"],
                    "loadBalancerSourceRanges": ["010.000.000.000/008"],
                },
                "status": { "loadBalancer": { "ingress": [{ "ip": "198.51.100.009" }] } },
            }),
            &["172.30.0.10:80/TCP", "198.51.100.9:80/TCP", "203.0.113.7:80/TCP"],
            0,
        ),
        bad(
            "unknown",
            11,
            json!({
                "spec": {
                    "type": "Fancy", "externalTrafficPolicy": "Fancy", "internalTrafficPolicy": "Fancy",
                    "sessionAffinity": "Fancy", "ipFamilies": ["IPv4", "IPv9"],
                    "ports": [{ "name": "http", "port": 80 }, { "name": "x", "port": 81, "protocol": "FANCY" }],
                },
                "status": { "loadBalancer": { "ingress": [{ "ip": "198.51.100.11", "ipMode": "Fancy" }] } },
            }),
            &["172.30.0.11:80/TCP"],
            7,
        ),
        bad(
            "ports",
            12,
            json!({ "spec": { "type": "NodePort", "ports": [
                { "name": "http", "port": 80, "nodePort": 30_012 }, { "name": "zero", "port": 0 },
                { "name": "much", "port": 65_536, "nodePort": 30_013 }, { "name": "less", "port": -1 },
                { "name": "same", "port": 80, "nodePort": 30_012 },
                { "name": "last", "port": 65_535, "nodePort": 70_000 },
            ] } }),
            &["172.30.0.12:80/TCP", "172.30.0.12:65535/TCP", "any IPv4 node address:30012/TCP"],
            // Of two ports the same: at the cluster IP and as a nodePort. The last has no nodePort then.
            7,
        ),
        bad(
            "taken",
            13,
            json!({ "spec": { "externalIPs": ["172.30.0.1", "nonsense"] } }),
            &["172.30.0.13:80/TCP"],
            2,
        ),
        // Rule 156.
        bad(
            "annotated",
            14,
            json!({ "metadata": { "annotations": { "fairlead.io/algorithm": long, "note": long } } }),
            &["172.30.0.14:80/TCP"],
            1,
        ),
        bad(&"n".repeat(300), 15, json!({}), &["172.30.0.15:80/TCP"], 0),
        bad(
            "health",
            16,
            json!({ "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 65_536,
            } }),
            &["172.30.0.16:80/TCP"],
            1,
        ),
    ]
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

impl Bad {
    fn object(&self) -> Value {
        let mut object = complete(&self.name, self.n);
        merge(&mut object, &self.rest);
        object
    }
}

/// Slices of `good-1` that nobody can make anything of; so much is wrong with them.
fn garbage() -> (Vec<Value>, usize) {
    let slice = |name: &str, rest: Value| {
        let mut object = endpoints("good-1", &[]);
        object["metadata"]["name"] = name.into();
        merge(&mut object, &rest);
        object
    };
    let slices = vec![
        slice("fancy", json!({ "addressType": "IPv9", "endpoints": [{ "addresses": ["1.2.3.4"] }] })),
        slice(
            "words",
            json!({ "endpoints": [{ "addresses": ["nonsense"] }, { "addresses": ["127.0.0.1"] }] }),
        ),
        slice(
            "ports",
            json!({ "ports": [{ "name": "http", "port": 0 }, { "name": "http", "port": 65_536 }] }),
        ),
        slice("empty", json!({ "ports": null, "endpoints": [{ "addresses": [] }] })),
        slice("other", json!({ "ports": [{ "name": "http", "port": 1, "protocol": "FANCY" }] })),
        slice(
            "mixed",
            json!({ "endpoints": [{ "addresses": ["fd00::1"] }, { "addresses": ["10.0.0.077"] }] }),
        ),
    ];
    (slices, 6)
}

#[tokio::test]
async fn one_bad_object_never_stops_another() {
    let double = Double::start().await;
    let (slices, mut wrong) = garbage();
    for n in [1, 2, 3] {
        double.set(SERVICES, complete(&format!("good-{n}"), n));
        double.set(SLICES, endpoints(&format!("good-{n}"), &[&format!("10.0.0.{n}")]));
    }
    let mut expected: BTreeSet<String> = [1, 2, 3].map(|n| format!("172.30.0.{n}:80/TCP")).into();
    let all = all_of_them();
    for bad in &all {
        double.set(SERVICES, bad.object());
        double.set(SLICES, endpoints(&bad.name, &["10.0.1.0"]));
        expected.extend(bad.frontends.iter().cloned());
        wrong += bad.wrong;
    }
    for slice in slices {
        double.set(SLICES, slice);
    }
    double.set(NODES, node("node-a", "z1"));

    let options = Options { master: Some(format!("http://{}", double.addr)), ..Options::default() };
    let outcomes = Outcomes::default();
    let metrics = Metrics::new(&Health::new(true));
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.agent.observe(metrics.clone());
    whole.agent.report(Events::start(client(&options).await.unwrap(), "node-a", &outcomes));
    let told = || outcomes.family().get_or_create(&[("outcome", "sent")]).get();
    let frontends = async |whole: &mut Whole, expected: &BTreeSet<String>| {
        let mut seen = BTreeSet::new();
        while seen != *expected {
            let event = tokio::time::timeout(PATIENCE, whole.world.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("{seen:?} instead of {expected:?}")).unwrap();
            whole.agent.take(event, Instant::now());
            whole.agent.settle(Instant::now());
            seen = whole.agent.maps().snapshot().frontends.keys().map(ToString::to_string).collect();
        }
    };
    frontends(&mut whole, &expected).await;
    let found = |metrics: &Metrics| {
        let text = metrics.render().unwrap();
        text.lines()
            .find_map(|line| line.strip_prefix("fairlead_findings "))
            .unwrap()
            .parse::<usize>()
            .unwrap()
    };
    assert_eq!(found(&metrics), wrong);
    let wait = async {
        while told() < wrong as u64 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{} of {wrong}: {outcomes:?}", told()));

    // Nothing is said again, and new objects are served beside them.
    for bad in &all {
        double.set(SLICES, endpoints(&bad.name, &["10.0.1.1"]));
    }
    let mut compiled_again = 0;
    while compiled_again < all.len() {
        let event = tokio::time::timeout(PATIENCE, whole.world.events.recv()).await;
        let event = event.expect("changes of slices").unwrap();
        compiled_again += usize::from(matches!(event, Event::Changed(Change::Slice(_))));
        whole.agent.take(event, Instant::now());
        whole.agent.settle(Instant::now());
    }
    // Events come in their order: when the last one is here, all are.
    let mut late = complete("late", 4);
    late["spec"]["externalIPs"] = json!(["nonsense"]);
    double.set(SERVICES, late);
    expected.insert("172.30.0.4:80/TCP".into());
    frontends(&mut whole, &expected).await;
    let wait = async {
        while double.created().last().is_none_or(|event| event["regarding"]["name"] != "late") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{outcomes:?}"));
    let mut by_service: BTreeMap<String, usize> = BTreeMap::new();
    for event in double.created() {
        *by_service.entry(event["regarding"]["name"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    for bad in all.iter().filter(|bad| bad.wrong > 0) {
        assert_eq!(by_service.remove(&bad.name), Some(bad.wrong), "{}", bad.name);
    }
    assert_eq!(by_service, BTreeMap::from([("good-1".to_owned(), 6), ("late".to_owned(), 1)]));
    assert_eq!(found(&metrics), wrong + 1);
}

/// What no API server lets in is cut or left alone, and said of the object; all others are served.
#[tokio::test]
async fn objects_that_are_too_large_stop_no_other() {
    let double = Double::start().await;
    let limits = Limits { backends: 5000, slots: 1 << 20, addresses: 5000, ..LIMITS };
    let mut whole = Whole::start(double.clone(), FakeMaps::new(limits)).await;
    let metrics = Metrics::new(&Health::new(true));
    whole.agent.observe(metrics.clone());
    let text = "x".repeat(5 << 20);
    let mut annotated = complete("annotated", 5);
    annotated["metadata"]["annotations"] = json!({ "note": text });
    let mut ports = complete("ports", 6);
    ports["spec"]["ports"] = (0..100_000).map(|n| json!({ "name": format!("p{n}"), "port": n })).collect();
    let mut many = endpoints("good-2", &["10.0.0.2"]);
    many["metadata"]["name"] = "many".into();
    many["endpoints"] =
        (0..20_000_u32).map(|n| json!({ "addresses": [Ipv4Addr::from(0x0a01_0000 + n)] })).collect();
    let mut addresses = many.clone();
    addresses["metadata"]["name"] = "addresses".into();
    addresses["endpoints"] = json!([{ "addresses": vec!["10.0.0.9"; 1_000_000] }]);
    let container = json!({ "name": "c", "ports": [{ "containerPort": 1, "hostPort": 81 }] });
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "pod", "namespace": "default" },
        "spec": { "nodeName": "node-a", "containers": vec![container; 100_000] },
        "status": { "podIP": "10.0.0.7" },
    });
    for object in [annotated, ports] {
        double.set(SERVICES, object);
    }
    for object in [many, addresses] {
        double.set(SLICES, object);
    }
    double.set(PODS, pod);
    for n in [1, 2] {
        double.set(SERVICES, complete(&format!("good-{n}"), n));
        double.set(SLICES, endpoints(&format!("good-{n}"), &[&format!("10.0.0.{n}")]));
    }
    double.set(NODES, node("node-a", "z1"));
    let found = |text: &str| -> usize {
        text.lines().find_map(|line| line.strip_prefix("fairlead_findings ")).unwrap().parse().unwrap()
    };
    let served = |whole: &mut Whole| {
        let maps = whole.agent.maps().snapshot();
        let good = ["172.30.0.1:80/TCP", "172.30.0.2:80/TCP"];
        let frontends: BTreeSet<String> = maps.frontends.keys().map(ToString::to_string).collect();
        // The first 1000 of the slice that has too many, and one of each other.
        good.iter().all(|name| frontends.contains(*name)) && maps.backends.len() >= 1002
    };
    // Of Services: annotations. Of slices: addresses, and the number of endpoints. Ports and host ports are too many.
    while !served(&mut whole) || found(&metrics.render().unwrap()) < 5 {
        let event = tokio::time::timeout(PATIENCE, whole.world.events.recv()).await;
        let event = event.unwrap_or_else(|_| panic!("{}", found(&metrics.render().unwrap()))).unwrap();
        whole.agent.take(event, Instant::now());
        whole.agent.settle(Instant::now());
    }
}

/// A server that sends one line without an end fills nothing, and is asked again.
#[tokio::test]
async fn an_answer_without_end_is_broken_off() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let master = Some(format!("http://{}", listener.local_addr().unwrap()));
    let options = Options { kubeconfig: None, master, node_name: "node-a".into(), all_nodes: false };
    let client = fairlead::source::kubernetes::client(&options).await.unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _request = stream.read(&mut [0; 4096]).await.unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1_u64 << 30);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut sent = 0_u64;
        while stream.write_all(&[b'x'; 1 << 14]).await.is_ok() {
            sent += 1 << 14;
        }
        sent
    });
    let request = http::Request::get("/api/v1/services").body(vec![]).unwrap();
    let error = client.request_text(request).await.unwrap_err();
    let mut said = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        said += &error.to_string();
        cause = error.source();
    }
    assert!(said.contains("a line of the answer is longer than 128 MiB"), "{said}");
    drop(client);
    assert!(server.await.unwrap() < 256 << 20);
}
