//! An API server that knows a few kinds of objects, and misbehaves when it is told to.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Query, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use futures::StreamExt;
use futures::channel::mpsc::{UnboundedSender, unbounded};
use serde_json::{Value, json};
use tokio::net::TcpListener;

pub(crate) const SERVICES: &str = "/api/v1/services";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub(crate) const PODS: &str = "/api/v1/pods";
pub(crate) const NODES: &str = "/api/v1/nodes";
/// Not there (404) before the first object is set, as before Kubernetes 1.33.
pub(crate) const CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// What the server does instead of answering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mood {
    Well,
    /// 403 to everything.
    Forbidden,
    /// 410 to a watch, before it begins.
    GoneAtStart,
    /// An ERROR event with code 410, as soon as a watch has begun.
    GoneInStream,
}

#[derive(Default)]
struct Store {
    version: u64,
    /// By path, then by name: version and object.
    objects: BTreeMap<String, BTreeMap<String, (u64, Value)>>,
    /// Every change: version, path, type, object.
    history: Vec<(u64, String, &'static str, Value)>,
    watchers: Vec<(String, UnboundedSender<Result<Bytes, Infallible>>)>,
    requests: Vec<(String, HashMap<String, String>)>,
    mood: Option<Mood>,
    /// Events that were created.
    created: Vec<Value>,
    refuses_events: bool,
    /// A path that is answered with 403.
    forbidden: Option<&'static str>,
    page: usize,
}

/// A running server.
#[derive(Clone)]
pub(crate) struct Double {
    pub(crate) addr: SocketAddr,
    store: Arc<Mutex<Store>>,
}

impl Double {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let double = Self { addr: listener.local_addr().unwrap(), store: Arc::default() };
        double.store().page = 2;
        let router = Router::new().fallback(answer).with_state(double.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        double
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    /// Creates or changes an object.
    pub(crate) fn set(&self, path: &str, mut object: Value) {
        let mut store = self.store();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let of_kind = store.objects.entry(path.to_owned()).or_default();
        let old = of_kind.insert(name, (version, object.clone()));
        store.tell(path, if old.is_some() { "MODIFIED" } else { "ADDED" }, object);
    }

    /// Deletes an object.
    pub(crate) fn delete(&self, path: &str, name: &str) {
        let mut store = self.store();
        let (_, mut object) = store.objects.get_mut(path).unwrap().remove(name).unwrap();
        store.version += 1;
        object["metadata"]["resourceVersion"] = store.version.to_string().into();
        store.tell(path, "DELETED", object);
    }

    /// Breaks every connection that carries a watch.
    pub(crate) fn disconnect(&self) {
        self.store().watchers.clear();
    }

    pub(crate) fn be(&self, mood: Mood) {
        self.store().mood = Some(mood);
    }

    /// Every Event that was created.
    pub(crate) fn created(&self) -> Vec<Value> {
        self.store().created.clone()
    }

    /// 403 to Events.
    pub(crate) fn refuse_events(&self, refuse: bool) {
        self.store().refuses_events = refuse;
    }

    /// 403 to everything that asks for `path`; none: to nothing.
    pub(crate) fn forbid(&self, path: Option<&'static str>) {
        self.store().forbidden = path;
    }

    /// Every request so far: path and parameters.
    pub(crate) fn requests(&self) -> Vec<(String, HashMap<String, String>)> {
        self.store().requests.clone()
    }

    pub(crate) fn watches(&self, path: &str) -> usize {
        let mut store = self.store();
        store.watchers.retain(|(_, sender)| !sender.is_closed());
        store.watchers.iter().filter(|(watched, _)| watched == path).count()
    }
}

impl Store {
    fn tell(&mut self, path: &str, kind: &'static str, object: Value) {
        for (_, sender) in self.watchers.iter().filter(|(watched, _)| watched == path) {
            let _ = sender.unbounded_send(Ok(line(kind, &object)));
        }
        self.history.push((self.version, path.to_owned(), kind, object));
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
    if request.method() == Method::POST {
        return create(&double, path, request).await;
    }
    let mut store = double.store();
    if path == CIDRS && !store.objects.contains_key(CIDRS) {
        return refuse(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource");
    }
    store.requests.push((format!("{} {path}", request.method()), parameters.clone()));
    let watch = parameters.get("watch").is_some_and(|value| value == "true");
    let gone = "too old resource version: 1 (2)";
    let forbidden = store.forbidden == Some(path.as_str());
    match (store.mood, watch) {
        (mood, _) if forbidden || mood == Some(Mood::Forbidden) => {
            let message = "services is forbidden: User \"system:node\" cannot list resource";
            return refuse(StatusCode::FORBIDDEN, "Forbidden", message);
        }
        (Some(Mood::GoneAtStart), true) => return refuse(StatusCode::GONE, "Expired", gone),
        (Some(Mood::GoneInStream), true) => {
            return Body::from(line("ERROR", &status(StatusCode::GONE, "Expired", gone))).into_response();
        }
        _ => {}
    }
    if !watch {
        return list(&store, &path, &parameters);
    }
    let since: u64 = parameters["resourceVersion"].parse().unwrap();
    let (sender, receiver) = unbounded();
    for (version, of, kind, object) in &store.history {
        if *version > since && *of == path {
            let _ = sender.unbounded_send(Ok(line(kind, object)));
        }
    }
    store.watchers.push((path, sender));
    Body::from_stream(receiver.map(|bytes: Result<Bytes, Infallible>| bytes)).into_response()
}

/// Events are the only objects that the agent creates.
async fn create(double: &Double, path: String, request: Request) -> Response {
    let body = to_bytes(request.into_body(), 64 * 1024).await.unwrap();
    let mut store = double.store();
    store.requests.push((format!("POST {path}"), HashMap::new()));
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

fn list(store: &Store, path: &str, parameters: &HashMap<String, String>) -> Response {
    let none = BTreeMap::new();
    let objects = store.objects.get(path).unwrap_or(&none);
    let from = parameters.get("continue").map(String::as_str).unwrap_or_default();
    let selector = parameters.get("fieldSelector").and_then(|selector| selector.split_once('='));
    let selected = |object: &Value| match selector {
        Some(("metadata.name", name)) => object["metadata"]["name"] == name,
        Some(("spec.nodeName", name)) => object["spec"]["nodeName"] == name,
        _ => true,
    };
    let mut rest = objects.iter().filter(|(own, (_, object))| own.as_str() > from && selected(object));
    // Smaller than any page that is asked for: clients must go on.
    let items: Vec<_> = rest.by_ref().take(store.page).collect();
    let last = items.last().map(|(name, _)| name.as_str()).unwrap_or_default();
    let next = if rest.next().is_some() { last } else { "" };
    let items: Vec<&Value> = items.iter().map(|(_, (_, object))| object).collect();
    Json(json!({
        "kind": "List", "apiVersion": "v1",
        "metadata": { "resourceVersion": store.version.to_string(), "continue": next },
        "items": items,
    }))
    .into_response()
}
