//! An API server that knows a few kinds of objects, and misbehaves when it is told to: for tests and benchmarks.
//!
//! It speaks to the agent and to kube-proxy: lists in pages, watches, single objects, and what `kubectl apply` would do
//! ([`Double::apply`], and `PUT` of a list).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Query, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use futures::StreamExt;
use futures::channel::mpsc::{UnboundedSender, unbounded};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

pub const SERVICES: &str = "/api/v1/services";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const PODS: &str = "/api/v1/pods";
pub const NODES: &str = "/api/v1/nodes";
/// Not there (404) before the first object is set, as before Kubernetes 1.33.
pub const CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// Kinds of objects: path of the list, `apiVersion` and `kind`.
const KINDS: [(&str, &str, &str); 5] = [
    (SERVICES, "v1", "Service"),
    (SLICES, "discovery.k8s.io/v1", "EndpointSlice"),
    (PODS, "v1", "Pod"),
    (NODES, "v1", "Node"),
    (CIDRS, "networking.k8s.io/v1", "ServiceCIDR"),
];

/// Requests of one test; further ones are not answered.
const FLOOD: usize = 1000;

/// Bytes of a request.
const REQUEST: usize = 64 << 20;

/// What the server does instead of answering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mood {
    Well,
    /// 403 to everything, or to one path.
    Forbidden(Option<&'static str>),
    /// 401 to everybody.
    Unauthorized,
    /// 410 to a watch, before it begins.
    GoneAtStart,
    /// An ERROR event with code 410, as soon as a watch has begun.
    GoneInStream,
    /// 504: the version asked for is yet to come.
    Restored,
    /// Takes requests, and never answers.
    Hanging,
    /// Ends every watch as soon as it has begun.
    Brief,
}

#[derive(Default)]
struct Store {
    version: u64,
    /// By path, then by name: object.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Every change: version, path, the object before and after it.
    history: Vec<Change>,
    /// What happened up to this version is forgotten.
    forgotten: u64,
    watchers: Vec<Watcher>,
    requests: Vec<(String, HashMap<String, String>)>,
    mood: Option<Mood>,
    /// Events that were created.
    created: Vec<Value>,
    refuses_events: bool,
    /// The only one that is let in.
    token: Option<String>,
    page: usize,
    /// Requests are answered without end, and not remembered.
    tireless: bool,
}

struct Change {
    version: u64,
    path: String,
    before: Option<Value>,
    after: Option<Value>,
}

struct Watcher {
    path: String,
    selection: Selection,
    sender: UnboundedSender<Result<Bytes, Infallible>>,
}

/// The selectors of a request.
struct Selection {
    /// A field, as a JSON pointer, and what it must be; `None`: all of them.
    field: Option<(String, String)>,
    /// Labels that must not be there; the double knows no other selectors.
    without: Vec<String>,
}

impl Selection {
    fn of(parameters: &HashMap<String, String>) -> Self {
        let get = |key: &str| parameters.get(key).map(String::as_str);
        let field = get("fieldSelector").map(|text| {
            let (path, value) = text.split_once('=').unwrap();
            assert!(["metadata.name", "spec.nodeName"].contains(&path), "{text}");
            (format!("/{}", path.replace('.', "/")), value.to_owned())
        });
        let labels = get("labelSelector").into_iter().flat_map(|text| text.split(','));
        Self { field, without: labels.map(|label| label.strip_prefix('!').unwrap().to_owned()).collect() }
    }

    fn has(&self, object: &Value) -> bool {
        let is = |(path, value): &(String, String)| object.pointer(path).is_some_and(|field| field == value);
        self.field.as_ref().is_none_or(is)
            && self.without.iter().all(|label| object["metadata"]["labels"].get(label).is_none())
    }

    /// What a watch with these selectors is told of a change.
    fn event(&self, change: &Change) -> Option<Bytes> {
        let before = change.before.as_ref().filter(|object| self.has(object));
        let after = change.after.as_ref().filter(|object| self.has(object));
        match (before, after) {
            (None, None) => None,
            (None, Some(object)) => Some(line("ADDED", object)),
            (Some(_), Some(object)) => Some(line("MODIFIED", object)),
            (Some(object), None) => {
                let mut object = object.clone();
                object["metadata"]["resourceVersion"] = change.version.to_string().into();
                Some(line("DELETED", &object))
            }
        }
    }
}

/// A running server.
#[derive(Clone)]
pub struct Double {
    pub addr: SocketAddr,
    store: Arc<Mutex<Store>>,
    server: Arc<Mutex<Option<AbortHandle>>>,
}

impl Double {
    pub async fn start() -> Self {
        Self::with_pages(2).await
    }

    /// With so many objects in one answer of a list, whatever is asked for.
    pub async fn with_pages(page: usize) -> Self {
        Self::at("127.0.0.1:0", page).await
    }

    /// The same at this address.
    pub async fn at(addr: &str, page: usize) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let double = Self { addr, store: Arc::default(), server: Arc::default() };
        double.store().page = page;
        double.serve(listener);
        double
    }

    /// Answers requests without end, and does not remember them.
    pub fn be_tireless(&self) {
        self.store().tireless = true;
    }

    /// Creates or changes an object, or those of a `List`. What is of other kinds is passed over.
    pub fn apply(&self, mut object: Value) {
        if object["kind"] == "List" {
            let Value::Array(items) = object["items"].take() else { return };
            for item in items {
                self.apply(item);
            }
            return;
        }
        let says = (object["apiVersion"].as_str(), object["kind"].as_str());
        let known = KINDS.iter().find(|(_, version, kind)| says == (Some(version), Some(kind)));
        if let Some((path, ..)) = known {
            self.set(path, object);
        }
    }

    fn serve(&self, listener: TcpListener) {
        let router = Router::new().fallback(answer).with_state(self.clone());
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // Who drops such a connection resets it.
                stream.set_zero_linger().unwrap();
                // Like a real one: events do not wait for the client's system to acknowledge those before.
                stream.set_nodelay(true).unwrap();
                let service = TowerToHyperService::new(router.clone());
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        *self.server.lock().unwrap() = Some(server.abort_handle());
    }

    /// Resets every connection, and takes none until [`Double::come_back`].
    pub async fn go_away(&self) {
        self.server.lock().unwrap().take().unwrap().abort();
        self.disconnect();
        while TcpListener::bind(self.addr).await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    pub async fn come_back(&self) {
        self.serve(TcpListener::bind(self.addr).await.unwrap());
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    /// Creates or changes an object.
    pub fn set(&self, path: &str, object: Value) {
        self.store().set(path, object).tell();
    }

    /// Deletes an object.
    pub fn delete(&self, path: &str, name: &str) {
        let mut store = self.store();
        let before = Some(store.objects.get_mut(path).unwrap().remove(name).unwrap());
        store.change(path, before, None).tell();
    }

    /// Like [`Double::set`], but watches get it byte by byte.
    pub async fn dribble(&self, path: &str, object: Value) {
        let told = self.store().set(path, object);
        for (sender, bytes) in told.0 {
            for byte in bytes {
                sender.unbounded_send(Ok(Bytes::from(vec![byte]))).unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    /// Like [`Double::set`], but watches get a part of it, and then end.
    pub fn break_off(&self, path: &str, object: Value) {
        let mut store = self.store();
        for (sender, bytes) in store.set(path, object).0 {
            sender.unbounded_send(Ok(bytes.slice(..bytes.len() / 2))).unwrap();
        }
        store.watchers.retain(|watcher| watcher.path != path);
    }

    /// Tells the watches how far they are.
    pub fn bookmark(&self, path: &str) {
        let store = self.store();
        let metadata = json!({ "resourceVersion": store.version.to_string() });
        let mark = json!({ "kind": "Any", "apiVersion": "v1", "metadata": metadata });
        for watcher in store.watchers.iter().filter(|watcher| watcher.path == path) {
            watcher.sender.unbounded_send(Ok(line("BOOKMARK", &mark))).unwrap();
        }
    }

    /// Forgets what happened so far: a watch that wants to know is answered with 410.
    pub fn forget(&self) {
        let mut store = self.store();
        store.forgotten = store.version;
        store.history.clear();
    }

    /// Ends every watch.
    pub fn disconnect(&self) {
        self.store().watchers.clear();
    }

    pub fn be(&self, mood: Mood) {
        self.store().mood = Some(mood);
    }

    /// Every Event that was created.
    pub fn created(&self) -> Vec<Value> {
        self.store().created.clone()
    }

    /// 403 to Events.
    pub fn refuse_events(&self, refuse: bool) {
        self.store().refuses_events = refuse;
    }

    /// What a backup of the server's store has.
    pub fn back_up(&self) -> Backup {
        let store = self.store();
        Backup { version: store.version, objects: store.objects.clone() }
    }

    /// Another server in the place of this one, with what the backup has: whatever came after it has never been.
    pub fn restore(&self, backup: Backup) {
        let mut store = self.store();
        (store.version, store.forgotten) = (backup.version, backup.version);
        store.objects = backup.objects;
        store.history.clear();
        store.watchers.clear();
    }

    /// Lets in nobody without this token.
    pub fn demand(&self, token: &str) {
        self.store().token = Some(token.to_owned());
    }

    /// Every request so far: path and parameters.
    pub fn requests(&self) -> Vec<(String, HashMap<String, String>)> {
        self.store().requests.clone()
    }

    pub fn watches(&self, path: &str) -> usize {
        let mut store = self.store();
        store.watchers.retain(|watcher| !watcher.sender.is_closed());
        store.watchers.iter().filter(|watcher| watcher.path == path).count()
    }
}

/// The store of a server at one moment.
pub struct Backup {
    version: u64,
    objects: BTreeMap<String, BTreeMap<String, Value>>,
}

/// Who is to be told what.
struct Told(Vec<(UnboundedSender<Result<Bytes, Infallible>>, Bytes)>);

impl Told {
    fn tell(self) {
        for (sender, bytes) in self.0 {
            let _ = sender.unbounded_send(Ok(bytes));
        }
    }
}

impl Store {
    fn set(&mut self, path: &str, mut object: Value) -> Told {
        object["metadata"]["resourceVersion"] = (self.version + 1).to_string().into();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let before = self.objects.entry(path.to_owned()).or_default().insert(name, object.clone());
        self.change(path, before, Some(object))
    }

    fn change(&mut self, path: &str, before: Option<Value>, after: Option<Value>) -> Told {
        self.version += 1;
        let change = Change { version: self.version, path: path.to_owned(), before, after };
        let watchers = self.watchers.iter().filter(|watcher| watcher.path == path);
        let told = watchers
            .filter_map(|watcher| Some((watcher.sender.clone(), watcher.selection.event(&change)?)))
            .collect();
        self.history.push(change);
        Told(told)
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({ "type": kind, "object": object })).into()
}

fn status(code: StatusCode, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    })
}

fn refuse(code: StatusCode, reason: &str, message: &str) -> Response {
    (code, Json(status(code, reason, message))).into_response()
}

async fn answer(
    State(double): State<Double>,
    Query(parameters): Query<HashMap<String, String>>,
    uri: Uri,
    request: Request,
) -> Response {
    let path = uri.path().to_owned();
    let called = (format!("{} {path}", request.method()), parameters.clone());
    // A flood ends sometime, so that paused time goes on and the test with it.
    if double.store().mood == Some(Mood::Hanging) || double.store().requests.len() > FLOOD {
        double.store().requests.push(called);
        return std::future::pending().await;
    }
    if request.method() == Method::PUT {
        let body = to_bytes(request.into_body(), REQUEST).await.unwrap();
        double.apply(serde_json::from_slice(&body).unwrap());
        return StatusCode::OK.into_response();
    }
    if request.method() == Method::POST {
        double.store().requests.push(called);
        return create(&double, &path, request).await;
    }
    let mut store = double.store();
    if path == CIDRS && !store.objects.contains_key(CIDRS) {
        return refuse(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource");
    }
    if !store.tireless {
        store.requests.push(called);
    }
    let watch = parameters.get("watch").is_some_and(|value| value == "true");
    let gone = "too old resource version: 1 (2)";
    match (store.mood, watch) {
        (Some(Mood::Forbidden(only)), _) if only.is_none_or(|only| only == path) => {
            let message = format!("User \"agent\" cannot list {path}");
            return refuse(StatusCode::FORBIDDEN, "Forbidden", &message);
        }
        (Some(Mood::Unauthorized), _) => return unauthorized(),
        (Some(Mood::GoneAtStart), true) => return refuse(StatusCode::GONE, "Expired", gone),
        (Some(Mood::GoneInStream), true) => {
            return Body::from(line("ERROR", &status(StatusCode::GONE, "Expired", gone))).into_response();
        }
        (Some(Mood::Restored), true) => {
            let message = "Too large resource version: 100, current: 3";
            return refuse(StatusCode::GATEWAY_TIMEOUT, "Timeout", message);
        }
        (Some(Mood::Brief), true) => return Body::empty().into_response(),
        _ => {}
    }
    let bearer = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    if store.token.as_ref().is_some_and(|token| bearer != Some(format!("Bearer {token}"))) {
        return unauthorized();
    }
    if !watch {
        return match KINDS.iter().find(|(kind, ..)| *kind == path) {
            Some(kind) => list(&store, *kind, &parameters),
            None => object(&store, &path),
        };
    }
    // Newer clients ask for a list within a watch, and go back to lists if that is refused.
    let since = parameters.get("resourceVersion").map(|since| since.parse::<u64>());
    let (Some(Ok(since)), None) = (since, parameters.get("sendInitialEvents")) else {
        let message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message);
    };
    if since > store.version {
        let message = format!("Too large resource version: {since}, current: {}", store.version);
        return refuse(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message);
    }
    if since < store.forgotten {
        return refuse(StatusCode::GONE, "Expired", gone);
    }
    let selection = Selection::of(&parameters);
    let (sender, receiver) = unbounded();
    for change in store.history.iter().filter(|change| change.version > since && change.path == path) {
        if let Some(bytes) = selection.event(change) {
            let _ = sender.unbounded_send(Ok(bytes));
        }
    }
    store.watchers.push(Watcher { path, selection, sender });
    Body::from_stream(receiver.map(|bytes: Result<Bytes, Infallible>| bytes)).into_response()
}

/// Events are the only objects that the agent creates.
async fn create(double: &Double, path: &str, request: Request) -> Response {
    let body = to_bytes(request.into_body(), 64 * 1024).await.unwrap();
    let mut store = double.store();
    let event: Value = serde_json::from_slice(&body).unwrap();
    let namespace = event["metadata"]["namespace"].as_str().unwrap();
    assert_eq!(path, format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"));
    if store.refuses_events {
        let message = "events.events.k8s.io is forbidden: User \"system:node\" cannot create resource";
        return refuse(StatusCode::FORBIDDEN, "Forbidden", message);
    }
    store.created.push(event.clone());
    (StatusCode::CREATED, Json(event)).into_response()
}

fn unauthorized() -> Response {
    refuse(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
}

/// One object: the name comes after the path of its kind.
fn object(store: &Store, path: &str) -> Response {
    let known = path.rsplit_once('/').and_then(|(kind, name)| store.objects.get(kind)?.get(name));
    match known {
        Some(object) => Json(object).into_response(),
        None => refuse(StatusCode::NOT_FOUND, "NotFound", &format!("{path} not found")),
    }
}

fn list(
    store: &Store,
    (path, version, kind): (&str, &str, &str),
    parameters: &HashMap<String, String>,
) -> Response {
    let none = BTreeMap::new();
    let objects = store.objects.get(path).unwrap_or(&none);
    let from = parameters.get("continue").map(String::as_str).unwrap_or_default();
    let selection = Selection::of(parameters);
    let rest = objects.range::<str, _>((Bound::Excluded(from), Bound::Unbounded));
    let mut rest = rest.filter(|(_, object)| selection.has(object));
    // Smaller than any page that is asked for: clients must go on.
    let items: Vec<_> = rest.by_ref().take(store.page).collect();
    let last = items.last().map(|(name, _)| name.as_str()).unwrap_or_default();
    let next = if rest.next().is_some() { last } else { "" };
    let items: Vec<&Value> = items.iter().map(|(_, object)| *object).collect();
    Json(json!({
        // What a typed client asks for: kube-proxy takes a `List` for none.
        "kind": format!("{kind}List"), "apiVersion": version,
        "metadata": { "resourceVersion": store.version.to_string(), "continue": next },
        "items": items,
    }))
    .into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    /// Status and body of an answer.
    async fn ask(double: &Double, method: &str, target: &str, body: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(double.addr).await.unwrap();
        let length = body.len();
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: double\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let (head, body) = loop {
            assert_ne!(stream.read_buf(&mut answer).await.unwrap(), 0, "{method} {target}");
            let text = std::str::from_utf8(&answer).unwrap();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            if body.len() == length.parse::<usize>().unwrap() {
                break (head, body);
            }
        };
        let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    fn objects() -> String {
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-a" } });
        let other = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "d" } });
        json!({ "apiVersion": "v1", "kind": "List", "items": [node, other] }).to_string()
    }

    #[tokio::test]
    async fn kube_proxy_finds_what_it_asks_for() {
        let double = Double::start().await;
        assert_eq!(ask(&double, "PUT", "/", &objects()).await.0, 200);
        let (status, list) = ask(&double, "GET", "/api/v1/nodes?resourceVersion=0&limit=500", "").await;
        assert_eq!((status, &list["kind"], &list["apiVersion"]), (200, &"NodeList".into(), &"v1".into()));
        assert_eq!(list["items"][0]["metadata"]["name"], "node-a");
        let (status, list) = ask(&double, "GET", SLICES, "").await;
        assert_eq!((status, &list["kind"]), (200, &"EndpointSliceList".into()));
        assert_eq!(list["apiVersion"], "discovery.k8s.io/v1");
        let (status, node) = ask(&double, "GET", "/api/v1/nodes/node-a", "").await;
        assert_eq!((status, &node["metadata"]["name"]), (200, &"node-a".into()));
        let (status, refusal) = ask(&double, "GET", "/api/v1/nodes/node-b", "").await;
        assert_eq!((status, &refusal["kind"]), (404, &"Status".into()));
        let (status, refusal) =
            ask(&double, "GET", "/api/v1/nodes?watch=true&sendInitialEvents=true", "").await;
        assert_eq!((status, &refusal["reason"]), (422, &"Invalid".into()));
    }

    #[tokio::test]
    async fn a_tireless_double_answers_without_end() {
        let double = Double::start().await;
        double.be_tireless();
        for _ in 0..FLOOD + 2 {
            assert_eq!(ask(&double, "GET", NODES, "").await.0, 200);
        }
        assert_eq!(double.requests().len(), 0);
    }
}
