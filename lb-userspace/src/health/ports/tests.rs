use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::TIMEOUT;
use super::*;

/// Everything that this process listens on is on an address of its own, so that tests do not meet.
fn address(n: u8) -> IpAddr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high, low, n).into()
}

fn name(name: &str) -> ServiceName {
    ServiceName { namespace: "ns".into(), name: name.into() }
}

#[expect(clippy::unnecessary_wraps, reason = "what `want` takes")]
fn check(port: u16, endpoints: usize) -> Option<HealthCheck> {
    Some(HealthCheck { port, endpoints })
}

struct World {
    ports: HealthPorts,
    health: Health,
    addr: IpAddr,
    now: Instant,
}

impl World {
    fn new(n: u8) -> Self {
        let health = Health::new(true);
        let mut ports = HealthPorts::new(health.clone());
        ports.listen_on(BTreeSet::from([address(n)]));
        Self { ports, health, addr: address(n), now: Instant::now() }
    }

    /// Wants this, and settles.
    fn set(&mut self, wanted: &[(&str, Option<HealthCheck>)]) -> Vec<String> {
        for (service, check) in wanted {
            self.ports.want(&name(service), *check);
        }
        self.pass(Duration::ZERO)
    }

    fn pass(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        self.ports.settle(self.now).iter().map(|name| name.name.to_string()).collect()
    }

    /// Status and the whole answer; `None`: nobody listens.
    async fn ask(&self, port: u16) -> Option<(u16, String)> {
        ask((self.addr, port).into()).await
    }

    async fn status(&self, port: u16) -> Option<u16> {
        self.ask(port).await.map(|(status, _)| status)
    }
}

async fn ask(at: SocketAddr) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(at).await.ok()?;
    stream.write_all(b"GET /any/path HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some((text.split_whitespace().nth(1)?.parse().ok()?, text))
}

/// Rules 98 and 99.
#[tokio::test]
async fn a_load_balancer_hears_how_many_endpoints_there_are() {
    let mut world = World::new(1);
    world.set(&[("a", check(30_001, 0)), ("b", check(30_002, 2))]);
    assert_eq!(world.status(30_001).await, Some(503));
    let (status, text) = world.ask(30_002).await.unwrap();
    assert_eq!(status, 200);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let head = head.to_lowercase();
    for line in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
    ] {
        assert!(head.lines().any(|given| given == line), "{line} is not in {head}");
    }
    let expected =
        r#"{"service":{"namespace":"ns","name":"b"},"localEndpoints":2,"serviceProxyHealthy":true}"#;
    assert_eq!(body, expected);
    world.set(&[("a", check(30_001, 1)), ("b", check(30_002, 0))]);
    assert_eq!((world.status(30_001).await, world.status(30_002).await), (Some(200), Some(503)));
    // A node that is about to go is asked elsewhere (/healthz); an agent that is stuck serves nobody.
    world.health.note_node(Some(true));
    assert_eq!(world.status(30_001).await, Some(200));
    world.health.note_waiting(Instant::now().checked_sub(TIMEOUT).unwrap());
    let (status, text) = world.ask(30_001).await.unwrap();
    assert_eq!(status, 503);
    assert!(text.ends_with(r#""localEndpoints":1,"serviceProxyHealthy":false}"#), "{text}");
}

/// Rule 98.
#[tokio::test]
async fn ports_are_opened_moved_and_closed() {
    let mut world = World::new(2);
    world.set(&[("a", check(30_001, 1))]);
    let mut open = TcpStream::connect((world.addr, 30_001)).await.unwrap();
    world.set(&[("a", check(30_003, 1))]);
    assert_eq!((world.status(30_001).await, world.status(30_003).await), (None, Some(200)));
    // Who was connected is sent away.
    assert_eq!(open.read(&mut [0; 8]).await.unwrap_or(0), 0);
    // In one step: one takes what another gives up, in whichever order they come.
    assert_eq!(world.set(&[("a", check(30_004, 1)), ("b", check(30_003, 0))]), [""; 0]);
    assert_eq!((world.status(30_003).await, world.status(30_004).await), (Some(503), Some(200)));
    assert_eq!(world.set(&[("a", check(30_003, 1)), ("b", check(30_004, 0))]), [""; 0]);
    assert_eq!((world.status(30_003).await, world.status(30_004).await), (Some(200), Some(503)));
    world.set(&[("a", None), ("b", None)]);
    assert_eq!((world.status(30_003).await, world.status(30_004).await), (None, None));
    assert!(world.ports.servers.is_empty() && world.ports.wanted.is_empty());
}

#[tokio::test]
async fn a_port_in_use_is_named_once_and_tried_again() {
    let mut world = World::new(3);
    let other = std::net::TcpListener::bind((world.addr, 30_001)).unwrap();
    assert_eq!(world.set(&[("a", check(30_001, 1)), ("b", check(30_002, 1))]), ["a"]);
    let text = world.ports.finding(&name("a")).unwrap().to_string();
    let expected = format!(
        "healthCheckNodePort: cannot listen on {}:30001 (Address already in use (os error 98)); load balancers get \
         no answer there",
        world.addr
    );
    assert_eq!(text, expected);
    // Nobody else is concerned, and a change of something else is no reason to say it again.
    assert_eq!(world.status(30_002).await, Some(200));
    assert_eq!(world.set(&[("a", check(30_001, 2))]), [""; 0]);
    // Ever less often, but not never.
    let mut pauses = vec![];
    for _ in 0..8 {
        let pause = world.ports.next_retry().unwrap() - world.now;
        pauses.push(pause.as_secs());
        assert_eq!(world.pass(pause), [""; 0]);
    }
    assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60]);
    drop(other);
    assert_eq!(world.pass(RETRY_AT_MOST), ["a"]);
    assert_eq!((world.ports.finding(&name("a")), world.ports.next_retry()), (None, None));
    assert_eq!(world.status(30_001).await, Some(200));
}

#[tokio::test]
async fn two_services_with_one_port_take_turns() {
    let mut world = World::new(4);
    assert_eq!(world.set(&[("a", check(30_001, 1)), ("b", check(30_001, 0))]), ["b"]);
    assert_eq!(world.status(30_001).await, Some(200));
    // At once, not when it would be tried again.
    assert_eq!(world.set(&[("a", None)]), ["b"]);
    assert_eq!(world.status(30_001).await, Some(503));
}

/// Rule 101.
#[tokio::test]
async fn servers_follow_the_addresses_of_the_node() {
    let mut world = World::new(5);
    world.set(&[("a", check(30_001, 1))]);
    let on = async |n| ask((address(n), 30_001).into()).await.map(|(status, _)| status);
    assert_eq!((on(5).await, on(6).await, on(7).await), (Some(200), None, None));
    world.ports.listen_on(BTreeSet::from([address(6), address(7)]));
    world.pass(Duration::ZERO);
    assert_eq!((on(5).await, on(6).await, on(7).await), (None, Some(200), Some(200)));
}

/// The work of a change does not depend on how many Services there are.
#[tokio::test]
async fn a_change_touches_one_server() {
    let mut world = World::new(8);
    for n in 0..300 {
        world.ports.want(&name(&format!("svc{n}")), check(31_000 + n, 1));
    }
    assert_eq!(world.pass(Duration::ZERO), [""; 0]);
    world.ports.want(&name("svc7"), check(31_007, 1));
    assert!(world.ports.changed.is_empty(), "nothing changed");
    world.ports.want(&name("svc7"), check(31_007, 0));
    assert_eq!(world.ports.changed.len(), 1);
    world.pass(Duration::ZERO);
    assert_eq!((world.status(31_007).await, world.status(31_299).await), (Some(503), Some(200)));
}

#[tokio::test]
async fn clients_that_say_nothing_cannot_take_all_places() {
    let mut world = World::new(9);
    world.ports.places = Arc::new(Semaphore::new(3));
    world.set(&[("a", check(30_001, 1)), ("b", check(30_002, 1))]);
    let mut idle = vec![];
    for _ in 0..5 {
        idle.push(TcpStream::connect((world.addr, 30_001)).await.unwrap());
    }
    // The places are taken in the order of the connections.
    for late in &mut idle[3..] {
        assert_eq!(late.read(&mut [0; 8]).await.unwrap_or(0), 0, "sent away");
    }
    assert_eq!(world.status(30_002).await, None, "sent away");
    drop(idle);
    let deadline = Instant::now() + Duration::from_secs(20);
    while world.status(30_002).await != Some(200) {
        assert!(Instant::now() < deadline, "the places are free again");
    }
}
