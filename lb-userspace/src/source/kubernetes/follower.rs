//! Lists one kind, page by page, and watches it from there on.
//!
//! Not [`kube::runtime::watcher`], which asks again without a pause when a server ends every watch at once,
//! waits for ever for the answer to a list, and never lists again after an error that stays.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use kube::api::{ListMeta, ListParams, WatchEvent, WatchParams};
use kube::core::{Request, Status};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout};

use super::slim::{Slim, Unreadable};
use super::{PAGE, WATCH_SECONDS, Watched};
use crate::model::Objects;
use crate::source::known::Known;
use crate::source::{Closed, Event, Sender};

/// How long an answer, or the next line of a watch, may stay away: the connection is dead then. A living
/// server ends a watch sooner.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// A watch that ends sooner without a word is no use: the next one waits like after an error.
const SHORT: Duration = Duration::from_secs(1);

/// How long to wait if the back-off has no opinion.
const PAUSE: Duration = Duration::from_secs(30);

/// An answer to a list. What an item says is read when it is its turn, and forgotten before the next.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// Why a list or a watch ended.
enum Ended {
    Closed,
    /// The server said this of the request.
    Refused(Box<Status>),
    /// The server said this within a watch.
    Broken(Box<Status>),
    Failed(kube::Error),
    Silent,
    Short,
    NoVersion,
}

impl From<Closed> for Ended {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

impl From<kube::Error> for Ended {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused(status),
            error => Self::Failed(error),
        }
    }
}

impl Ended {
    /// The server does not know (any more) what happened since the version that we have.
    fn means_gone(&self) -> bool {
        match self {
            Self::Broken(_) => true,
            // The store was restored from a backup: the version that we have is yet to come.
            Self::Refused(status) if status.message.contains("Too large resource version") => true,
            Self::Refused(status) => {
                let later = matches!(status.code, 401 | 403 | 408 | 429);
                status.code < 500 && !later
            }
            _ => false,
        }
    }

    /// We may not read this kind.
    fn means_refused(&self) -> bool {
        matches!(self, Self::Refused(status) if matches!(status.code, 401 | 403))
    }
}

/// Follows one kind.
pub(super) struct Follower<W: Watched> {
    client: Client,
    api: Api<Slim<W>>,
    config: watcher::Config,
    events: Sender,
    known: Known<W::Name>,
    backoff: Box<dyn Backoff>,
    /// What went wrong last, and was said.
    trouble: Option<String>,
    /// What is wrong with objects that cannot be read, as was said.
    unreadable: BTreeMap<W::Name, String>,
}

impl<W: Watched> Follower<W> {
    pub(super) fn new(
        client: &Client,
        config: watcher::Config,
        events: &Sender,
        backoff: Box<dyn Backoff>,
        kept: &Objects,
    ) -> Self {
        let (client, api, events) = (client.clone(), Api::all(client.clone()), events.clone());
        let (known, unreadable) = (Known::with(W::names(kept)), BTreeMap::new());
        Self { client, api, config, events, known, backoff, trouble: None, unreadable }
    }

    pub(super) async fn run(mut self) {
        // Ends only when nobody listens any more.
        while let Ok(()) = self.follow().await {}
    }

    /// Until a list has to be read.
    async fn follow(&mut self) -> Result<(), Closed> {
        let mut version = match self.list().await {
            Ok(version) => version,
            Err(ended) => return self.pause(&ended).await,
        };
        loop {
            if let Err(ended) = self.watch(&mut version).await {
                self.pause(&ended).await?;
                if ended.means_gone() {
                    return Ok(());
                }
            }
        }
    }

    /// Reads everything that there is; answers its version.
    async fn list(&mut self) -> Result<String, Ended> {
        let mut params = ListParams {
            label_selector: self.config.label_selector.clone(),
            field_selector: self.config.field_selector.clone(),
            ..ListParams::default().limit(PAGE)
        };
        let resource = Request::new(W::Object::url_path(&(), None));
        self.known.begin();
        loop {
            let request = resource.list(&params).map_err(kube::Error::BuildRequest)?;
            let answer = timeout(SILENCE, self.client.request_text(request)).await;
            let text = answer.map_err(|_| Ended::Silent)??;
            let page: Page<'_> = serde_json::from_str(&text).map_err(kube::Error::SerdeError)?;
            for item in page.items.unwrap_or_default() {
                let object = Slim::read(item.get()).map_err(kube::Error::SerdeError)?;
                self.exists(object).await?;
            }
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_some() {
                continue;
            }
            let version = page.metadata.resource_version.filter(|version| !version.is_empty());
            let version = version.ok_or(Ended::NoVersion)?;
            for name in self.known.finish() {
                self.gone(name).await?;
            }
            self.works().await?;
            self.send(Event::Listed(W::KIND)).await?;
            return Ok(version);
        }
    }

    /// Takes what changed since `version`, and keeps that up to date, until the server ends the watch.
    async fn watch(&mut self, version: &mut String) -> Result<(), Ended> {
        let params = WatchParams {
            label_selector: self.config.label_selector.clone(),
            field_selector: self.config.field_selector.clone(),
            // Allows bookmarks.
            ..WatchParams::default().timeout(WATCH_SECONDS)
        };
        let begun = Instant::now();
        let stream =
            timeout(SILENCE, self.api.watch(&params, version)).await.map_err(|_| Ended::Silent)??;
        let mut stream = pin!(stream);
        let mut useful = false;
        while let Some(event) = timeout(SILENCE, stream.next()).await.map_err(|_| Ended::Silent)? {
            let now = match event? {
                WatchEvent::Error(status) => return Err(Ended::Broken(status)),
                WatchEvent::Bookmark(bookmark) => bookmark.metadata.resource_version,
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let version = object.version().to_owned();
                    self.exists(object).await?;
                    version
                }
                WatchEvent::Deleted(object) => {
                    let name = object.name();
                    self.known.gone(&name);
                    self.gone(name).await?;
                    object.version().to_owned()
                }
            };
            if !now.is_empty() {
                *version = now;
            }
            useful = true;
            self.works().await?;
        }
        if !useful && begun.elapsed() < SHORT {
            return Err(Ended::Short);
        }
        Ok(self.works().await?)
    }

    async fn exists(&mut self, object: Slim<W>) -> Result<(), Closed> {
        let name = object.name();
        self.known.exists(&name);
        match object.content {
            Ok(object) => {
                self.note_unreadable(&name, None).await?;
                self.send(Event::Changed(object.changed())).await
            }
            Err(Unreadable { error, .. }) => {
                if self.unreadable.get(&name) != Some(&error) {
                    tracing::warn!(kind = %W::KIND, %name, "it cannot be read, and stays as it was: {error}");
                }
                self.note_unreadable(&name, Some(error)).await
            }
        }
    }

    async fn gone(&mut self, name: W::Name) -> Result<(), Closed> {
        self.note_unreadable(&name, None).await?;
        self.send(Event::Changed(W::gone(name))).await
    }

    /// Why an object cannot be read; `None`: it can, or is gone.
    async fn note_unreadable(&mut self, name: &W::Name, error: Option<String>) -> Result<(), Closed> {
        let before = self.unreadable.len();
        if let Some(error) = error {
            self.unreadable.insert(name.clone(), error);
        } else {
            self.unreadable.remove(name);
        }
        if self.unreadable.len() != before {
            self.send(Event::Unreadable(Some(W::KIND), self.unreadable.len())).await?;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }

    async fn works(&mut self) -> Result<(), Closed> {
        if self.trouble.take().is_none() {
            return Ok(());
        }
        tracing::info!(kind = %W::KIND, "the API server answers again");
        self.send(Event::Answers(W::KIND, true)).await
    }

    /// Says what is wrong, once for as long as it stays the same, and waits.
    async fn pause(&mut self, ended: &Ended) -> Result<(), Closed> {
        let text = match ended {
            Ended::Closed => return Err(Closed),
            ended => describe::<W>(ended),
        };
        let does_without = W::KIND.is_dispensable() && ended.means_refused();
        if does_without {
            self.send(Event::Refused(W::KIND)).await?;
        }
        if self.trouble.as_deref() != Some(&text) {
            let meanwhile = if does_without {
                "Services are served all the same, but no new host ports"
            } else {
                "everything stays as it is"
            };
            tracing::warn!(kind = %W::KIND, "{text}; {meanwhile}, and the server is asked again");
            self.trouble = Some(text);
            // What is done without is not missed.
            self.send(Event::Answers(W::KIND, does_without)).await?;
        }
        let pause = self.backoff.next().unwrap_or(PAUSE);
        tokio::select! {
            () = tokio::time::sleep(pause) => Ok(()),
            () = self.events.closed() => Err(Closed),
        }
    }
}

fn describe<W: Watched>(ended: &Ended) -> String {
    let (kind, resource, group) = (W::KIND, W::Object::plural(&()), W::Object::group(&()));
    match ended {
        Ended::Refused(status) | Ended::Broken(status) => match status.code {
            401 => format!(
                "the API server does not know us (401: {}): is the token or certificate still valid?",
                status.message
            ),
            403 => format!(
                "the API server does not let us read {kind}: {}; a ClusterRole of ours needs apiGroups: \
                 [{group:?}], resources: [{resource:?}], verbs: [\"list\", \"watch\"]",
                status.message
            ),
            404 => format!("the API server has no {kind}"),
            410 => {
                format!("the API server has forgotten what changed since we asked last: {}", status.message)
            }
            code => format!("the API server answers {code}: {}", status.message),
        },
        Ended::Failed(error) => format!("the API server cannot be asked: {}", with_causes(error)),
        Ended::Silent => {
            format!("the API server has not said anything for {} seconds", SILENCE.as_secs())
        }
        Ended::Short => "the API server ends every watch at once".to_owned(),
        Ended::NoVersion => format!("the API server lists {kind} without a resourceVersion"),
        // Said by nobody: nobody listens.
        Ended::Closed => String::new(),
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
