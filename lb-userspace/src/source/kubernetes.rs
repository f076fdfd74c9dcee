//! The Kubernetes API server: Services, EndpointSlices, this one Node and its Pods, listed and watched for as long as
//! the agent lives.
//!
//! Asks only for what it uses (label and field selectors, no write access), and converts each object while
//! it is read: no list of whole objects is ever held. An API server that cannot be reached, refuses, or has
//! forgotten where we were is asked again, ever less often; until then everything stays as it was.

use std::borrow::Cow;
use std::fmt::Debug;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
use kube::{Api, Client, Config, Resource};
use serde::{Deserialize, Deserializer};
use tokio::task::JoinSet;

use super::convert::ServiceCidr;
use super::known::Known;
use super::{Closed, Event, Kind, Sender, convert};
use crate::entries::ServiceName;
use crate::model::{Change, EndpointSlice, Node, Pod, Service, SliceName};
use crate::owner::PodName;

/// What kube-proxy asks for, too.
const LABELS: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";

/// Objects in one answer of a list.
const PAGE: u32 = 200;

/// How long one watch request lives, in seconds. A connection that died in silence is noticed after this
/// time.
const WATCH_SECONDS: u32 = 120;

/// How long an answer may pause; longer than a watch lives.
const READ_TIMEOUT: Duration = Duration::from_mins(3);

/// How the API server is found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// `--kubeconfig`; several files as in `KUBECONFIG`.
    pub kubeconfig: Option<PathBuf>,
    /// `--master`.
    pub master: Option<String>,
    pub node_name: String,
}

/// The API server cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("kubeconfig {path}: {source}", path = path.display())]
    Kubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error(
        "no way to the API server: not in a pod ({0}); use --kubeconfig, or --manifests for a node without \
         Kubernetes"
    )]
    NotInCluster(kube::config::InClusterError),
    #[error("--master {url:?} is not a URL: {source}")]
    Master { url: String, source: http::uri::InvalidUri },
    #[error("API client: {0}")]
    Client(kube::Error),
}

/// A client as [`Options`] say. Nothing is asked yet.
pub async fn client(options: &Options) -> Result<Client, Error> {
    let mut config = match (&options.kubeconfig, &options.master) {
        (Some(paths), _) => from_kubeconfig(paths).await?,
        (None, Some(master)) => Config::incluster().or_else(|_| Ok(Config::new(parse_url(master)?)))?,
        (None, None) => Config::incluster().map_err(Error::NotInCluster)?,
    };
    if let Some(master) = &options.master {
        config.cluster_url = parse_url(master)?;
    }
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(Error::Client)
}

async fn from_kubeconfig(paths: &PathBuf) -> Result<Config, Error> {
    let mut merged: Option<Kubeconfig> = None;
    let error = |path: PathBuf| |source| Error::Kubeconfig { path, source };
    for path in std::env::split_paths(paths) {
        let read = Kubeconfig::read_from(&path).map_err(error(path.clone()))?;
        merged = Some(match merged {
            None => read,
            Some(before) => before.merge(read).map_err(error(path))?,
        });
    }
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(merged.unwrap_or_default(), &options).await;
    config.map_err(error(paths.clone()))
}

fn parse_url(url: &str) -> Result<http::Uri, Error> {
    url.parse().map_err(|source| Error::Master { url: url.to_owned(), source })
}

/// Follows every kind until the receiver of `events` is gone, or the set is dropped.
pub fn follow(client: &Client, node_name: &str, events: &Sender) -> JoinSet<()> {
    follow_with(client, node_name, events, || Box::new(DefaultBackoff::default()))
}

/// [`follow`] with a patience of its own.
pub fn follow_with(
    client: &Client,
    node_name: &str,
    events: &Sender,
    backoff: fn() -> Box<dyn Backoff>,
) -> JoinSet<()> {
    let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    let labelled = config.clone().labels(LABELS);
    let cidrs = Follower::<ServiceCidr>::new(client, config.clone(), events, backoff());
    let here = config.clone().fields(&format!("spec.nodeName={node_name}"));
    let ours = config.fields(&format!("metadata.name={node_name}"));
    let mut tasks = JoinSet::new();
    let services = Follower::<Service>::new(client, labelled.clone(), events, backoff());
    tasks.spawn(services.run());
    let slices = Follower::<EndpointSlice>::new(client, labelled, events, backoff());
    tasks.spawn(slices.run());
    let nodes = Follower::<Node>::new(client, ours, events, backoff());
    tasks.spawn(nodes.run());
    let pods = Follower::<Pod>::new(client, here, events, backoff());
    tasks.spawn(pods.run());
    tasks.spawn(cidrs.run());
    tasks
}

/// An object of the model and the Kubernetes object it is read from.
trait Watched: Clone + Debug + Send + 'static {
    type Object: Resource<DynamicType = (), Scope: Send> + for<'de> Deserialize<'de> + 'static;
    type Name: Ord + Clone + Send;
    const KIND: Kind;

    fn convert(object: Self::Object) -> Self;
    fn name(&self) -> Self::Name;
    fn changed(self) -> Change;
    fn gone(name: Self::Name) -> Change;
}

impl Watched for Service {
    type Object = core::Service;
    type Name = ServiceName;
    const KIND: Kind = Kind::Services;

    fn convert(object: core::Service) -> Self {
        convert::service(object)
    }

    fn name(&self) -> ServiceName {
        self.name.clone()
    }

    fn changed(self) -> Change {
        Change::Service(Arc::new(self))
    }

    fn gone(name: ServiceName) -> Change {
        Change::ServiceGone(name)
    }
}

impl Watched for EndpointSlice {
    type Object = discovery::EndpointSlice;
    type Name = SliceName;
    const KIND: Kind = Kind::EndpointSlices;

    fn convert(object: discovery::EndpointSlice) -> Self {
        convert::slice(object)
    }

    fn name(&self) -> SliceName {
        self.name.clone()
    }

    fn changed(self) -> Change {
        Change::Slice(Arc::new(self))
    }

    fn gone(name: SliceName) -> Change {
        Change::SliceGone(name)
    }
}

impl Watched for Pod {
    type Object = core::Pod;
    type Name = PodName;
    const KIND: Kind = Kind::Pods;

    fn convert(object: core::Pod) -> Self {
        convert::pod(object)
    }

    fn name(&self) -> PodName {
        self.name.clone()
    }

    fn changed(self) -> Change {
        Change::Pod(Arc::new(self))
    }

    fn gone(name: PodName) -> Change {
        Change::PodGone(name)
    }
}

impl Watched for Node {
    type Object = core::Node;
    type Name = String;
    const KIND: Kind = Kind::Nodes;

    fn convert(object: core::Node) -> Self {
        convert::node(object)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn changed(self) -> Change {
        Change::Node(Box::new(self))
    }

    fn gone(name: String) -> Change {
        Change::NodeGone(name)
    }
}

impl Watched for ServiceCidr {
    type Object = networking::ServiceCIDR;
    type Name = String;
    const KIND: Kind = Kind::ServiceCidrs;

    fn convert(object: networking::ServiceCIDR) -> Self {
        convert::service_cidr(object)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn changed(self) -> Change {
        Change::ServiceCidr(self.name, self.nets)
    }

    fn gone(name: String) -> Change {
        Change::ServiceCidrGone(name)
    }
}

/// What is left of a Kubernetes object once it has been read: the model's object, and the resource version
/// that the watch goes on from.
#[derive(Clone, Debug)]
struct Slim<W> {
    metadata: ObjectMeta,
    object: W,
}

impl<'de, W: Watched> Deserialize<'de> for Slim<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = W::Object::deserialize(deserializer)?;
        let resource_version = object.meta().resource_version.clone();
        let metadata = ObjectMeta { resource_version, ..ObjectMeta::default() };
        Ok(Self { metadata, object: W::convert(object) })
    }
}

impl<W: Watched> Resource for Slim<W> {
    type DynamicType = ();
    type Scope = <W::Object as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        W::Object::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        W::Object::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        W::Object::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::Object::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Follows one kind.
struct Follower<W: Watched> {
    api: Api<Slim<W>>,
    config: watcher::Config,
    events: Sender,
    known: Known<W::Name>,
    backoff: Box<dyn Backoff>,
    /// What went wrong last, and was said.
    trouble: Option<String>,
}

impl<W: Watched> Follower<W> {
    fn new(client: &Client, config: watcher::Config, events: &Sender, backoff: Box<dyn Backoff>) -> Self {
        let (api, events) = (Api::all(client.clone()), events.clone());
        Self { api, config, events, known: Known::default(), backoff, trouble: None }
    }

    async fn run(mut self) {
        // Ends only when nobody listens any more.
        while let Ok(()) = self.follow().await {}
    }

    /// Until the watcher has to start afresh.
    async fn follow(&mut self) -> Result<(), Closed> {
        let mut stream = pin!(watcher(self.api.clone(), self.config.clone()));
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => self.take(event).await?,
                Err(error) => {
                    if W::KIND.is_dispensable() && is_refused(&error) {
                        self.send(Event::Refused(W::KIND)).await?;
                    }
                    self.complain(&error);
                    let pause = self.backoff.next().unwrap_or(Duration::from_secs(30));
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = self.events.closed() => return Err(Closed),
                    }
                    if is_gone_at_start(&error) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    async fn take(&mut self, event: watcher::Event<Slim<W>>) -> Result<(), Closed> {
        match event {
            watcher::Event::Init => {
                // Nothing was heard of the server yet.
                self.known.begin();
                return Ok(());
            }
            watcher::Event::InitApply(Slim { object, .. }) | watcher::Event::Apply(Slim { object, .. }) => {
                self.known.exists(&object.name());
                self.send(Event::Changed(object.changed())).await?;
            }
            watcher::Event::Delete(Slim { object, .. }) => {
                let name = object.name();
                self.known.gone(&name);
                self.send(Event::Changed(W::gone(name))).await?;
            }
            watcher::Event::InitDone => {
                for name in self.known.finish() {
                    self.send(Event::Changed(W::gone(name))).await?;
                }
                self.send(Event::Listed(W::KIND)).await?;
            }
        }
        if self.trouble.take().is_some() {
            tracing::info!(kind = %W::KIND, "the API server answers again");
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }

    /// Says what is wrong, once for as long as it stays the same.
    fn complain(&mut self, error: &watcher::Error) {
        let text = describe(W::KIND, error);
        if self.trouble.as_deref() != Some(&text) {
            let meanwhile = if W::KIND.is_dispensable() && is_refused(error) {
                "Services are served all the same, but no new host ports"
            } else {
                "everything stays as it is"
            };
            tracing::warn!(kind = %W::KIND, "{text}; {meanwhile}, and the server is asked again");
            self.trouble = Some(text);
        }
    }
}

/// We may not read this kind.
fn is_refused(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};

    match error {
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => {
            matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403))
        }
        _ => false,
    }
}

/// A watch that may not even begin where it should: the list has to be read again.
fn is_gone_at_start(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

fn describe(kind: Kind, error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};

    match error {
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => match error {
            kube::Error::Api(status) if matches!(status.code, 401 | 403) => format!(
                "the API server does not let us read {kind}: {}; grant get, list and watch",
                status.message
            ),
            kube::Error::Api(status) if status.code == 404 => {
                format!("the API server has no {kind}")
            }
            kube::Error::Api(status) => format!("the API server answers {}: {}", status.code, status.message),
            error => format!("the API server cannot be asked: {}", with_causes(error)),
        },
        error => with_causes(error),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // Many errors repeat their cause.
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}
