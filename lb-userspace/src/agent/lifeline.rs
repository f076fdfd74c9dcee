//! The agent's own way to the API server, where that is a Service: usually `default/kubernetes`.
//!
//! API servers that are down or start anew may say for a moment that this Service has no endpoints, or is not there. Who
//! follows that cuts itself off from the only one who can take it back.

use std::net::SocketAddr;

use crate::entries::{Compiled, Frontend, FrontendKey, Protocol};
use crate::finding::Finding;
use crate::owner::Owner;
use crate::reconcile::Desired;

/// One frontend that keeps its last endpoints until there are others.
#[derive(Debug)]
pub(super) struct Lifeline {
    key: FrontendKey,
    last: Option<Last>,
    held: bool,
}

/// The frontend as it was when it last had endpoints.
#[derive(Debug)]
struct Last {
    owner: Owner,
    created: i64,
    frontend: Frontend,
}

impl Lifeline {
    /// The API server is asked at `addr`. Where no Service has that, nothing is kept.
    pub(super) const fn new(addr: SocketAddr) -> Self {
        let key = FrontendKey { addr: addr.ip(), port: addr.port(), protocol: Protocol::Tcp };
        Self { key, last: None, held: false }
    }

    pub(super) const fn key(&self) -> FrontendKey {
        self.key
    }

    /// Whose frontend it is.
    pub(super) fn owner(&self) -> Option<&Owner> {
        self.last.as_ref().map(|last| &last.owner)
    }

    /// It has no endpoints, and keeps the last ones.
    pub(super) const fn is_held(&self) -> bool {
        self.held
    }

    /// What `owner` shall mean that means `desired` by itself (none: it is gone); and who has the frontend no longer.
    pub(super) fn keep(
        &mut self,
        owner: &Owner,
        desired: Option<(Desired, Vec<Finding>)>,
    ) -> (Option<(Desired, Vec<Finding>)>, Option<Owner>) {
        let own = desired.as_ref().and_then(|(desired, _)| {
            let frontend = desired.compiled.frontends.get(&self.key)?;
            (!frontend.internal.backends.is_empty()).then_some((desired.created, frontend))
        });
        if let Some((created, frontend)) = own {
            let last = Last { owner: owner.clone(), created, frontend: frontend.clone() };
            let before = self.last.replace(last).filter(|before| before.owner != *owner);
            self.note_held(false, owner);
            return (desired, before.map(|before| before.owner));
        }
        if self.owner() != Some(owner) {
            return (desired, None);
        }
        self.note_held(true, owner);
        let Some(last) = &self.last else { return (desired, None) };
        let (mut desired, findings) = desired
            .unwrap_or_else(|| (Desired { created: last.created, compiled: Compiled::default() }, vec![]));
        for target in [&last.frontend.internal, &last.frontend.external] {
            for backend in &*target.backends {
                desired.compiled.kept.remove(backend);
            }
        }
        desired.compiled.frontends.insert(self.key, last.frontend.clone());
        (Some((desired, findings)), None)
    }

    fn note_held(&mut self, held: bool, owner: &Owner) {
        if held && !self.held {
            tracing::warn!(
                frontend = %self.key,
                "{owner} has lost all endpoints, and the agent reaches the API server by it: the last ones are \
                 kept until there are others"
            );
        } else if self.held && !held {
            tracing::info!(frontend = %self.key, "{owner} has endpoints again");
        }
        self.held = held;
    }
}
