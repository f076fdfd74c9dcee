//! Operations of many Services go to the maps together, in an order that [`FakeMaps`] would not let pass if a packet could
//! meet a reference to what is not there.

use lb_common::abi::backend_state;

use super::*;
use crate::entries::BackendEntry;

/// What leads where.
fn led(world: &mut World) -> Vec<(FrontendKey, Vec<String>)> {
    let snapshot = world.agent.maps().snapshot();
    let backend = |id: &u32| {
        let backend = &snapshot.backends[&(Family::V4, *id)];
        assert_eq!(backend.state, backend_state::ACTIVE, "{backend:?}");
        backend.addr.ip().to_string()
    };
    let frontends = snapshot.frontends.iter();
    frontends
        .map(|(key, entry)| (*key, snapshot.slots[&entry.internal.base].iter().map(backend).collect()))
        .collect()
}

#[test]
fn many_services_take_few_system_calls() {
    let mut few = World::full(10, 3);
    let mut many = World::full(1000, 3);
    assert_eq!(led(&mut many).len(), 1000);
    let (few, many) = (few.agent.maps().runs, many.agent.maps().runs);
    assert!(many < few + 20, "{few} for 10, {many} for 1000");
}

#[test]
fn a_backend_that_one_service_gives_up_and_another_takes_stays() {
    let mut world = World::full(2, 0);
    world.take(slice(0, &["10.9.0.1"]));
    world.take(slice(1, &["10.9.0.2"]));
    world.settle();
    world.take(slice(0, &["10.9.0.3"]));
    world.take(slice(1, &["10.9.0.1"]));
    world.settle();
    let expected = [(key(0), vec!["10.9.0.3".to_owned()]), (key(1), vec!["10.9.0.1".to_owned()])];
    assert_eq!(led(&mut world), expected);
    world.pass(GRACE);
    assert_eq!(led(&mut world), expected);
}

/// What ends backends comes last, and so would what has one back.
#[test]
fn a_backend_that_ends_and_comes_back_at_once_does_not_wait() {
    let set = |id, state| Op::SetBackend {
        family: Family::V4,
        id,
        entry: BackendEntry { addr: "10.9.0.1:80".parse().unwrap(), state, flags: 0, generation: 1 },
    };
    let [active, ending] = [backend_state::ACTIVE, backend_state::TERMINATING];
    let queue = Queue::default();
    assert!(queue.takes(&[set(1, ending), set(2, active)]));
    assert!(queue.takes(&[set(1, active), set(1, ending)]));
    assert!(!queue.takes(&[set(1, ending), set(1, active)]));
}

#[test]
fn of_many_services_only_the_one_that_is_refused_waits() {
    // Forty backends, then twenty windows, then twenty frontends.
    for fail_after in [0, 7, 50, 79] {
        let mut world = World::full(20, 0);
        for n in 0..20 {
            world.take(slice(n, &[&format!("10.9.0.{n}"), &format!("10.9.1.{n}")]));
        }
        world.agent.maps().fail_after = Some(fail_after);
        world.settle();
        assert_eq!(world.agent.refused.len(), 1, "{fail_after}");
        let refused = world.agent.refused.keys().next().cloned().unwrap();
        let served = led_to_backends(&mut world);
        assert_eq!(served.len(), 19, "{fail_after}");
        world.pass(RETRY);
        assert!(world.agent.refused.is_empty(), "{fail_after}: {refused}");
        assert_eq!(led_to_backends(&mut world).len(), 20, "{fail_after}");
    }
}

/// Frontends that lead anywhere.
fn led_to_backends(world: &mut World) -> Vec<FrontendKey> {
    let frontends = world.agent.maps().snapshot().frontends;
    frontends.into_iter().filter(|(_, entry)| entry.internal.len > 0).map(|(key, _)| key).collect()
}
