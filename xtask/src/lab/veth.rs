//! What a veth needs to stand for a network card with a wire.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::foreign::{self, Foreign};
use super::netns::Netns;
use crate::process;

/// Makes every packet leave these devices with its checksums complete and its tag in the frame, as on a wire: an XDP
/// program at the other end could not complete the ones, and would not see the other.
pub(super) fn like_wires(ns: &Netns, devices: &[&str]) -> Result<()> {
    ns.run(|| {
        devices.iter().try_for_each(|device| {
            process::output(Command::new("ethtool").args(["-K", device, "tx", "off", "txvlan", "off"]))
                .map(drop)
        })
    })?
}

/// Makes these devices receive what XDP programs at their other ends send. GRO would be enough for frames to
/// be queued, but after XDP_TX the kernel wakes the receiver only if it has an XDP program of its own
/// (`veth_xdp_flush` in drivers/net/veth.c): without one they wait for the next packet of another kind.
pub(super) fn take_xdp_frames(ns: &Netns, devices: &[&str], scratch: &Path) -> Result<()> {
    let pass =
        Foreign::load(scratch, &format!("{}-pass", ns.name()), "xdp", &foreign::always(foreign::XDP_PASS))?;
    devices.iter().try_for_each(|device| pass.put_on_xdp(ns, device))
}
