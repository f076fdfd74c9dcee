//! A call of the demo: who, whom, what is expected, and which way it went.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use lb_common::{Hook, Reason};

use super::scene::Scene;
use super::table::{Row, Table};
use crate::lab::counters::Edge;
use crate::lab::custody::making;
use crate::lab::wire::Introduction;
use crate::lab::{Call, Caller, Counters, Family, Node, Outcome, Pod, Protocol};

/// Somebody who calls.
pub(super) struct Who<'a> {
    pub(super) caller: &'a Caller,
    pub(super) text: String,
}

/// Somebody who is called.
pub(super) struct Target {
    pub(super) protocol: Protocol,
    pub(super) addr: SocketAddr,
    pub(super) text: String,
}

/// What should come back.
pub(super) enum Expect<'a> {
    /// An answer from one of these pods.
    From(&'a [&'a str]),
    /// Of so many calls, each of these pods answers a fair part.
    Spread(&'a [&'a str], u32),
    Refused,
    Unreachable,
}

impl<'a> Who<'a> {
    pub(super) fn process(node: &'a Node) -> Self {
        Self { caller: node, text: format!("process on {}", node.name) }
    }
}

impl Target {
    pub(super) fn node_port(node: &Node, family: Family, port: u16) -> Self {
        let addr = node.at(family, port);
        Self { protocol: Protocol::Tcp, addr, text: format!("NodePort {addr}") }
    }

    pub(super) fn loopback(name: &str, addr: IpAddr, port: u16) -> Self {
        let addr = SocketAddr::new(addr, port);
        Self { protocol: Protocol::Tcp, addr, text: format!("{name}:{port}") }
    }

    pub(super) fn pod(pod: &Pod, family: Family, port: u16) -> Self {
        let addr = pod.at(family, port);
        Self { protocol: Protocol::Tcp, addr, text: format!("pod {addr}") }
    }

    pub(super) fn udp(self) -> Self {
        Self { protocol: Protocol::Udp, text: format!("{}/UDP", self.text), ..self }
    }
}

impl Expect<'_> {
    /// Calls; what came back, in words, and whether it is this.
    fn ask(&self, scene: &Scene, caller: &Caller, call: Call) -> Result<(String, bool)> {
        if let Self::Spread(pods, count) = self {
            let tally = caller.ask_many(call, *count)?;
            let mut parts: Vec<_> = tally.answers.iter().map(|(pod, n)| format!("{n} x {pod}")).collect();
            parts.extend(tally.failures.iter().map(|(what, n)| format!("{n} x {what}")));
            let least = count / u32::try_from(pods.len())? / 3;
            let fair = pods.iter().all(|pod| tally.answers.get(*pod).is_some_and(|n| *n >= least));
            let fair = fair && tally.failures.is_empty() && tally.answers.len() == pods.len();
            return Ok((format!("{count} calls: {}", parts.join(", ")), fair));
        }
        let outcome = caller.ask(call)?;
        let as_expected = match (self, &outcome) {
            (Self::From(pods), Outcome::Answer(answer)) => {
                pods.contains(&answer.introduction.server.as_str())
            }
            (Self::Refused, Outcome::Refused) | (Self::Unreachable, Outcome::Unreachable(_)) => true,
            _ => false,
        };
        let text = match &outcome {
            Outcome::Answer(answer) => {
                let Introduction { server, saw, .. } = &answer.introduction;
                format!("{server} on {} saw {}", scene.pod(server)?.node, saw.ip())
            }
            Outcome::Unreachable(_) => "no route".to_owned(),
            other => other.to_string(),
        };
        Ok((text, as_expected))
    }
}

impl fmt::Display for Expect<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From(pods) => write!(f, "an answer from {}", pods.join(" or ")),
            Self::Spread(pods, count) => {
                write!(f, "{count} answers, a fair part from {}", pods.join(" and "))
            }
            Self::Refused => f.write_str("refused"),
            Self::Unreachable => f.write_str("no way there"),
        }
    }
}

/// What the datapath did between two looks at its counters, by node and edge.
#[derive(Default)]
struct Way(BTreeMap<(String, Edge), BTreeSet<(Hook, Reason)>>);

impl Way {
    fn between(before: &[(String, Counters)], after: &[(String, Counters)]) -> Self {
        let mut way = Self::default();
        for ((node, before), (_, after)) in before.iter().zip(after) {
            for (hook, reason, _) in after.since(before).deeds() {
                way.0.entry((node.clone(), Edge::of(hook))).or_default().insert((hook, reason));
            }
        }
        way
    }

    fn edges(&self) -> BTreeSet<(String, Edge)> {
        self.0.keys().cloned().collect()
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("not translated");
        }
        for (i, ((node, edge), deeds)) in self.0.iter().enumerate() {
            let deeds: Vec<_> = deeds
                .iter()
                .map(|(hook, reason)| match reason {
                    Reason::Translated => hook.name().to_owned(),
                    _ => format!("{} {}", hook.name(), reason.name()),
                })
                .collect();
            write!(f, "{}{node} {edge}: {}", if i > 0 { "; " } else { "" }, deeds.join(", "))?;
        }
        Ok(())
    }
}

/// The scene, and the table that the story is told in.
pub(super) struct Stage<'a> {
    pub(super) scene: &'a Scene,
    pub(super) table: &'a mut Table,
}

impl Stage<'_> {
    /// Makes a call, and finds out which way it went by what the datapath counted meanwhile. `edges` are
    /// those that must have translated it, and nobody else.
    pub(super) fn call(
        &mut self,
        who: &Who<'_>,
        target: &Target,
        expect: &Expect<'_>,
        edges: &[(&Node, Edge)],
    ) -> Result<()> {
        let before = self.counters()?;
        let call = Call::new(target.protocol, target.addr).patience(Duration::from_secs(5));
        let (came_back, as_expected) = expect.ask(self.scene, who.caller, call)?;
        let way = Way::between(&before, &self.counters()?);
        let wanted: BTreeSet<_> = edges.iter().map(|(node, edge)| (node.name.clone(), *edge)).collect();
        let surprise = if as_expected && way.edges() == wanted {
            None
        } else if wanted.is_empty() {
            Some(format!("{expect}, not translated"))
        } else {
            let edges: Vec<_> = wanted.iter().map(|(node, edge)| format!("{node} {edge}")).collect();
            Some(format!("{expect}, translated at {}", edges.join(" and ")))
        };
        // What a signal has broken is not shown: this waits for the end then.
        let _making = making();
        let (who, calls) = (who.text.clone(), target.text.clone());
        self.table.row(&Row { who, calls, came_back, way: way.to_string(), surprise });
        Ok(())
    }

    fn counters(&self) -> Result<Vec<(String, Counters)>> {
        let lab = &self.scene.cluster.lab;
        let read = |node: &Node| Ok((node.name.clone(), Counters::read(&lab.pins(node))?));
        lab.nodes().into_iter().map(read).collect()
    }
}
