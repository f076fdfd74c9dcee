//! Where the objects of an explanation come from: files, a directory, the API server, or what the agent kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::ListParams;
use kube::core::Request;
use serde_json::Value;

use super::{NodeFacts, Objects, Subject, owner};
use crate::entries::ServiceName;
use crate::kept;
use crate::owner::Owner;
use crate::settings::host_name;
use crate::source::convert::SERVICE_NAME_LABEL;
use crate::source::kubernetes;
use crate::source::manifests::{documents, flattened, names_in};

/// Objects in one answer of a list.
const PAGE: u32 = 200;

/// How long the API server may take for all of it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where to look.
#[derive(Clone, Debug)]
pub struct Source {
    /// `-` is standard input; empty: the directory, else the API server.
    pub files: Vec<PathBuf>,
    pub manifests: Option<PathBuf>,
    pub kubeconfig: Option<PathBuf>,
    pub master: Option<String>,
    /// What the agent kept, for when the API server cannot be asked.
    pub state_file: PathBuf,
    /// Whose view it is, if somebody says so.
    pub node_name: Option<String>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub objects: Objects,
    pub node: NodeFacts,
    /// The explanation is for the node that this runs on, and of what its agent is told.
    pub is_here: bool,
    /// Where it comes from, for people.
    pub source: String,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// Finds what explains `subject`.
pub async fn load(subject: &Subject, namespace: &str, source: &Source) -> Result<Loaded> {
    let mut found = Found::default();
    if !source.files.is_empty() {
        for path in &source.files {
            found.file(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        let names: Vec<_> = source.files.iter().map(|path| path.display().to_string()).collect();
        return found.finish(subject, source, names.join(", "), false);
    }
    if let Some(dir) = &source.manifests {
        let names = names_in(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        for path in names.into_iter().map(|name| dir.join(name)) {
            if let Err(error) = found.file(&path) {
                found.notes.push(format!("{}: {error}", path.display()));
            }
        }
        return found.finish(subject, source, dir.display().to_string(), true);
    }
    let asked = tokio::time::timeout(PATIENCE, found.ask(subject, namespace, source)).await;
    let failed = match asked {
        Ok(Ok(())) => return found.finish(subject, source, "the API server".into(), true),
        Ok(Err(error)) => error,
        Err(_) => anyhow::anyhow!("the API server does not answer within {} s", PATIENCE.as_secs()),
    };
    // What the API server says matters more than why nothing was kept.
    let Ok(Some(kept)) = kept::file::read_any(&source.state_file) else { return Err(failed) };
    let saved = Timestamp::from_second(kept.saved).map(|time| time.to_string()).unwrap_or_default();
    let mut found = Found { objects: Objects::kept(&kept.objects), notes: vec![] };
    found.notes.push(format!("{failed:#}; nothing is known of Pods, selectors and targetPorts"));
    let source = Source { node_name: Some(kept.identity.node), ..source.clone() };
    let mut loaded = found.finish(subject, &source, format!("what the agent kept at {saved}"), true)?;
    loaded.is_here = true;
    loaded.node.addresses.extend(own_addresses());
    Ok(loaded)
}

#[derive(Default)]
struct Found {
    objects: Objects,
    notes: Vec<String>,
}

impl Found {
    /// What one file says. An object that cannot be read is noted.
    fn file(&mut self, path: &Path) -> io::Result<()> {
        let (name, documents) = if path == Path::new("-") {
            ("standard input".to_owned(), documents(io::stdin().lock())?)
        } else {
            if fs::metadata(path)?.is_dir() {
                return Err(io::Error::new(
                    io::ErrorKind::IsADirectory,
                    "it is a directory; use --manifests",
                ));
            }
            (path.display().to_string(), documents(File::open(path)?)?)
        };
        for document in documents {
            if let Err(problem) = document.and_then(|object| self.objects.add(object)) {
                self.notes.push(format!("{name}: {problem}"));
            }
        }
        Ok(())
    }

    fn finish(self, subject: &Subject, from: &Source, source: String, live: bool) -> Result<Loaded> {
        let host = host_name().context("cannot read the host name")?;
        let (mut node, is_host) = node(&self.objects, subject, from.node_name.as_deref(), &host);
        let is_here = live && is_host;
        if is_here {
            node.addresses.extend(own_addresses());
        }
        Ok(Loaded { objects: self.objects, node, is_here, source, notes: self.notes })
    }

    /// Asks the API server for what explains `subject`, and for nothing else.
    async fn ask(&mut self, subject: &Subject, namespace: &str, source: &Source) -> Result<()> {
        let options = kubernetes::Options {
            kubeconfig: source.kubeconfig.clone(),
            master: source.master.clone(),
            node_name: String::new(),
            all_nodes: false,
        };
        let client = kubernetes::client(&options).await?;
        let host = host_name().context("cannot read the host name")?;
        let own = source.node_name.as_ref().unwrap_or(&host);
        // Whose address it is, every Node may say.
        let nodes = match subject {
            Subject::Address(..) => ListParams::default(),
            Subject::Service(_) => ListParams::default().fields(&format!("metadata.name={own}")),
        };
        self.list(&client, "/api/v1/services", ListParams::default()).await?;
        self.list(&client, "/api/v1/nodes", nodes).await?;
        let (mut node, is_host) = node(&self.objects, subject, source.node_name.as_deref(), &host);
        if is_host {
            node.addresses.extend(own_addresses());
        }
        let here = ListParams::default().fields(&format!("spec.nodeName={}", node.name));
        self.pods(&client, "/api/v1/pods", here).await?;
        if let Ok(Owner::Service(name)) = owner(subject, namespace, &self.objects, &node) {
            self.service(&client, &name).await?;
        }
        Ok(())
    }

    async fn service(&mut self, client: &Client, name: &ServiceName) -> Result<()> {
        let in_namespace = |group: &str, kind: &str| format!("/{group}/namespaces/{}/{kind}", name.namespace);
        let labels = format!("{SERVICE_NAME_LABEL}={}", name.name);
        let slices = in_namespace("apis/discovery.k8s.io/v1", "endpointslices");
        self.list(client, &slices, ListParams::default().labels(&labels)).await?;
        let written = self.objects.services.get(name).and_then(|service| service.written.as_ref());
        let selector = written.map(|written| written.selector.clone()).unwrap_or_default();
        if selector.is_empty() || self.objects.pods.is_none() {
            return Ok(());
        }
        let pods = in_namespace("api/v1", "pods");
        let labels: Vec<_> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        self.pods(client, &pods, ListParams::default().labels(&labels.join(","))).await?;
        let any = self.objects.pods_in(&name.namespace).any(|pod| pod.is_selected(&selector));
        if !any {
            // Which labels they have that are there.
            self.pods(client, &pods, ListParams::default()).await?;
        }
        Ok(())
    }

    /// Lists Pods, which may not be readable.
    async fn pods(&mut self, client: &Client, path: &str, params: ListParams) -> Result<()> {
        match self.list(client, path, params).await {
            Err(kube::Error::Api(status)) if status.code == 403 => {
                self.objects.pods = None;
                self.notes.push(format!("Pods may not be read, nothing is said of them: {}", status.message));
                Ok(())
            }
            Err(error) => Err(error.into()),
            Ok(()) => {
                self.objects.pods.get_or_insert_with(BTreeMap::new);
                Ok(())
            }
        }
    }

    async fn list(&mut self, client: &Client, path: &str, mut params: ListParams) -> Result<(), kube::Error> {
        params = params.limit(PAGE);
        loop {
            let request = Request::new(path).list(&params).map_err(kube::Error::BuildRequest)?;
            let list: Value = client.request(request).await?;
            let next = list["metadata"]["continue"].as_str().unwrap_or_default().to_owned();
            for object in flattened(list) {
                if let Err(problem) = object.and_then(|object| self.objects.add(object)) {
                    self.notes.push(format!("the API server: {problem}"));
                }
            }
            if next.is_empty() {
                return Ok(());
            }
            params = params.continue_token(&next);
        }
    }
}

/// Whose view it is: the node that is given, else that whose address is asked for, else this one, else the only one that
/// is known. And whether it is the one that this runs on.
fn node(objects: &Objects, subject: &Subject, given: Option<&str>, host: &str) -> (NodeFacts, bool) {
    let named = |name: &str| objects.nodes.iter().find(|node| node.name == name);
    let asked = match subject {
        Subject::Address(at, _) => objects.nodes.iter().find(|node| node.addresses.contains(&at.ip())),
        Subject::Service(_) => None,
    };
    let only = || if let [node] = objects.nodes.as_slice() { Some(node) } else { None };
    let node = match given {
        Some(name) => named(name),
        None => asked.or_else(|| named(host)).or_else(only),
    };
    let name = given.unwrap_or_else(|| node.map_or(host, |node| &node.name));
    let facts =
        node.map_or_else(|| NodeFacts { known: given.is_some(), ..NodeFacts::unknown(name) }, NodeFacts::of);
    let is_host = match &facts.addresses {
        // A node may be called otherwise than its host.
        unknown if unknown.is_empty() => given.is_some() || name == host,
        known => name == host || !known.is_disjoint(&own_addresses()),
    };
    (facts, is_host)
}

/// Addresses of this network namespace; loopback answers anyway.
fn own_addresses() -> BTreeSet<IpAddr> {
    let Ok(addresses) = nix::ifaddrs::getifaddrs() else { return BTreeSet::new() };
    let addresses = addresses.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    });
    addresses.collect()
}

/// A name as Kubernetes has them: it becomes part of a URL.
pub fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if name.is_empty() || !name.chars().all(fits) {
        bail!("{name:?} is no name: lower-case letters, digits and -");
    }
    Ok(())
}
