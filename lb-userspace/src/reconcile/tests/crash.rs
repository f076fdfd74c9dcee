//! An agent that ends between any two operations: what packets meet meanwhile, and what its successor makes of it.

use super::*;

/// Backends that somebody wants, or wanted, behind a frontend.
type Allowed = BTreeMap<FrontendKey, BTreeSet<SocketAddr>>;

fn allow(allowed: &mut Allowed, services: &BTreeMap<usize, Desired>) {
    for (key, frontend) in services.values().flat_map(|desired| &desired.compiled.frontends) {
        let backends = [&frontend.internal, &frontend.external].into_iter().flat_map(|t| t.backends.iter());
        allowed.entry(*key).or_default().extend(backends.map(|backend| backend.addr));
    }
}

/// No frontend leads to a backend that is not there, or not its own.
fn check(snapshot: &Snapshot, allowed: &Allowed) {
    for (key, entry) in &snapshot.frontends {
        for window in [entry.internal, entry.external].iter().filter(|window| window.len > 0) {
            for id in &snapshot.slots[&window.base] {
                let backend = &snapshot.backends[&(Family::of(key.addr), *id)];
                assert_eq!(backend.state, backend_state::ACTIVE, "{key}: {backend:?}");
                assert!(allowed[key].contains(&backend.addr), "{key} leads to {}", backend.addr);
            }
        }
    }
}

/// A world of the same maps, whose agent is still to come.
fn successor(world: &World) -> World {
    World {
        reconciler: Reconciler::adopt(Snapshot::default(), ROOMY, GRACE),
        maps: world.maps.clone(),
        now: world.now,
    }
}

/// Flags, kind, affinity and backends of a frontend.
type Said = (u16, u8, u32, [BTreeSet<SocketAddr>; 2]);

/// Frontends with all they say, but for numbers that only have to differ.
fn said(snapshot: &Snapshot) -> BTreeMap<FrontendKey, Said> {
    let said = view(snapshot).into_iter().map(|(key, (flags, kind, windows))| {
        let affinity = snapshot.frontends[&key].affinity;
        // Without the order of the slots: a table that was found is kept as long as it holds the same.
        (key, (flags, kind, affinity, windows.map(|slots| slots.into_iter().collect())))
    });
    said.collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// After every single operation of a change the agent ends, and its successor, too, at one of its own.
    #[test]
    fn whoever_ends_between_two_operations_leaves_maps_that_work(
        history in prop::collection::vec(any_step(), 0..8),
        change in any_step(),
        meanwhile in any_step(),
        again in any::<prop::sample::Index>(),
    ) {
        let mut world = World::new(ROOMY);
        let mut wanted = Wanted::default();
        for step in &history {
            let ops = wanted.take(step, &mut world);
            world.maps.apply(&ops).unwrap();
        }
        let mut allowed = Allowed::new();
        allow(&mut allowed, &wanted.services);
        let ops = wanted.take(&change, &mut world);
        allow(&mut allowed, &wanted.services);
        // Something changes while no agent runs.
        let mut later = wanted.clone();
        later.take(&meanwhile, &mut World::new(ROOMY));
        allow(&mut allowed, &later.services);

        let mut scratch = World::new(ROOMY);
        let fresh = later.after_restart(&mut scratch);
        scratch.maps.apply(&fresh).unwrap();
        let scratch = scratch.maps.snapshot();

        for crash in 0..=ops.len() {
            let mut heir = successor(&world);
            let mut repair = later.after_restart(&mut heir);
            if !repair.is_empty() {
                repair.truncate(again.index(repair.len()));
            }
            for op in repair {
                heir.maps.apply(&[op]).unwrap();
                check(&heir.maps.snapshot(), &allowed);
            }
            for op in later.after_restart(&mut heir) {
                heir.maps.apply(&[op]).unwrap();
                check(&heir.maps.snapshot(), &allowed);
            }
            let end = heir.maps.snapshot();
            prop_assert_eq!(said(&end), said(&scratch));
            prop_assert_eq!(without_backends(&end.addresses), without_backends(&scratch.addresses));
            check_sources(&end, &later.services, &later.node);
            check_affinity(&end, &expected(&later.services));
            heir.pass(GRACE);
            check_backends(&heir.maps.snapshot());
            // Of a backend in no window a new agent cannot tell which Service had kept it.
            let left = later.after_restart(&mut heir);
            prop_assert!(left.iter().all(|op| matches!(op, Op::SetBackend { .. })), "{:?}", left);

            if let Some(op) = ops.get(crash) {
                world.maps.apply(std::slice::from_ref(op)).unwrap();
                check(&world.maps.snapshot(), &allowed);
            }
        }
    }
}
