//! What `NETWORKS4/6` hold: a short list for each family, without gaps.

use std::collections::BTreeMap;

use ipnet::IpNet;
use lb_common::abi::network_flags;
use lb_common::maps::MAX_NETWORKS;

use super::Reconciler;
use crate::entries::{Family, Op};
use crate::finding::Finding;

impl Reconciler {
    /// These are the networks of pods and of Services. `services`: not known yet, those in the maps stay.
    pub fn set_networks(&mut self, pods: &[IpNet], services: Option<&[IpNet]>) -> (Vec<Op>, Vec<Finding>) {
        let (mut ops, mut findings) = (vec![], vec![]);
        for family in [Family::V4, Family::V6] {
            let held = &mut self.networks[usize::from(family == Family::V6)];
            let kept: Vec<IpNet> = match services {
                Some(services) => services.to_vec(),
                None => {
                    held.iter().filter(|(_, f)| f & network_flags::SERVICE != 0).map(|(n, _)| *n).collect()
                }
            };
            let mut wanted: BTreeMap<IpNet, u32> = BTreeMap::new();
            // What pods are decides more than what unallocated addresses are: it comes first.
            let all = pods.iter().map(|net| (net, network_flags::POD));
            for (net, flag) in all.chain(kept.iter().map(|net| (net, network_flags::SERVICE))) {
                if Family::of(net.addr()) != family {
                    continue;
                }
                if wanted.len() < MAX_NETWORKS as usize || wanted.contains_key(net) {
                    *wanted.entry(*net).or_default() |= flag;
                } else {
                    findings.push(Finding::NetworkDoesNotFit { net: *net, limit: MAX_NETWORKS });
                }
            }
            replace(family, held, wanted, &mut ops);
        }
        (ops, findings)
    }
}

/// No network that stays is missing from the list at any moment: the last one takes the place of one that goes, and is
/// there twice for a while.
fn replace(
    family: Family,
    held: &mut Vec<(IpNet, u32)>,
    mut wanted: BTreeMap<IpNet, u32>,
    ops: &mut Vec<Op>,
) {
    let mut set = |index: usize, network| {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        ops.push(Op::SetNetwork { family, index, network });
    };
    let mut index = 0;
    while let Some((net, flags)) = held.get_mut(index) {
        if let Some(want) = wanted.remove(net) {
            if *flags != want {
                *flags = want;
                set(index, Some((*net, want)));
            }
            index += 1;
        } else {
            held.swap_remove(index);
            if let Some(last) = held.get(index) {
                set(index, Some(*last));
            }
            set(held.len(), None);
        }
    }
    for network in wanted {
        set(held.len(), Some(network));
        held.push(network);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use proptest::sample::subsequence;

    use super::*;
    use crate::datapath::Maps;
    use crate::datapath::fake::FakeMaps;
    use crate::entries::{Limits, Snapshot};

    const LIMITS: Limits =
        Limits { services: 9, backends: 9, slots: 9, addresses: 9, sources: 9, members: 9 };

    fn nets(which: &[u8]) -> Vec<IpNet> {
        let net =
            |i: &u8| if i.is_multiple_of(3) { format!("fd00:{i}::/32") } else { format!("10.{i}.0.0/16") };
        which.iter().map(|i| net(i).parse().unwrap()).collect()
    }

    fn some() -> impl Strategy<Value = Vec<u8>> {
        subsequence((0..12).collect::<Vec<_>>(), 0..=5)
    }

    fn flags(held: &[Vec<(IpNet, u32)>; 2]) -> BTreeMap<IpNet, u32> {
        held.iter().flatten().copied().collect()
    }

    proptest! {
        /// Whatever came before; after each write every network that stays is there.
        #[test]
        fn lists_are_changed_in_place(steps in prop::collection::vec((some(), some()), 1..12)) {
            let mut maps = FakeMaps::new(LIMITS);
            let mut reconciler = Reconciler::adopt(Snapshot::default(), LIMITS, Duration::ZERO);
            for (pods, services) in steps {
                let (pods, services) = (nets(&pods), nets(&services));
                let mut wanted: BTreeMap<IpNet, u32> = BTreeMap::new();
                for net in &pods {
                    *wanted.entry(*net).or_default() |= network_flags::POD;
                }
                for net in &services {
                    *wanted.entry(*net).or_default() |= network_flags::SERVICE;
                }
                let before = flags(&maps.snapshot().networks);
                let (ops, findings) = reconciler.set_networks(&pods, Some(&services));
                let fits = [true, false].iter().all(|v4| {
                    wanted.keys().filter(|net| net.addr().is_ipv4() == *v4).count() <= MAX_NETWORKS as usize
                });
                prop_assert_eq!(findings.is_empty(), fits);
                for op in ops {
                    maps.apply(&[op]).unwrap();
                    let now = flags(&maps.snapshot().networks);
                    if fits {
                        let stays = before.keys().filter(|net| wanted.contains_key(*net));
                        prop_assert!(stays.copied().all(|net| now.contains_key(&net)));
                    }
                }
                let snapshot = maps.snapshot();
                if fits {
                    prop_assert_eq!(flags(&snapshot.networks), wanted);
                }
                prop_assert!(snapshot.networks.iter().all(|list| list.len() <= MAX_NETWORKS as usize));
                // A restart writes nothing, also before it is known what networks Services have.
                reconciler = Reconciler::adopt(snapshot, LIMITS, Duration::ZERO);
                if fits {
                    prop_assert_eq!(reconciler.set_networks(&pods, None).0, []);
                    prop_assert_eq!(reconciler.set_networks(&pods, Some(&services)).0, []);
                }
            }
        }
    }
}
