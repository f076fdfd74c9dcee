//! What is wrong with a Service becomes an Event of it.

use std::time::Duration;

use fairlead::events::{Events, Outcomes};
use serde_json::json;

use crate::*;
use lb_double::Double;

const LIMITS: Limits =
    Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };

async fn start(double: &Double) -> (Whole, Outcomes) {
    let options = Options {
        kubeconfig: None,
        master: Some(format!("http://{}", double.addr)),
        node_name: "node-a".into(),
        all_nodes: false,
    };
    let outcomes = Outcomes::default();
    let events = Events::start(client(&options).await.unwrap(), "node-a", &outcomes);
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.agent.report(events);
    (whole, outcomes)
}

fn count(outcomes: &Outcomes, outcome: &'static str) -> u64 {
    outcomes.family().get_or_create(&[("outcome", outcome)]).get()
}

/// Waits until so many Events have this outcome.
async fn wait_for(outcomes: &Outcomes, outcome: &'static str, expected: u64) {
    let wait = async {
        while count(outcomes, outcome) < expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{outcome}: {}", count(outcomes, outcome)));
}

/// A Service that wants what another has.
fn rival(uid: &str, port: u16) -> Value {
    let mut service = complete("b", 2);
    service["metadata"]["uid"] = uid.into();
    // Namesakes in age: the name decides.
    service["spec"]["externalIPs"] = json!(["172.30.0.1"]);
    service["spec"]["ports"][0]["port"] = port.into();
    service
}

#[tokio::test]
async fn a_lasting_conflict_is_one_event() {
    let double = Double::start().await;
    double.set(SERVICES, complete("a", 1));
    double.set(SERVICES, rival("u-2", 80));
    double.set(NODES, node("node-a", "z1"));
    let (mut whole, outcomes) = start(&double).await;
    let (a, b) = ("172.30.0.1:80/TCP", "172.30.0.2:80/TCP");
    whole.until(&[(a, &[]), (b, &[])]).await;
    wait_for(&outcomes, "sent", 1).await;

    // Everything is listed again, and the Service is compiled again, for other reasons.
    whole.world.watching().await;
    double.be(Mood::GoneInStream);
    double.disconnect();
    double.set(SLICES, endpoints("b", &["10.0.0.2"]));
    whole.until(&[(a, &[]), (b, &["10.0.0.2:8080"])]).await;
    double.be(Mood::Well);

    // Another conflict is another Event, and shows that there was none between.
    double.set(SERVICES, complete("c", 3));
    let mut service = rival("u-2", 80);
    service["spec"]["externalIPs"] = json!(["172.30.0.1", "172.30.0.3", "10.0.0.256"]);
    double.set(SERVICES, service);
    wait_until(&mut whole, &outcomes, 3).await;
    let events = double.created();
    let seen: Vec<_> = events.iter().map(|event| (event["reason"].clone(), event["note"].clone())).collect();
    let taken = |addr: &str, owner: &str| {
        (json!("Taken"), json!(format!("{addr}:80/TCP belongs to Service ns/{owner}; it is left out here")))
    };
    assert_eq!(seen[0], taken("172.30.0.1", "a"), "{seen:?}");
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.iter().any(|(reason, _)| reason == "BadAddress"), "{seen:?}");
    let event = &events[0];
    assert_eq!(event["metadata"]["namespace"], "ns");
    assert!(event["metadata"]["name"].as_str().unwrap().starts_with("b."));
    let regarding =
        json!({ "apiVersion": "v1", "kind": "Service", "namespace": "ns", "name": "b", "uid": "u-2" });
    assert_eq!(event["regarding"], regarding);
    assert_eq!((&event["type"], &event["action"]), (&json!("Warning"), &json!("Serve")));
    assert_eq!(event["reportingController"], "fairlead");
    assert_eq!(event["reportingInstance"], "node-a");
    assert_eq!((count(&outcomes, "dropped"), count(&outcomes, "failed")), (0, 0));
}

/// Lets the agent work until so many Events are sent.
async fn wait_until(whole: &mut Whole, outcomes: &Outcomes, sent: u64) {
    let work = async {
        while count(outcomes, "sent") < sent {
            tokio::select! {
                Some(event) = whole.world.events.recv() => {
                    whole.agent.take(event, Instant::now());
                    whole.agent.settle(Instant::now());
                }
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{}", count(outcomes, "sent")));
}

#[tokio::test]
async fn without_the_right_to_create_events_everything_else_works() {
    let double = Double::start().await;
    double.set(SERVICES, complete("a", 1));
    double.set(NODES, node("node-a", "z1"));
    let (mut whole, outcomes) = start(&double).await;
    let (a, b) = ("172.30.0.1:80/TCP", "172.30.0.2:80/TCP");
    whole.until(&[(a, &[])]).await;
    whole.world.watching().await;
    double.refuse_events(true);
    double.set(SERVICES, rival("u-2", 80));
    whole.until(&[(a, &[]), (b, &[])]).await;
    // It would say the same again, so it is asked once.
    wait_for(&outcomes, "failed", 1).await;
    assert_eq!((double.created().len(), count(&outcomes, "sent")), (0, 0));
    double.refuse_events(false);
    let mut service = rival("u-2", 80);
    service["spec"]["externalIPs"] = json!(["172.30.0.1", "10.0.0.256"]);
    double.set(SERVICES, service);
    wait_until(&mut whole, &outcomes, 1).await;
    assert_eq!(double.created().len(), 1);
    let posts = double.requests().into_iter().filter(|(request, _)| request.starts_with("POST")).count();
    assert_eq!(posts, 2);
}
