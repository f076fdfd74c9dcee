//! What is read from the maps when somebody asks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use lb_common::abi::{Counter, Usage};
use lb_common::reason::{Action, Hook, Reason};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::kernel::Counts;
use super::{Shared, lock};

#[derive(Debug)]
pub(super) struct Collection(Arc<Shared>);

impl Collection {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    fn counters(&self, counts: &dyn Counts) -> BTreeMap<(Hook, Reason), Counter> {
        let pairs = Hook::ALL.into_iter().flat_map(|hook| Reason::ALL.map(|reason| (hook, reason)));
        let mut counters = BTreeMap::new();
        for (hook, reason) in pairs {
            // A pair that could not be read now was exported before: not even a 0 would be true.
            let Some(counter) = self.0.check(counts.counter(hook, reason)) else { continue };
            // Those that ever counted, and those that alerts are made of.
            if counter.packets > 0 || is_loss(reason) {
                counters.insert((hook, reason), counter);
            }
        }
        counters
    }

    fn read_usage(&self, counts: &dyn Counts) {
        // The agent is not kept waiting meanwhile.
        let counted = lock(&self.0.accounts).counted();
        let mut read = Vec::with_capacity(counted.len());
        for (name, id) in counted {
            let Some(usage) = self.0.check(counts.usage(id)) else { continue };
            read.push((name, id, usage));
        }
        let shared = self.0.check(counts.usage(0));
        let mut accounts = lock(&self.0.accounts);
        accounts.promote(&read);
        for (name, id, usage) in read {
            accounts.credit(&name, id, usage);
        }
        if let Some(shared) = shared {
            accounts.credit_shared(shared);
        }
    }

    fn encode_packets(&self, encoder: &mut DescriptorEncoder<'_>, counts: &dyn Counts) -> fmt::Result {
        let counters = self.counters(counts);
        let of = |value: fn(&Counter) -> u64| {
            let rows = counters.iter().map(|((hook, reason), counter)| {
                ([("hook", hook.name()), ("reason", reason.name())], value(counter))
            });
            rows.collect::<Vec<_>>()
        };
        let packets = of(|counter| counter.packets);
        counter(
            encoder,
            "fairlead_packets",
            "Packets, and calls of sockets, by what became of them.",
            packets,
        )?;
        let bytes = of(|counter| counter.bytes);
        counter(encoder, "fairlead_bytes", "Bytes of these IP packets.", bytes)?;
        let mut drops: BTreeMap<Reason, u64> = BTreeMap::new();
        for ((_, reason), counter) in counters.iter().filter(|((_, reason), _)| is_loss(*reason)) {
            *drops.entry(*reason).or_default() += counter.packets;
        }
        let drops = drops.into_iter().map(|(reason, packets)| ([("reason", reason.name())], packets));
        counter(encoder, "fairlead_drops", "Packets and calls of sockets, dropped or rejected.", drops)
    }

    fn encode_services(&self, encoder: &mut DescriptorEncoder<'_>, counts: &dyn Counts) -> fmt::Result {
        self.read_usage(counts);
        let rows = lock(&self.0.accounts).rows();
        let mut family = |name, help, value: fn(&Usage) -> u64| {
            let rows = rows.iter().map(|(service, usage)| {
                ([("namespace", &*service.namespace), ("name", &*service.name)], value(usage))
            });
            counter(encoder, name, help, rows)
        };
        family("fairlead_service_connections", "Flows begun, and sockets connected.", |u| u.connections)?;
        family("fairlead_service_packets", "Packets translated, both directions.", |u| u.packets)?;
        family("fairlead_service_bytes", "Bytes of these IP packets.", |u| u.bytes)?;
        family("fairlead_service_refused", "Packets and sockets, rejected or dropped.", |u| u.refused)
    }

    fn encode_maps(&self, encoder: &mut DescriptorEncoder<'_>, counts: &dyn Counts) -> fmt::Result {
        let mut maps: Vec<(&str, u64, u64)> = lock(&self.0.size).maps.to_vec();
        let fill = self.0.check(counts.fill()).unwrap_or_default();
        maps.extend(fill.iter().map(|view| (view.map, view.entries.into(), view.max_entries.into())));
        let entries = maps.iter().map(|(map, entries, _)| ([("map", *map)], *entries));
        gauge(encoder, "fairlead_map_entries", "Entries in use.", entries)?;
        let capacity = maps.iter().map(|(map, _, capacity)| ([("map", *map)], *capacity));
        gauge(encoder, "fairlead_map_capacity", "Entries there is room for.", capacity)
    }
}

impl Collector for Collection {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let size = *lock(&self.0.size);
        for (name, help, value) in [
            ("fairlead_services", "Services that are served.", size.services),
            (
                "fairlead_services_unfit",
                "Services that have no room in the maps, whole or in part.",
                size.unfit,
            ),
            ("fairlead_frontends", "Frontends in the maps.", size.frontends),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        // Before there is a datapath there is nothing to read.
        let Some(counts) = self.0.counts.get() else { return Ok(()) };
        self.encode_packets(&mut encoder, &**counts)?;
        self.encode_services(&mut encoder, &**counts)?;
        self.encode_maps(&mut encoder, &**counts)
    }
}

/// Somebody does not get what was sent.
fn is_loss(reason: Reason) -> bool {
    matches!(reason.action(), Action::Drop | Action::Reject)
}

fn counter<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = ([(&'a str, &'a str); N], u64)>,
) -> fmt::Result {
    let metric_type = ConstCounter::new(0_u64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, metric_type)?;
    for (labels, value) in rows {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = ([(&'a str, &'a str); N], u64)>,
) -> fmt::Result {
    let metric_type = ConstGauge::new(0_u64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, metric_type)?;
    for (labels, value) in rows {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
