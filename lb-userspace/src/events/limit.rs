//! How many Events are too many.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::entries::ServiceName;

/// Of one Service: so many at once, and one more after each pause.
const OF_SERVICE: Rate = Rate { burst: 10, pause: Duration::from_mins(5) };

/// Of all Services together.
const OF_ALL: Rate = Rate { burst: 50, pause: Duration::from_secs(1) };

/// Services that are remembered. [`OF_ALL`] keeps their number far below.
const SERVICES: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    pause: Duration,
}

/// A token bucket, as the time when it will be full again.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    full: Instant,
}

impl Bucket {
    fn can_give(self, rate: Rate, now: Instant) -> bool {
        self.full.saturating_duration_since(now) + rate.pause <= rate.pause * rate.burst
    }

    fn give(&mut self, rate: Rate, now: Instant) {
        self.full = self.full.max(now) + rate.pause;
    }
}

/// Lets through what is not too much, of one Service and of all.
#[derive(Debug)]
pub(super) struct Limiter {
    all: Bucket,
    services: BTreeMap<ServiceName, Bucket>,
}

impl Limiter {
    pub(super) fn new(now: Instant) -> Self {
        Self { all: Bucket { full: now }, services: BTreeMap::new() }
    }

    /// Whether one more about `name` is not too much. If so it counts.
    pub(super) fn admit(&mut self, name: &ServiceName, now: Instant) -> bool {
        if self.services.len() >= SERVICES {
            self.services.retain(|_, bucket| bucket.full > now);
        }
        let mut bucket = match self.services.get(name) {
            Some(bucket) => *bucket,
            None if self.services.len() < SERVICES => Bucket { full: now },
            None => return false,
        };
        if !bucket.can_give(OF_SERVICE, now) || !self.all.can_give(OF_ALL, now) {
            return false;
        }
        bucket.give(OF_SERVICE, now);
        self.all.give(OF_ALL, now);
        self.services.insert(name.clone(), bucket);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> ServiceName {
        ServiceName { namespace: "ns".into(), name: format!("svc{n}").into() }
    }

    #[test]
    fn a_service_that_always_has_something_to_say_is_heard_now_and_then() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let mut heard = |seconds: u64| limiter.admit(&name(0), start + Duration::from_secs(seconds));
        assert_eq!((0..20).filter(|_| heard(0)).count(), 10);
        assert!(!heard(299));
        assert!(heard(300) && !heard(300));
        assert_eq!((0..20).filter(|_| heard(10_000)).count(), 10);
    }

    #[test]
    fn many_services_share_what_there_is_for_all() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        assert_eq!((0..1000).filter(|n| limiter.admit(&name(*n), start)).count(), 50);
        let later = start + Duration::from_secs(10);
        assert_eq!((0..1000).filter(|n| limiter.admit(&name(*n), later)).count(), 10);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        for n in 0..3 * SERVICES {
            let seconds = u64::try_from(n).unwrap();
            assert!(limiter.admit(&name(n), start + Duration::from_secs(seconds)), "{n}");
            assert!(limiter.services.len() <= SERVICES);
        }
        // Were there no limit for all, one would still be here.
        let mut limiter = Limiter::new(start);
        for n in 0..2 * SERVICES {
            limiter.all.full = start;
            assert_eq!(limiter.admit(&name(n), start), n < SERVICES);
        }
    }
}
