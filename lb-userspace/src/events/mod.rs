//! Events (events.k8s.io) on Services that do not work as written: what the log says, where whoever wrote the
//! Service looks.
//!
//! Nothing waits for them. What is too much, does not fit into the channel or cannot be sent is counted, and is in
//! the log all the same.

mod limit;

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::sync::mpsc::{self, error::TrySendError};

use self::limit::Limiter;
use crate::entries::ServiceName;
use crate::finding::Finding;

/// Events on their way.
const CHANNEL: usize = 64;

/// How long sending one may take, how often it is tried, and the first pause between.
const TIMEOUT: Duration = Duration::from_secs(10);
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// Bytes of a note, and of a name, that the API takes.
const NOTE: usize = 1024;
const NAME: usize = 253;

/// Who tells, in every Event.
const CONTROLLER: &str = "fairlead";

/// What became of Events, by the label `outcome`.
#[derive(Clone, Debug)]
pub struct Outcomes(Family<[(&'static str, &'static str); 1], Counter>);

#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// The API server has it.
    Sent,
    /// It was one too many.
    Limited,
    /// Too many were on their way.
    Dropped,
    /// The API server could not be asked, or would not have it.
    Failed,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Sent, Self::Limited, Self::Dropped, Self::Failed];

    fn label(self) -> [(&'static str, &'static str); 1] {
        let value = match self {
            Self::Sent => "sent",
            Self::Limited => "limited",
            Self::Dropped => "dropped",
            Self::Failed => "failed",
        };
        [("outcome", value)]
    }
}

impl Default for Outcomes {
    fn default() -> Self {
        let family = Family::default();
        for outcome in Outcome::ALL {
            drop(family.get_or_create(&outcome.label()));
        }
        Self(family)
    }
}

impl Outcomes {
    /// The metric.
    pub fn family(&self) -> &Family<[(&'static str, &'static str); 1], Counter> {
        &self.0
    }

    fn note(&self, outcome: Outcome) {
        self.0.get_or_create(&outcome.label()).inc();
    }
}

/// Where findings become Events.
#[derive(Debug)]
pub struct Events {
    node_name: String,
    sender: mpsc::Sender<Event>,
    limiter: Limiter,
    outcomes: Outcomes,
}

impl Events {
    /// Sends Events for as long as what it returns lives. Needs a runtime around it.
    pub fn start(client: Client, node_name: &str, outcomes: &Outcomes) -> Self {
        let (events, receiver) = Self::new(node_name, outcomes);
        tokio::spawn(send_all(client, receiver, outcomes.clone()));
        events
    }

    fn new(node_name: &str, outcomes: &Outcomes) -> (Self, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let limiter = Limiter::new(Instant::now());
        (Self { node_name: node_name.to_owned(), sender, limiter, outcomes: outcomes.clone() }, receiver)
    }

    /// Tells what is wrong with a Service; `uid` may be empty. Does not wait.
    pub fn tell(&mut self, name: &ServiceName, uid: &str, finding: &Finding) {
        if !self.limiter.admit(name, Instant::now()) {
            self.outcomes.note(Outcome::Limited);
            return;
        }
        match self.sender.try_send(event(name, uid, finding, &self.node_name)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => self.outcomes.note(Outcome::Dropped),
        }
    }
}

fn event(service: &ServiceName, uid: &str, finding: &Finding, node_name: &str) -> Event {
    let now = Timestamp::now();
    let suffix = format!(".{:x}", now.as_nanosecond());
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(service.namespace.to_string()),
        name: Some(service.name.to_string()),
        uid: (!uid.is_empty()).then(|| uid.to_owned()),
        ..ObjectReference::default()
    };
    Event {
        metadata: ObjectMeta {
            namespace: regarding.namespace.clone(),
            name: Some(format!("{}{suffix}", shortened(&service.name, NAME - suffix.len()))),
            ..ObjectMeta::default()
        },
        type_: Some("Warning".into()),
        reason: Some(finding.kind()),
        note: Some(shortened(&finding.to_string(), NOTE).to_owned()),
        action: Some("Serve".into()),
        event_time: Some(MicroTime(now)),
        regarding: Some(regarding),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    }
}

/// As much of `text` as fits into so many bytes.
fn shortened(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

async fn send_all(client: Client, mut events: mpsc::Receiver<Event>, outcomes: Outcomes) {
    // What is wrong was said, and may be wrong for long.
    let mut said = false;
    while let Some(event) = events.recv().await {
        match send(&client, &event).await {
            Ok(()) => {
                said = false;
                outcomes.note(Outcome::Sent);
            }
            Err(error) => {
                if !said {
                    tracing::warn!("Events about Services cannot be sent: {error}; the log has them all");
                }
                said = true;
                outcomes.note(Outcome::Failed);
            }
        }
    }
}

async fn send(client: &Client, event: &Event) -> Result<(), String> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let mut pause = PAUSE;
    let mut attempt = 1;
    loop {
        let outcome = tokio::time::timeout(TIMEOUT, api.create(&PostParams::default(), event)).await;
        let error = match outcome {
            Ok(Ok(_)) => return Ok(()),
            // It would say the same again.
            Ok(Err(kube::Error::Api(status))) if status.code < 500 && status.code != 429 => {
                let hint = if status.code == 403 { "; grant create on events.events.k8s.io" } else { "" };
                return Err(format!("{}{hint}", status.message));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {TIMEOUT:?}"),
        };
        if attempt == ATTEMPTS {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ServiceName {
        ServiceName { namespace: "ns".into(), name: name.into() }
    }

    fn finding(value: &str) -> Finding {
        Finding::BadAddress { field: "spec.externalIPs".into(), value: value.into() }
    }

    fn count(outcomes: &Outcomes, outcome: Outcome) -> u64 {
        outcomes.0.get_or_create(&outcome.label()).get()
    }

    #[test]
    fn an_event_says_what_of_which_and_who_says_so() {
        let event = event(&name("svc"), "u-1", &finding("x"), "node-a");
        let regarding = event.regarding.unwrap();
        assert_eq!((regarding.kind.as_deref(), regarding.uid.as_deref()), (Some("Service"), Some("u-1")));
        assert_eq!((event.type_.as_deref(), event.reason.as_deref()), (Some("Warning"), Some("BadAddress")));
        assert_eq!(
            event.note.as_deref(),
            Some("spec.externalIPs: \"x\" is not an IP address; it is left out")
        );
        assert_eq!(event.reporting_controller.as_deref(), Some("fairlead"));
        assert_eq!(event.reporting_instance.as_deref(), Some("node-a"));
        assert!(event.metadata.name.unwrap().starts_with("svc."));
    }

    /// Rule 156.
    #[test]
    fn an_event_is_no_longer_than_the_api_takes() {
        let event = event(&name(&"n".repeat(300)), "", &finding(&"ü".repeat(2000)), "node-a");
        assert_eq!(event.metadata.name.unwrap().len(), NAME);
        let note = event.note.unwrap();
        assert!(note.len() <= NOTE && note.len() > NOTE - 4, "{}", note.len());
        assert_eq!(event.regarding.unwrap().uid, None);
    }

    #[test]
    fn nobody_waits_for_an_event() {
        let outcomes = Outcomes::default();
        let (mut events, mut receiver) = Events::new("node-a", &outcomes);
        for n in 0..200 {
            events.tell(&name(&format!("svc{n}")), "", &finding("x"));
        }
        let sent = std::iter::from_fn(|| receiver.try_recv().ok()).count();
        assert!((50..=CHANNEL).contains(&sent), "{sent}");
        let lost = count(&outcomes, Outcome::Limited) + count(&outcomes, Outcome::Dropped);
        assert_eq!(sent as u64 + lost, 200);
        drop(receiver);
        events.limiter = Limiter::new(Instant::now());
        let before = count(&outcomes, Outcome::Dropped);
        events.tell(&name("svc"), "", &finding("x"));
        assert_eq!(count(&outcomes, Outcome::Dropped), before + 1);
    }
}
