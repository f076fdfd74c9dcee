//! `/healthz`, `/livez` and `/readyz`, with kube-proxy's meaning.
//!
//! `healthz`: what Kubernetes says is in the maps, and this node is not on its way out; load balancers ask
//! for it. `livez`: the agent makes progress. `readyz`: everything has been in the maps once, and is. An agent that serves
//! what was kept of an earlier one is healthy and not ready: it answers connections, and cannot tell whether it works.

mod ports;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use k8s_openapi::jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

pub use self::ports::HealthPorts;

/// How long a change may wait before the agent counts as ill.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Browsers take the answer for what it says it is.
const NOSNIFF: [(header::HeaderName, &str); 1] = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

/// Connections at a time to one address; a new one takes the place of the oldest.
const CONNECTIONS: usize = 64;

/// How long a client may take for its request, and how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one connection may last.
const CONNECTION_TIMEOUT: Duration = Duration::from_mins(2);

/// Bytes of a request's headers.
const HEADER_BYTES: usize = 16 * 1024;

/// How the agent is, as it says itself.
#[derive(Clone, Debug, Default)]
pub struct Health {
    facts: Arc<Mutex<Facts>>,
    answers: Answers,
}

/// How often was answered what, by the label `code`.
#[derive(Clone, Debug)]
pub struct Answers {
    pub healthz: Family<[(&'static str, &'static str); 1], Counter>,
    pub livez: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Default for Answers {
    fn default() -> Self {
        let family = || {
            let family = Family::<[(&'static str, &'static str); 1], Counter>::default();
            for well in [true, false] {
                drop(family.get_or_create(&[("code", code(well))]));
            }
            family
        };
        Self { healthz: family(), livez: family() }
    }
}

fn code(well: bool) -> &'static str {
    if well { "200" } else { "503" }
}

#[derive(Debug, Default)]
struct Facts {
    /// Everything has been in the maps once.
    synced: bool,
    /// Since when something waits to be written.
    waiting: Option<Instant>,
    /// The last time that nothing was left to write.
    updated: Option<Timestamp>,
    /// This node is about to go; `None`: no Node object.
    leaving: Option<bool>,
    /// Without a Node object this node does not count as one.
    needs_node: bool,
    freshness: Freshness,
}

/// How old what is served may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Freshness {
    #[default]
    Current,
    /// The source told everything, and has not answered since then.
    Unanswered(Timestamp),
    /// The source has not told everything; this was kept then.
    Kept(Timestamp),
}

impl Freshness {
    /// Since when it is stale, if it is.
    const fn stale_since(self) -> Option<Timestamp> {
        match self {
            Self::Current => None,
            Self::Unanswered(since) | Self::Kept(since) => Some(since),
        }
    }
}

impl Health {
    /// `needs_node`: there is an API server that should know this node.
    pub fn new(needs_node: bool) -> Self {
        let facts = Facts { needs_node, ..Facts::default() };
        Self { facts: Arc::new(Mutex::new(facts)), answers: Answers::default() }
    }

    /// There is something to write.
    pub fn note_waiting(&self, now: Instant) {
        self.facts().waiting.get_or_insert(now);
    }

    /// Everything is in the maps.
    pub fn note_synced(&self) {
        let mut facts = self.facts();
        facts.synced = true;
        facts.waiting = None;
        facts.updated = Some(Timestamp::now());
    }

    /// Whether this node is about to go; `None`: there is no Node object.
    pub fn note_node(&self, leaving: Option<bool>) {
        self.facts().leaving = leaving;
    }

    /// How old what is served may be.
    pub fn note_freshness(&self, freshness: Freshness) {
        self.facts().freshness = freshness;
    }

    /// What was noted last.
    pub fn freshness(&self) -> Freshness {
        self.facts().freshness
    }

    /// Whether everything has been in the maps once.
    pub fn is_synced(&self) -> bool {
        self.facts().synced
    }

    /// Nothing has waited for too long.
    pub fn is_live(&self) -> bool {
        self.facts().is_live(Instant::now())
    }

    /// How often was answered what.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Every state of it is a valid one.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Facts {
    fn is_live(&self, now: Instant) -> bool {
        self.waiting.is_none_or(|since| now.saturating_duration_since(since) < TIMEOUT)
    }

    fn is_ready(&self, now: Instant) -> bool {
        self.synced && self.is_live(now) && !matches!(self.freshness, Freshness::Kept(_))
    }

    fn is_eligible(&self) -> bool {
        match self.leaving {
            Some(leaving) => !leaving,
            None => !self.needs_node,
        }
    }
}

/// The answer, with kube-proxy's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    last_updated: Option<String>,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    /// Ours: what is served may be out of date since then.
    #[serde(skip_serializing_if = "Option::is_none")]
    stale_since: Option<String>,
}

fn answer(facts: &Facts, well: bool, node_eligible: Option<bool>) -> Response {
    let now = Timestamp::now();
    let answer = Answer {
        // As long as it is well, nothing is older than now.
        last_updated: if well { Some(now) } else { facts.updated }.map(|time| time.to_string()),
        stale_since: facts.freshness.stale_since().map(|time| time.to_string()),
        current_time: now.to_string(),
        node_eligible,
    };
    let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, NOSNIFF, Json(answer)).into_response()
}

async fn healthz(State(health): State<Health>) -> Response {
    let facts = health.facts();
    let eligible = facts.is_eligible();
    let well = facts.synced && facts.is_live(Instant::now()) && eligible;
    health.answers.healthz.get_or_create(&[("code", code(well))]).inc();
    answer(&facts, well, Some(eligible))
}

async fn livez(State(health): State<Health>) -> Response {
    let facts = health.facts();
    let well = facts.is_live(Instant::now());
    health.answers.livez.get_or_create(&[("code", code(well))]).inc();
    answer(&facts, well, None)
}

async fn readyz(State(health): State<Health>) -> Response {
    let facts = health.facts();
    answer(&facts, facts.is_ready(Instant::now()), None)
}

/// Answers on `addr` for as long as the runtime lives.
pub async fn serve(addr: SocketAddr, health: Health) -> io::Result<SocketAddr> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(health);
    listen(addr, router).await
}

/// Serves `router` on `addr` for as long as the runtime lives, with bounds for what clients may ask of us.
pub(crate) async fn listen(addr: SocketAddr, router: Router) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(addr).await?;
    let local = listener.local_addr()?;
    // Those that just lost their place have it for a moment yet.
    let all = Arc::new(Semaphore::new(2 * CONNECTIONS));
    tokio::spawn(accept(Arc::new(listener), router, all));
    Ok(local)
}

/// Its connections end with it. `all`: places that listeners share; without one, connections are closed.
async fn accept(listener: Arc<TcpListener>, router: Router, all: Arc<Semaphore>) {
    let mut talks = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let Ok(place) = Arc::clone(&all).try_acquire_owned() else { continue };
                while talks.try_join_next().is_some() {}
                oldest_first.retain(|talk| !talk.is_finished());
                // Whoever means it has its answer by now; clients that say nothing cannot keep others out.
                if oldest_first.len() >= CONNECTIONS
                    && let Some(oldest) = oldest_first.pop_front()
                {
                    oldest.abort();
                }
                let router = router.clone();
                oldest_first.push_back(talks.spawn(async move {
                    // Clients break off as they like.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, talk(stream, router)).await;
                    drop(place);
                }));
            }
            Err(error) => {
                // No more file descriptors, most of the time.
                tracing::debug!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk(stream: TcpStream, router: Router) -> hyper::Result<()> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn what_waits_too_long_is_ill() {
        let health = Health::new(false);
        let now = Instant::now();
        assert!(health.facts().is_live(now));
        health.note_waiting(now);
        // The first one counts.
        health.note_waiting(now + TIMEOUT);
        assert!(health.facts().is_live(now + TIMEOUT / 2));
        assert!(!health.facts().is_live(now + TIMEOUT));
        health.note_synced();
        assert!(health.facts().is_live(now + TIMEOUT));
    }

    async fn ask(addr: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let status = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        (status, text.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned())
    }

    /// Rule 100.
    #[tokio::test]
    async fn the_three_answers() {
        let health = Health::new(true);
        let addr = serve("127.0.0.1:0".parse().unwrap(), health.clone()).await.unwrap();
        let all = || async {
            let mut statuses = vec![];
            for path in ["/healthz", "/livez", "/readyz"] {
                statuses.push(ask(addr, path).await.0);
            }
            statuses
        };
        assert_eq!(all().await, [503, 200, 503]);
        health.note_synced();
        // No Node object yet.
        assert_eq!(all().await, [503, 200, 200]);
        health.note_node(Some(false));
        assert_eq!(all().await, [200, 200, 200]);
        let (_, body) = ask(addr, "/healthz").await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["nodeEligible"], true);
        assert!(body["lastUpdated"].is_string() && body["lastUpdated"] == body["currentTime"]);
        // The node is being deleted, or drained by the autoscaler.
        health.note_node(Some(true));
        assert_eq!(all().await, [503, 200, 200]);
        assert_eq!(ask(addr, "/metrics").await.0, 404);
        // It was well before, not now.
        let (_, body) = ask(addr, "/healthz").await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["nodeEligible"], false);
        assert!(body["lastUpdated"].as_str().unwrap() < body["currentTime"].as_str().unwrap());
        health.note_node(Some(false));
        health.note_waiting(Instant::now().checked_sub(TIMEOUT).unwrap());
        assert_eq!(all().await, [503, 503, 503]);
        // What was kept is served, and nobody says what is true now.
        health.note_synced();
        health.note_freshness(Freshness::Kept(Timestamp::UNIX_EPOCH));
        assert_eq!(all().await, [200, 200, 503]);
        let (_, body) = ask(addr, "/healthz").await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["staleSince"], "1970-01-01T00:00:00Z");
        health.note_freshness(Freshness::Unanswered(Timestamp::UNIX_EPOCH));
        assert_eq!(all().await, [200, 200, 200]);
        let alone = Health::new(false);
        alone.note_synced();
        let addr = serve("127.0.0.1:0".parse().unwrap(), alone).await.unwrap();
        assert_eq!(ask(addr, "/healthz").await.0, 200);
    }

    #[tokio::test]
    async fn a_client_that_sends_too_much_is_turned_away() {
        let addr = serve("127.0.0.1:0".parse().unwrap(), Health::new(false)).await.unwrap();
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let head = format!("GET /livez HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(2 * HEADER_BYTES));
        // The server may have hung up before all of it is sent.
        let _ = stream.write_all(head.as_bytes()).await;
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer).await;
        // It may hang up before the answer is read.
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{answer:?}");
    }

    #[tokio::test]
    async fn clients_that_say_nothing_keep_nobody_out() {
        let addr = serve("127.0.0.1:0".parse().unwrap(), Health::new(false)).await.unwrap();
        let mut idle = vec![];
        for n in 0..3 * CONNECTIONS {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\nX").await.unwrap();
            idle.push(stream);
            if n % 32 == 0 {
                let asked = tokio::time::timeout(HEADER_TIMEOUT / 2, ask(addr, "/livez")).await;
                assert_eq!(asked.expect("at once").0, 200, "beside {n}");
            }
        }
        let asked = tokio::time::timeout(HEADER_TIMEOUT / 2, ask(addr, "/livez")).await;
        assert_eq!(asked.expect("at once").0, 200);
        // The oldest had to go.
        assert_eq!(idle[0].read(&mut [0; 8]).await.unwrap_or(0), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_nothing_is_turned_away() {
        let addr = serve("127.0.0.1:0".parse().unwrap(), Health::new(false)).await.unwrap();
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET /livez").await.unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"");
    }
}
