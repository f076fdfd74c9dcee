//! API servers that break off, forget, refuse, hang, say nonsense and go away.

use std::io;
use std::sync::{Arc, Mutex};

use fairlead::source::Kind;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use super::*;

/// Log lines of this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone());
        let subscriber = subscriber.with_env_filter("off,fairlead=info").finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines_with(&self, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

impl World {
    fn lists(&self) -> usize {
        let requests = self.double.requests();
        requests.iter().filter(|(_, parameters)| !parameters.contains_key("watch")).count()
    }

    /// Versions that Services were watched from.
    fn watched_from(&self) -> Vec<u64> {
        let requests = self.double.requests();
        let of_services = requests.iter().filter(|(request, _)| request.ends_with("/services"));
        let watches = of_services.filter(|(_, parameters)| parameters.contains_key("watch"));
        watches.map(|(_, parameters)| parameters["resourceVersion"].parse().unwrap()).collect()
    }

    /// Like [`World::expect`], but refusals of Pods may come as often as they are asked for.
    async fn expect_after_refusals(&mut self, expected: &[&str]) {
        let mut left: BTreeSet<&str> = expected.iter().copied().collect();
        while !left.is_empty() {
            let event = tokio::time::timeout(self.patience, self.next()).await;
            let event = show(&event.unwrap_or_else(|_| panic!("{left:?} did not come")));
            assert!(left.remove(&*event) || event == "refused Pods", "{event} came, of {left:?}");
        }
    }

    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let wait = async {
            while !done(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(self.patience, wait).await.unwrap_or_else(|_| panic!("{what} did not come"));
    }
}

async fn with_a_service() -> World {
    let double = Double::start().await;
    double.set(SERVICES, service("a", 1));
    let mut world = World::start(double).await;
    world.listed(&["a:1"]).await;
    world
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_where_it_was() {
    let mut world = with_a_service().await;
    let before = world.lists();
    world.double.disconnect();
    world.double.set(SERVICES, service("a", 2));
    world.double.delete(SERVICES, "a");
    world.double.set(SERVICES, service("b", 1));
    world.expect(&["a:2", "-a", "b:1"]).await;
    world.watching().await;
    // In the middle of a line.
    world.double.break_off(SERVICES, service("b", 2));
    world.expect(&["b:2"]).await;
    world.watching().await;
    // With a reset.
    world.double.go_away().await;
    world.double.set(SERVICES, service("b", 3));
    world.double.delete(SERVICES, "b");
    world.double.come_back().await;
    world.expect(&["b:3", "-b"]).await;
    world.watching().await;
    assert_eq!(world.lists(), before, "nothing is listed again");
}

#[tokio::test]
async fn a_line_may_come_byte_by_byte() {
    let mut world = with_a_service().await;
    world.double.dribble(SERVICES, service("a", 2)).await;
    world.expect(&["a:2"]).await;
}

#[tokio::test]
async fn bookmarks_are_where_a_watch_goes_on() {
    let mut world = with_a_service().await;
    // Not for us, and so nothing but the bookmark tells of it.
    let mut headless = service("b", 1);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
    world.double.set(SERVICES, headless);
    for path in [SERVICES, SLICES, PODS, NODES] {
        world.double.bookmark(path);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = world.lists();
    world.double.forget();
    world.double.disconnect();
    world.double.set(SERVICES, service("a", 2));
    world.expect(&["a:2"]).await;
    world.watching().await;
    assert_eq!(world.watched_from(), [1, 2]);
    assert_eq!(world.lists(), before, "nothing is listed again");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_takes_requests_and_never_answers_is_asked_again() {
    let double = Double::start().await;
    double.set(SERVICES, service("a", 1));
    double.be(Mood::Hanging);
    let mut world = World::start_patiently(double).await;
    world.until("a second request for each", |world| world.double.requests().len() >= 8).await;
    world.double.be(Mood::Well);
    world.listed(&["a:1"]).await;
    // Watches that are only silent are asked for again, too, and nothing is lost.
    let before = (world.watched_from().len(), world.lists());
    world.until("another watch", |world| world.watched_from().len() > before.0).await;
    assert_eq!(world.lists(), before.1, "nothing is listed again");
    world.double.set(SERVICES, service("a", 2));
    world.expect(&["a:2"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_every_watch_at_once_is_not_flooded() {
    let (log, _guard) = Log::start();
    let double = Double::start().await;
    double.set(SERVICES, service("a", 1));
    double.be(Mood::Brief);
    let mut world = World::start_patiently(double).await;
    let listed = ["listed Services", "listed EndpointSlices", "listed Pods", "listed Nodes"];
    world.expect(&[&["a:1"], &listed[..]].concat()).await;
    tokio::time::sleep(Duration::from_mins(5)).await;
    let watches = world.watched_from().len();
    assert!((5..40).contains(&watches), "{watches}");
    assert_eq!(log.lines_with("ends every watch at once").len(), 4, "one for each kind");
    world.double.be(Mood::Well);
    world.watching().await;
    world.double.set(SERVICES, service("a", 2));
    world.expect(&["a:2"]).await;
}

#[tokio::test(start_paused = true)]
async fn away_for_an_hour_and_back_with_half_of_it_changed() {
    let double = Double::start().await;
    for name in ["a", "b", "c", "d"] {
        double.set(SERVICES, service(name, 1));
        double.set(SLICES, slice(name));
    }
    double.set(NODES, node("node-a", "z1"));
    let mut world = World::start_patiently(double).await;
    let slices = ["slice a", "slice b", "slice c", "slice d"];
    world.listed(&[&["a:1", "b:1", "c:1", "d:1", "node node-a z1"], &slices[..]].concat()).await;
    world.double.go_away().await;
    tokio::time::sleep(Duration::from_hours(1)).await;
    while let Ok(event) = world.events.try_recv() {
        assert!(matches!(event, Event::Answers(_, false)), "nothing changed that we know of: {event:?}");
    }
    world.double.delete(SERVICES, "a");
    world.double.delete(SLICES, "a");
    world.double.set(SERVICES, service("b", 2));
    world.double.set(SERVICES, service("e", 1));
    world.double.forget();
    let back = tokio::time::Instant::now();
    world.double.come_back().await;
    let changed = ["b:2", "c:1", "d:1", "e:1", "-a", "node node-a z1", "slice b", "slice c", "slice d"];
    world.listed(&[&changed[..], &["-slice a"]].concat()).await;
    assert!(back.elapsed() < Duration::from_mins(2), "{:?}", back.elapsed());
}

async fn relists(mood: Mood) {
    let double = Double::start().await;
    for (name, port) in [("a", 1), ("b", 1), ("c", 1)] {
        double.set(SERVICES, service(name, port));
    }
    double.set(SLICES, slice("s"));
    double.set(NODES, node("node-a", "z1"));
    let mut world = World::start(double).await;
    world.listed(&["a:1", "b:1", "c:1", "slice s", "node node-a z1"]).await;
    world.double.be(mood);
    world.double.disconnect();
    // It is gone for good: nobody will be told of these one by one.
    world.double.delete(SERVICES, "b");
    world.double.set(SERVICES, service("a", 2));
    world.double.delete(SLICES, "s");
    let (mut b, mut s) = (false, false);
    while !(b && s) {
        let event = tokio::time::timeout(PATIENCE, world.events.recv()).await.unwrap().unwrap();
        match show(&event).as_str() {
            "-b" => b = true,
            "-slice s" => s = true,
            "b:1" | "slice s" => panic!("it is not there any more"),
            _ => {}
        }
    }
    world.double.be(Mood::Well);
    world.watching().await;
    world.double.set(SERVICES, service("after", 1));
    loop {
        let event = tokio::time::timeout(PATIENCE, world.events.recv()).await.unwrap().unwrap();
        let text = show(&event);
        assert!(!text.starts_with('-'), "{text}: everything else is still there");
        if text == "after:1" {
            break;
        }
    }
}

#[tokio::test]
async fn a_server_that_was_restored_from_a_backup_means_another_list() {
    relists(Mood::Restored).await;
}

#[tokio::test]
async fn history_gone_within_a_watch_means_another_list() {
    relists(Mood::GoneInStream).await;
}

#[tokio::test]
async fn history_gone_before_a_watch_means_another_list() {
    relists(Mood::GoneAtStart).await;
}

#[tokio::test]
async fn a_refusal_of_one_kind_is_said_once_with_what_is_missing_and_stops_no_other() {
    let (log, _guard) = Log::start();
    let double = Double::start().await;
    double.be(Mood::Forbidden(Some(SLICES)));
    double.set(SERVICES, service("a", 1));
    double.set(SLICES, slice("s"));
    let mut world = World::start(double).await;
    world.expect(&["a:1", "listed Services", "listed Pods", "listed Nodes"]).await;
    world.double.set(SERVICES, service("a", 2));
    world.expect(&["a:2"]).await;
    let refused = |world: &World| {
        world.double.requests().iter().filter(|(request, _)| request.ends_with("/endpointslices")).count()
    };
    world.until("more requests", |world| refused(world) > 5).await;
    let lines = log.lines_with("does not let us read");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let rule =
        "apiGroups: [\"discovery.k8s.io\"], resources: [\"endpointslices\"], verbs: [\"list\", \"watch\"]";
    assert!(lines[0].contains("EndpointSlices") && lines[0].contains(rule), "{lines:?}");
    world.double.be(Mood::Well);
    world.expect(&["slice s", "listed EndpointSlices"]).await;
    assert_eq!(log.lines_with("answers again").len(), 1);
}

#[tokio::test]
async fn a_refusal_of_everything_is_asked_again() {
    let (log, _guard) = Log::start();
    let double = Double::start().await;
    double.set(SERVICES, service("a", 1));
    double.be(Mood::Unauthorized);
    let mut world = World::start(double).await;
    world.until("more requests", |world| world.double.requests().len() > 12).await;
    while let Ok(event) = world.events.try_recv() {
        let without = event == Event::Refused(Kind::Pods);
        assert!(without || matches!(event, Event::Answers(..)), "nothing is listed: {event:?}");
    }
    assert_eq!(log.lines_with("is the token or certificate still valid?").len(), 4, "one for each kind");
    world.double.be(Mood::Well);
    world
        .expect_after_refusals(&[
            "a:1",
            "listed Services",
            "listed Pods",
            "listed EndpointSlices",
            "listed Nodes",
        ])
        .await;
}

#[tokio::test]
async fn a_refusal_of_pods_is_said_with_what_is_missing_and_what_it_means() {
    let (log, _guard) = Log::start();
    let double = Double::start().await;
    double.be(Mood::Forbidden(Some(PODS)));
    double.set(PODS, pod("a", "node-a", 80));
    let mut world = World::start(double).await;
    let others = ["listed Services", "listed EndpointSlices", "listed Nodes", "refused Pods"];
    world.expect_after_refusals(&others).await;
    let lines = log.lines_with("does not let us read");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let rule = "apiGroups: [\"\"], resources: [\"pods\"], verbs: [\"list\", \"watch\"]";
    let meaning = "Services are served all the same, but no new host ports";
    assert!(lines[0].contains(rule) && lines[0].contains(meaning), "{lines:?}");
    world.double.be(Mood::Well);
    world.expect_after_refusals(&["pod a 1", "listed Pods"]).await;
}

#[tokio::test]
async fn the_token_is_read_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    let double = Double::start().await;
    double.demand("let-me-in");
    double.set(SERVICES, service("a", 1));
    std::fs::write(&token, "let-me-in").unwrap();
    let config = json!({
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", double.addr) } }],
        "users": [{ "name": "u", "user": { "tokenFile": token } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let options = Options { kubeconfig: Some(kubeconfig), ..Options::default() };
    let client = client(&options).await.unwrap();
    let (sender, events) = mpsc::channel(CHANNEL);
    let tasks = follow_with(&client, OURS, &sender, &Objects::default(), || Box::new(Impatient));
    World { double, events, tasks, patience: PATIENCE }.listed(&["a:1"]).await;
}

#[tokio::test]
async fn an_object_that_cannot_be_read_stops_no_other() {
    let (log, _guard) = Log::start();
    let double = Double::start().await;
    let mut broken = service("b", 1);
    broken["spec"]["ports"][0]["port"] = "eighty".into();
    for object in [service("a", 1), broken.clone(), service("c", 1)] {
        double.set(SERVICES, object);
    }
    let mut world = World::start(double).await;
    world.listed(&["a:1", "1 unreadable Services", "c:1"]).await;
    let lines = log.lines_with("cannot be read");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("ns/b") && lines[0].contains("eighty"), "{lines:?}");

    // Within a watch, and what was known of it stays.
    let mut label = slice("s");
    label["metadata"]["labels"] = 7.into();
    world.double.set(SLICES, slice("s"));
    world.double.set(SLICES, label);
    let mut changed = broken.clone();
    changed["spec"]["clusterIP"] = json!([1]);
    world.double.set(SERVICES, changed);
    world.double.set(SERVICES, service("d", 1));
    world.expect(&["slice s", "1 unreadable EndpointSlices", "d:1"]).await;
    let listed = world.lists();
    world.double.set(SERVICES, service("b", 2));
    world.double.set(SERVICES, broken);
    world.double.delete(SERVICES, "b");
    world.double.delete(SLICES, "s");
    let b = ["0 unreadable Services", "b:2", "1 unreadable Services", "0 unreadable Services", "-b"];
    world.expect(&[&b[..], &["0 unreadable EndpointSlices", "-slice s"]].concat()).await;
    assert_eq!(world.lists(), listed, "nothing is listed again");
}

/// Rules 119 and 120.
#[tokio::test]
async fn labels_that_make_an_object_somebody_elses_come_and_go() {
    let double = Double::start().await;
    double.set(SERVICES, service("a", 1));
    double.set(SLICES, slice("s"));
    let mut world = World::start(double).await;
    world.listed(&["a:1", "slice s"]).await;
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        for (path, object) in [(SERVICES, service("a", 1)), (SLICES, slice("s"))] {
            let mut labelled = object.clone();
            labelled["metadata"]["labels"][label] = "other".into();
            world.double.set(path, labelled);
            world.double.set(path, object);
        }
        world.expect(&["-a", "a:1", "-slice s", "slice s"]).await;
    }
}
