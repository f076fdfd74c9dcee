//! The Kubernetes API server: Services, EndpointSlices, this one Node and its Pods, listed and watched for as long as
//! the agent lives.
//!
//! Asks only for what it uses (label and field selectors, no write access), and converts each object while
//! it is read: no list of whole objects is ever held. An API server that cannot be reached, refuses, or has
//! forgotten where we were is asked again, ever less often; until then everything stays as it was.

mod bounded;
mod follower;
mod slim;

use std::fmt::{Debug, Display};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff};
use kube::{Client, Config, Resource};
use serde::Deserialize;
use tokio::task::JoinSet;
use tower_http::map_response_body::MapResponseBodyLayer;

use self::bounded::Bounded;
use self::follower::Follower;
use super::convert::ServiceCidr;
use super::{Kind, Sender, convert};
use crate::entries::ServiceName;
use crate::model::{Change, EndpointSlice, Node, Pod, Service, SliceName};
use crate::owner::PodName;

/// What kube-proxy asks for, too.
const LABELS: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";

/// Objects in one answer of a list.
const PAGE: u32 = 200;

/// How long one watch request lives, in seconds.
const WATCH_SECONDS: u32 = 120;

/// How long bytes of an answer may stay away, whatever waits for them; longer than a watch lives.
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
    // Whoever asks waits and asks again.
    config.default_retry = false;
    let builder = ClientBuilder::try_from(config).map_err(Error::Client)?;
    Ok(builder.with_layer(&MapResponseBodyLayer::new(Bounded::new)).build())
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
    type Object: Resource<DynamicType = (), Scope: Send> + for<'de> Deserialize<'de> + Default + 'static;
    type Name: Ord + Clone + Display + Send;
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
