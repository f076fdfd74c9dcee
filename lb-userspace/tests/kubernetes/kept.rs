//! Agents that start with what was kept of an earlier one, while the API server is away, or another when it is back.

use fairlead::health::Freshness;
use fairlead::kept::{Identity, Kept, file};
use k8s_openapi::jiff::Timestamp;

use super::*;

const LIMITS: Limits =
    Limits { services: 100, backends: 100, slots: 1600, addresses: 100, sources: 100, members: 100 };

const A: &str = "172.30.0.1:80/TCP";
const B: &str = "172.30.0.2:80/TCP";
const C: &str = "172.30.0.3:80/TCP";
const D: &str = "172.30.0.4:80/TCP";

async fn with_three_services() -> Double {
    let double = Double::start().await;
    for (name, n) in [("a", 1), ("b", 2), ("c", 3)] {
        double.set(SERVICES, complete(name, n));
        double.set(SLICES, endpoints(name, &[&format!("10.0.0.{n}")]));
    }
    double.set(NODES, node("node-a", "z1"));
    double
}

/// The same through the file.
fn kept(whole: &Whole) -> Objects {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let identity = Identity { node: "node-a".into(), cluster: None };
    let (objects, _) = whole.agent.state().expect("everything is known");
    let written = Kept { identity: identity.clone(), saved: 0, objects };
    file::write(&path, &written).unwrap();
    let read = file::read(&path, &identity).unwrap().unwrap();
    assert_eq!(read, written);
    read.objects
}

impl Whole {
    /// An agent that will not wait for the API server.
    async fn reboot(double: Double, kept: &Objects) -> Self {
        let facts =
            Facts { node_name: "node-a".into(), zone: None, algorithm: Algorithm::Random, mode: None };
        let mut agent = Agent::new(facts, FakeMaps::new(LIMITS), Health::new(true)).unwrap();
        agent.restore(kept, Timestamp::UNIX_EPOCH, Instant::now());
        agent.set_addresses(BTreeMap::new());
        agent.settle(Instant::now());
        Self { world: World::start_with(double, kept).await, agent }
    }

    /// The frontends at this moment.
    fn keys(&mut self) -> Vec<String> {
        self.agent.maps().snapshot().frontends.keys().map(ToString::to_string).collect()
    }

    /// Lets the agent work until it knows all that the server says.
    async fn until_current(&mut self) {
        while self.agent.freshness() != Freshness::Current {
            let event = tokio::time::timeout(PATIENCE, self.world.events.recv()).await;
            self.agent.take(event.expect("everything is listed").unwrap(), Instant::now());
            self.agent.settle(Instant::now());
        }
    }
}

#[tokio::test]
async fn what_was_kept_is_served_without_a_server_and_replaced_where_it_differs() {
    let double = with_three_services().await;
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.until(&[(A, &["10.0.0.1:8080"]), (B, &["10.0.0.2:8080"]), (C, &["10.0.0.3:8080"])]).await;
    whole.until_current().await;
    let kept = kept(&whole);
    drop(whole);

    double.go_away().await;
    let mut whole = Whole::reboot(double.clone(), &kept).await;
    assert_eq!(whole.keys(), [A, B, C]);
    assert_eq!(whole.agent.freshness(), Freshness::Kept(Timestamp::UNIX_EPOCH));
    let before = whole.agent.stats();

    // Half of it is another when it comes back; for a while it shows no slices.
    double.delete(SERVICES, "b");
    double.delete(SLICES, "b-x");
    double.set(SLICES, endpoints("c", &["10.0.0.9"]));
    double.set(SERVICES, complete("d", 4));
    double.be(Mood::Forbidden(Some(SLICES)));
    double.come_back().await;
    let lists = |whole: &Whole| {
        let requests = whole.world.double.requests();
        requests.iter().filter(|(request, _)| request.ends_with("/endpointslices")).count()
    };
    while lists(&whole) < 5 {
        while let Ok(event) = whole.world.events.try_recv() {
            whole.agent.take(event, Instant::now());
            whole.agent.settle(Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((whole.keys(), whole.agent.stats()), ([A, B, C].map(Into::into).to_vec(), before));
    double.be(Mood::Well);
    whole.until(&[(A, &["10.0.0.1:8080"]), (C, &["10.0.0.9:8080"]), (D, &[])]).await;
    whole.until_current().await;
    let after = whole.agent.stats();
    assert_eq!(after.compiled - before.compiled, 2, "c and d");
    assert!(after.ops - before.ops < before.ops, "{after:?} after {before:?}");
}

/// Its versions are lower than those of the agent, and everybody has another UID.
#[tokio::test]
async fn a_server_restored_from_a_backup_is_followed_by_who_runs_and_by_who_starts() {
    let double = with_three_services().await;
    let backup = double.back_up();
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    double.delete(SERVICES, "a");
    double.delete(SLICES, "a-x");
    double.set(SLICES, endpoints("b", &["10.0.0.8"]));
    double.set(SERVICES, complete("d", 4));
    double.set(SLICES, endpoints("d", &["10.0.0.4"]));
    whole.until(&[(B, &["10.0.0.8:8080"]), (C, &["10.0.0.3:8080"]), (D, &["10.0.0.4:8080"])]).await;
    whole.until_current().await;
    whole.world.watching().await;
    let kept = kept(&whole);

    double.restore(backup);
    let mut again = complete("c", 3);
    again["metadata"]["uid"] = "another".into();
    double.set(SERVICES, again);
    let restored: [(&str, &[&str]); 3] =
        [(A, &["10.0.0.1:8080"]), (B, &["10.0.0.2:8080"]), (C, &["10.0.0.3:8080"])];
    whole.until(&restored).await;
    drop(whole);

    let mut whole = Whole::reboot(double.clone(), &kept).await;
    assert_eq!(whole.keys(), [B, C, D]);
    whole.until(&restored).await;
    whole.until_current().await;
    double.set(SLICES, endpoints("a", &["10.0.0.5"]));
    whole.until(&[(A, &["10.0.0.5:8080"]), restored[1], restored[2]]).await;
}

/// An object that cannot be read is not one that is gone.
#[tokio::test]
async fn what_cannot_be_read_stays_as_it_was_kept() {
    let double = with_three_services().await;
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.until(&[(A, &["10.0.0.1:8080"]), (B, &["10.0.0.2:8080"]), (C, &["10.0.0.3:8080"])]).await;
    whole.until_current().await;
    let kept = kept(&whole);
    drop(whole);
    let mut broken = complete("b", 2);
    broken["spec"]["ports"][0]["port"] = "eighty".into();
    double.set(SERVICES, broken);
    double.delete(SERVICES, "c");
    let mut whole = Whole::reboot(double, &kept).await;
    whole.until(&[(A, &["10.0.0.1:8080"]), (B, &["10.0.0.2:8080"])]).await;
}

#[tokio::test]
async fn a_server_that_goes_away_makes_stale_until_it_is_back() {
    let double = with_three_services().await;
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.until_current().await;
    whole.until(&[(A, &["10.0.0.1:8080"]), (B, &["10.0.0.2:8080"]), (C, &["10.0.0.3:8080"])]).await;
    whole.world.watching().await;
    double.go_away().await;
    while whole.agent.freshness() == Freshness::Current {
        let event = tokio::time::timeout(PATIENCE, whole.world.events.recv()).await;
        whole.agent.take(event.expect("it does not answer").unwrap(), Instant::now());
    }
    assert_eq!(whole.keys(), [A, B, C]);
    // The right to Pods, which are done without, has gone meanwhile.
    double.be(Mood::Forbidden(Some(PODS)));
    double.come_back().await;
    let watching = |path: &&str| whole.world.double.watches(path) == 1;
    while ![SERVICES, SLICES, NODES].iter().all(watching) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for path in [SERVICES, SLICES, NODES] {
        double.bookmark(path);
    }
    whole.until_current().await;
}

/// As it is where the agent asks by the address of `default/kubernetes`.
#[tokio::test]
async fn endpoints_of_the_api_server_itself_outlive_a_moment_without() {
    let double = with_three_services().await;
    let mut whole = Whole::start(double.clone(), FakeMaps::new(LIMITS)).await;
    whole.agent.reach_by("172.30.0.1:80".parse().unwrap());
    let [b, c]: [(&str, &[&str]); 2] = [(B, &["10.0.0.2:8080"]), (C, &["10.0.0.3:8080"])];
    whole.until(&[(A, &["10.0.0.1:8080"]), b, c]).await;
    double.set(SLICES, endpoints("a", &[]));
    double.set(SLICES, endpoints("b", &[]));
    whole.until(&[(A, &["10.0.0.1:8080"]), (B, &[]), c]).await;
    double.delete(SLICES, "a-x");
    double.delete(SERVICES, "a");
    double.delete(SERVICES, "b");
    whole.until(&[(A, &["10.0.0.1:8080"]), c]).await;
    assert!(whole.agent.state().is_none());
    double.set(SERVICES, complete("a", 1));
    double.set(SLICES, endpoints("a", &["10.0.0.7", "10.0.0.8"]));
    whole.until(&[(A, &["10.0.0.7:8080", "10.0.0.8:8080"]), c]).await;
    assert!(whole.agent.state().is_some());
}
