//! One frontend as an operator finds it who has nothing but bpftool: from the Service to its backends.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::scene::{FB_BACKENDS, Scene};
use crate::lab::Family;
use crate::lab::counters::{self, dump, lookup};

/// Slots of a window that are looked up; a Maglev table has hundreds, and two backends are in any few.
const SLOTS: u64 = 16;

/// Prints `fb-backends`' ClusterIP from the maps of node-a.
pub(super) fn show(scene: &Scene) -> Result<()> {
    let pins = scene.cluster.lab.pins(scene.node_a());
    let addr = scene.cluster_ip(FB_BACKENDS, Family::V4, 5001)?.addr;
    let services = dump(&pins, "SERVICES4")?;
    let frontend = services.as_array().into_iter().flatten().map(|entry| &entry["formatted"]);
    let frontend = frontend
        .into_iter()
        .find(|entry| {
            address(&entry["key"]["addr"]) == Some(addr.ip()) && entry["key"]["port"] == addr.port()
        })
        .with_context(|| format!("SERVICES4 has no {addr}"))?;
    println!("\nThe frontend {addr} in the maps of node-a:");
    println!("# bpftool map dump pinned {}", counters::find(&pins, "SERVICES4")?.display());
    println!("{frontend}");
    let window = &frontend["value"]["internal"];
    let (Some(base), Some(len)) = (window["base"].as_u64(), window["len"].as_u64()) else {
        bail!("no window in {frontend}");
    };
    let mut backends = BTreeSet::new();
    for slot in base..base + len.min(SLOTS) {
        let slot = u32::try_from(slot)?;
        backends.extend(lookup(&pins, "SLOTS", slot)?["value"].as_u64());
    }
    println!("# bpftool map lookup pinned {} key …", counters::find(&pins, "BACKENDS4")?.display());
    for backend in backends {
        println!("{}", lookup(&pins, "BACKENDS4", u32::try_from(backend)?)?);
    }
    Ok(())
}

/// An address as bpftool prints it.
fn address(value: &Value) -> Option<IpAddr> {
    let octets: Option<Vec<u8>> = value["octets"]
        .as_array()?
        .iter()
        .map(|octet| octet.as_u64().and_then(|octet| u8::try_from(octet).ok()))
        .collect();
    let octets = octets?;
    <[u8; 4]>::try_from(octets.as_slice()).map(IpAddr::from).ok()
}
