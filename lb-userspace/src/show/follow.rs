//! `fairlead flows --follow`: flows that come, change and end, found by walking over the tables again and again, in slices
//! with pauses between them.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::To;
use super::flows::{FlowFilter, FlowLine, Part, header};
use crate::inspect::{FlowPosition, FlowView, Inspector, Labels};

/// Between two slices, so that a walk over a million entries takes at most a part of a CPU.
const PAUSE: Duration = Duration::from_millis(5);
/// Flows that are told of at a time: one takes up to 700 bytes as long as it is there, and one beyond them 16.
const FOLLOWED: usize = 100_000;
/// Names are read again after so many walks, and when a number without a name is met.
const LABELS_GOOD_FOR: u32 = 60;

/// What became of a flow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Event {
    New,
    /// Its state, or where it leads.
    Changed,
    /// It is in no table any more.
    Ended,
}

impl Event {
    const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Ended => "ended",
        }
    }
}

/// A line of JSON.
#[derive(Serialize)]
struct Told<'a> {
    event: Event,
    /// When it was seen, RFC 3339.
    at: String,
    #[serde(flatten)]
    flow: FlowLine<'a>,
}

/// What makes an entry this one.
type Id = (&'static str, u8, IpAddr, u16, IpAddr, u16);

fn id(flow: &FlowView) -> Id {
    (flow.side, flow.protocol, flow.source, flow.source_port, flow.destination, flow.destination_port)
}

/// The flows of the last walk, and of the one under way.
#[derive(Debug)]
struct Known {
    flows: HashMap<Id, (FlowView, u32)>,
    /// How many of them there may be.
    limit: usize,
    /// Hashes of those beyond. They stay untold until they end: with room for them again they would not be new.
    beyond: HashMap<u64, u32>,
    hasher: RandomState,
    /// Number of the walk under way.
    walk: u32,
}

impl Known {
    fn with_limit(limit: usize) -> Self {
        Self { flows: HashMap::new(), limit, beyond: HashMap::new(), hasher: RandomState::new(), walk: 0 }
    }

    /// What a sight of a flow is; `None`: nothing new.
    fn see(&mut self, flow: FlowView) -> Option<Event> {
        let is_full = self.flows.len() >= self.limit;
        match self.flows.entry(id(&flow)) {
            Entry::Vacant(entry) => {
                // Without others beyond, which is as it should be, nothing is hashed.
                if is_full || !self.beyond.is_empty() {
                    let hash = self.hasher.hash_one(entry.key());
                    if is_full || self.beyond.contains_key(&hash) {
                        self.beyond.insert(hash, self.walk);
                        return None;
                    }
                }
                entry.insert((flow, self.walk));
                Some(Event::New)
            }
            Entry::Occupied(mut entry) => {
                let (before, walk) = entry.get_mut();
                *walk = self.walk;
                let event = change(before, &flow);
                if event.is_some() {
                    *before = flow;
                } else {
                    before.idle_seconds = flow.idle_seconds;
                }
                event
            }
        }
    }

    /// The walk has ended: those that it did not meet.
    fn end_walk(&mut self) -> Vec<FlowView> {
        let walk = self.walk;
        let ended = self.flows.extract_if(|_, (_, met)| *met != walk).map(|(_, (flow, _))| flow).collect();
        self.beyond.retain(|_, met| *met == walk);
        self.walk = walk.wrapping_add(1);
        ended
    }
}

fn change(before: &FlowView, now: &FlowView) -> Option<Event> {
    // A pending entry is left beside the promoted one for a moment.
    if now.state == "pending" && before.state == "established" {
        return None;
    }
    let has_ended = matches!(before.state, "closing" | "closed");
    let begins = matches!(now.state, "pending" | "established");
    if has_ended && begins {
        return Some(Event::New);
    }
    let is_the_same = FlowView { idle_seconds: before.idle_seconds, ..now.clone() } == *before;
    (!is_the_same).then_some(Event::Changed)
}

/// Where lines go.
struct Teller<'a> {
    out: &'a mut dyn Write,
    json: bool,
    wide: bool,
}

impl Teller<'_> {
    fn begin(&mut self) -> Result<()> {
        if !self.json {
            writeln!(self.out, "{:20}  {:7}  {}", "AT", "EVENT", header(self.wide))?;
            self.out.flush()?;
        }
        Ok(())
    }

    fn tell(&mut self, event: Event, flow: &FlowView, labels: &Labels) -> Result<()> {
        let at = Timestamp::now().as_second();
        let at = Timestamp::from_second(at).unwrap_or_default().to_string();
        let line = FlowLine::new(flow, labels);
        if self.json {
            serde_json::to_writer(&mut self.out, &Told { event, at, flow: line })?;
            return Ok(writeln!(self.out)?);
        }
        Ok(writeln!(self.out, "{at:20}  {:7}  {}", event.name(), line.row(labels, self.wide))?)
    }
}

/// Tells what happens from now on, until SIGINT, SIGTERM, or until nobody reads any more. Of each flow the request's entry is
/// watched, unless the filter names another part. `interval`: between two walks.
pub async fn follow(to: &mut To<'_>, filter: &FlowFilter, interval: Duration) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let inspector = Inspector::open(to.bpffs)?;
    let filter = FlowFilter { part: filter.part.or(Some(Part::Request)), ..filter.clone() };
    let mut teller = Teller { json: to.json, wide: to.wide, out: &mut *to.out };
    let work = async {
        let mut labels = inspector.labels()?;
        let mut known = Known::with_limit(FOLLOWED);
        let mut were_beyond = false;
        let mut is_first = true;
        teller.begin()?;
        loop {
            let mut events = vec![];
            let services = filter.numbers(&labels);
            let mut at = Some(FlowPosition::default());
            let mut are_new = false;
            while let Some(from) = at {
                at = inspector.flow_slice(from, &mut |flow| {
                    if filter.matches(&flow, &services) {
                        let event = known.see(flow.clone());
                        events.extend(event.filter(|_| !is_first).map(|event| (event, flow)));
                    }
                })?;
                let is_unknown = |flow: &FlowView| flow.service != 0 && labels.owner(flow.service).is_none();
                // Once in a walk: it may have no name.
                if !are_new && events.iter().any(|(_, flow)| is_unknown(flow)) {
                    labels = inspector.labels()?;
                    are_new = true;
                }
                for (event, flow) in events.drain(..) {
                    teller.tell(event, &flow, &labels)?;
                }
                teller.out.flush()?;
                tokio::time::sleep(PAUSE).await;
            }
            for flow in known.end_walk() {
                teller.tell(Event::Ended, &flow, &labels)?;
            }
            teller.out.flush()?;
            let are_beyond = !known.beyond.is_empty();
            if are_beyond && !were_beyond {
                eprintln!("{}", beyond(known.beyond.len()));
            }
            were_beyond = are_beyond;
            if is_abandoned() {
                return Ok(());
            }
            is_first = false;
            tokio::time::sleep(interval).await;
            // A Service that is asked for may come yet.
            let may_come = !filter.service.is_any() && filter.numbers(&labels).is_empty();
            if may_come || known.walk.is_multiple_of(LABELS_GOOD_FOR) {
                labels = inspector.labels()?;
            }
        }
    };
    tokio::select! {
        ended = work => ended,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// What is said once, each time that there are more.
fn beyond(count: usize) -> String {
    format!(
        "fairlead: {count} flows beyond {FOLLOWED} are not told of; ask for fewer (--client, --service, --state, \
         --protocol)"
    )
}

/// Whether nobody can read standard output any more: without anything to tell, a write would not show it.
fn is_abandoned() -> bool {
    let stdout = std::io::stdout();
    let fd: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(&stdout);
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    // Without an answer it is as if somebody read.
    let _ = poll(&mut fds, PollTimeout::ZERO);
    let told = fds[0].revents().unwrap_or(PollFlags::empty());
    told.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL)
}

#[cfg(test)]
mod tests {
    use super::super::flows::tests::request;
    use super::*;

    fn at(client: &str, state: &'static str) -> FlowView {
        request(client, state, 0)
    }

    #[test]
    fn flows_come_change_and_end() {
        const A: &str = "198.51.100.1:1";
        const B: &str = "198.51.100.1:2";
        let mut known = Known::with_limit(2);
        assert_eq!(known.see(at(A, "pending")), Some(Event::New));
        assert_eq!(known.see(at(A, "established")), Some(Event::Changed), "promoted during the walk");
        assert_eq!(known.end_walk(), []);
        assert_eq!(known.see(at(A, "pending")), None, "what is left of it");
        assert_eq!(known.see(request(A, "established", 7)), None, "time is no change");
        assert_eq!(known.see(at(B, "established")), Some(Event::New));
        assert_eq!(known.end_walk(), []);
        assert_eq!(known.see(at(A, "closing")), Some(Event::Changed));
        let ended = known.end_walk();
        assert_eq!(ended, [at(B, "established")]);
        assert_eq!(known.see(at(A, "pending")), Some(Event::New), "the tuple is used again");
        let elsewhere = FlowView { backend: 4, ..at(A, "pending") };
        assert_eq!(known.see(elsewhere), Some(Event::Changed));
        assert_eq!(known.end_walk(), []);
        assert_eq!(known.end_walk().len(), 1);
        assert!(known.flows.is_empty());
    }

    #[test]
    fn flows_beyond_the_limit_are_not_kept_and_never_seem_new() {
        const CLIENTS: [&str; 4] = ["198.51.100.1:1", "198.51.100.1:2", "198.51.100.1:3", "198.51.100.1:4"];
        let mut known = Known::with_limit(2);
        let walk = |known: &mut Known, clients: &[usize]| {
            let told = clients.iter().map(|n| known.see(at(CLIENTS[*n], "established")).is_some()).collect();
            known.end_walk();
            assert!(known.flows.len() <= 2);
            (told, known.beyond.len())
        };
        let mut walk = |clients: &[usize]| -> (Vec<bool>, usize) { walk(&mut known, clients) };
        assert_eq!(walk(&[0, 1, 2, 3]), (vec![true, true, false, false], 2));
        assert_eq!(walk(&[1, 2, 3]), (vec![false; 3], 2), "those that are known are not told of again");
        // There is room now, for what is new.
        assert_eq!(walk(&[1, 2]), (vec![false; 2], 1));
        assert_eq!(walk(&[1, 2, 0]), (vec![false, false, true], 1));
        assert_eq!(walk(&[1]), (vec![false], 0));
        assert_eq!(walk(&[1, 2]), (vec![false, true], 0), "it has ended meanwhile");
        assert!(beyond(7).starts_with("fairlead: 7 flows beyond 100000 are not told of; ask for fewer"));
    }

    #[test]
    fn events_are_lines() {
        let labels = super::super::tests::labels();
        let mut out = vec![];
        for json in [false, true] {
            let mut teller = Teller { out: &mut out, json, wide: false };
            teller.begin().unwrap();
            teller.tell(Event::New, &at("198.51.100.1:1", "pending"), &labels).unwrap();
        }
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with("AT                    EVENT    EDGE "), "{text}");
        assert!(lines[1].contains("Z  new      nic_in   TCP    request  pending "), "{text}");
        let told: serde_json::Value = serde_json::from_str(lines[2]).unwrap();
        assert_eq!(
            (&told["event"], &told["client"], &told["name"]),
            (&"new".into(), &"198.51.100.1".into(), &"web".into())
        );
        super::super::tests::assert_documented(&told);
        assert!(told["at"].as_str().unwrap().parse::<Timestamp>().is_ok());
    }
}
