//! The Kubernetes API server: Services, EndpointSlices, this one Node and its Pods, listed and watched for as long as
//! the agent lives.
//!
//! Asks only for what it uses (label and field selectors, no write access), and converts each object while
//! it is read: no list of whole objects is ever held. An API server that cannot be reached, refuses, or has
//! forgotten where we were is asked again, ever less often; until then everything stays as it was.

mod bounded;
mod follower;
mod slim;

use std::collections::BTreeSet;
use std::fmt::{Debug, Display};
use std::net::SocketAddr;
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
use crate::model::{Change, EndpointSlice, Node, Objects, Pod, Service, SliceName};
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
    /// Other nodes are followed, too.
    pub all_nodes: bool,
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
    connect(configuration(options).await?)
}

/// A client of this configuration.
pub fn connect(config: Config) -> Result<Client, Error> {
    let builder = ClientBuilder::try_from(config).map_err(Error::Client)?;
    Ok(builder.with_layer(&MapResponseBodyLayer::new(Bounded::new)).build())
}

/// Where the API server is, and who we are to it.
pub async fn configuration(options: &Options) -> Result<Config, Error> {
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
    Ok(config)
}

/// The address that the API server is asked at; none: it has a name.
pub fn address(config: &Config) -> Option<SocketAddr> {
    let url = &config.cluster_url;
    let addr = url.host()?.trim_matches(['[', ']']).parse().ok()?;
    let default = if url.scheme_str() == Some("http") { 80 } else { 443 };
    Some(SocketAddr::new(addr, url.port_u16().unwrap_or(default)))
}

/// Tells clusters apart: a checksum of the certificates that the API server is believed by.
pub fn cluster(config: &Config) -> Option<u32> {
    config.root_cert.as_ref().map(|certificates| crc32fast::hash(&certificates.concat()))
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

/// Whose Node objects are followed.
#[derive(Clone, Copy, Debug)]
pub struct Nodes<'a> {
    /// This node.
    pub name: &'a str,
    /// The others, too.
    pub all: bool,
}

/// Follows every kind until the receiver of `events` is gone, or the set is dropped. Who listens knows `kept` already:
/// what of it there is no more is told as gone.
pub fn follow(client: &Client, nodes: Nodes<'_>, events: &Sender, kept: &Objects) -> JoinSet<()> {
    follow_with(client, nodes, events, kept, || Box::new(DefaultBackoff::default()))
}

/// [`follow`] with a patience of its own.
pub fn follow_with(
    client: &Client,
    nodes: Nodes<'_>,
    events: &Sender,
    kept: &Objects,
    backoff: fn() -> Box<dyn Backoff>,
) -> JoinSet<()> {
    let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    let labelled = config.clone().labels(LABELS);
    let cidrs = Follower::<ServiceCidr>::new(client, config.clone(), events, backoff(), kept);
    let here = config.clone().fields(&format!("spec.nodeName={}", nodes.name));
    let ours = if nodes.all { config } else { config.fields(&format!("metadata.name={}", nodes.name)) };
    let mut tasks = JoinSet::new();
    let services = Follower::<Service>::new(client, labelled.clone(), events, backoff(), kept);
    tasks.spawn(services.run());
    let slices = Follower::<EndpointSlice>::new(client, labelled, events, backoff(), kept);
    tasks.spawn(slices.run());
    let nodes = Follower::<Node>::new(client, ours, events, backoff(), kept);
    tasks.spawn(nodes.run());
    let pods = Follower::<Pod>::new(client, here, events, backoff(), kept);
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
    /// Of the objects of this kind in `objects`.
    fn names(objects: &Objects) -> BTreeSet<Self::Name>;
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

    fn names(objects: &Objects) -> BTreeSet<ServiceName> {
        objects.services.iter().map(|service| service.name.clone()).collect()
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

    fn names(objects: &Objects) -> BTreeSet<SliceName> {
        objects.slices.iter().map(|slice| slice.name.clone()).collect()
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

    fn names(objects: &Objects) -> BTreeSet<PodName> {
        objects.pods.iter().map(|pod| pod.name.clone()).collect()
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

    fn names(objects: &Objects) -> BTreeSet<String> {
        objects.node.iter().map(|node| node.name.clone()).chain(objects.peers.keys().cloned()).collect()
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

    fn names(objects: &Objects) -> BTreeSet<String> {
        objects.service_cidrs.iter().flatten().map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_api_server_is() {
        let addr = |url: &str| address(&Config::new(url.parse().unwrap())).map(|addr| addr.to_string());
        assert_eq!(addr("https://10.96.0.1").as_deref(), Some("10.96.0.1:443"));
        assert_eq!(addr("https://[fd00:10:96::1]:6443/").as_deref(), Some("[fd00:10:96::1]:6443"));
        assert_eq!(addr("http://127.0.0.1/").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(addr("https://kubernetes.default.svc"), None);
    }

    #[test]
    fn clusters_differ_by_their_certificates() {
        let of = |certificates: Option<&[&[u8]]>| {
            let mut config = Config::new(http::Uri::from_static("https://10.96.0.1"));
            config.root_cert = certificates.map(|all| all.iter().map(|bytes| bytes.to_vec()).collect());
            cluster(&config)
        };
        assert_eq!(of(None), None);
        assert_eq!(of(Some(&[b"one"])), of(Some(&[b"one"])));
        assert_ne!(of(Some(&[b"one"])), of(Some(&[b"two"])));
    }
}
