//! What a veth needs to stand for a network card with a wire.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

use super::netns::Netns;
use crate::process;
use crate::setup::BPFFS;

/// `r0 = XDP_PASS; exit`.
const PASS: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// Makes every packet leave these devices with its checksums complete, as on a wire: an XDP program at the
/// other end could not complete them.
pub(super) fn like_wires(ns: &Netns, devices: &[&str]) -> Result<()> {
    ns.run(|| {
        devices.iter().try_for_each(|device| {
            process::output(Command::new("ethtool").args(["-K", device, "tx", "off"])).map(drop)
        })
    })?
}

/// Makes these devices receive what XDP programs at their other ends send. GRO would be enough for frames to
/// be queued, but after XDP_TX the kernel wakes the receiver only if it has an XDP program of its own
/// (`veth_xdp_flush` in drivers/net/veth.c): without one they wait for the next packet of another kind.
pub(super) fn take_xdp_frames(ns: &Netns, devices: &[&str], scratch: &Path) -> Result<()> {
    let object = scratch.join("pass.o");
    let pin = Path::new(BPFFS).join(format!("{}-pass", ns.name()));
    fs::write(&object, program()?).with_context(|| format!("cannot write {}", object.display()))?;
    process::output(
        Command::new("bpftool").args(["prog", "load"]).args([&object, &pin]).args(["type", "xdp"]),
    )?;
    let script = devices.iter().fold(String::new(), |script, device| {
        script + &format!("link set dev {device} xdpdrv pinned {}\n", pin.display())
    });
    let attached = ns.ip(&script);
    fs::remove_file(&object).with_context(|| format!("cannot remove {}", object.display()))?;
    fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
    attached
}

/// An object file with [`PASS`].
fn program() -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let section = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    object.append_section_data(section, &PASS, 8);
    object.add_symbol(Symbol {
        name: b"pass".to_vec(),
        value: 0,
        size: PASS.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    object.write().context("cannot write an object file")
}
