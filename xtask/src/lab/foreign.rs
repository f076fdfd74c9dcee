//! Programs of somebody else on a node's hooks: a network plugin's filter, a firewall.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

use super::netns::Netns;
use crate::process;
use crate::setup::BPFFS;

pub const XDP_PASS: i32 = 2;
/// `TC_ACT_UNSPEC`: the next program has its say.
pub const TC_NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
pub const TC_SHOT: i32 = 2;

/// An instruction: code, destination register in the low and source register in the high four bits, offset, number.
pub type Insn = (u8, u8, i16, i32);

const EXIT: Insn = (0x95, 0, 0, 0);
const CALL: u8 = 0x85;

/// `r0 = verdict`.
const fn verdict(verdict: i32) -> Insn {
    (0xb7, 0, 0, verdict)
}

/// The same verdict on everything.
pub fn always(with: i32) -> Vec<Insn> {
    vec![verdict(with), EXIT]
}

/// tc: drops TCP and UDP over IPv4 (without options) to `port`, and lets all else go on.
pub fn drop_port(port: u16) -> Vec<Insn> {
    vec![
        // r6 = ctx, as the loads of absolute offsets want it; r0 = the destination port.
        (0xbf, 0x16, 0, 0),
        (0x28, 0, 0, 36),
        // if r0 != port goto +2
        (0x55, 0, 2, port.into()),
        verdict(TC_SHOT),
        EXIT,
        verdict(TC_NEXT),
        EXIT,
    ]
}

/// tc: puts frames into VLAN `id` and, with `to`, out of that device.
pub fn tag(id: u16, to: Option<u32>) -> Vec<Insn> {
    let push = [
        (0xbf, 0x16, 0, 0),
        // r2 = htons(ETH_P_8021Q), r3 = id, bpf_skb_vlan_push
        (0xb7, 2, 0, i32::from(0x8100_u16.to_be())),
        (0xb7, 3, 0, id.into()),
        (CALL, 0, 0, 18),
    ];
    push.into_iter().chain(redirect_or_next(to)).collect()
}

/// tc: takes frames of a VLAN out of it, and sends them out of device `to`; lets all else go on.
pub fn untag(to: u32) -> Vec<Insn> {
    let pop = [
        (0xbf, 0x16, 0, 0),
        // r2 = skb->vlan_present; if r2 != 0 goto +2
        (0x61, 0x12, 20, 0),
        (0x55, 2, 2, 0),
        verdict(TC_NEXT),
        EXIT,
        // bpf_skb_vlan_pop
        (CALL, 0, 0, 19),
    ];
    pop.into_iter().chain(redirect_or_next(Some(to))).collect()
}

fn redirect_or_next(to: Option<u32>) -> Vec<Insn> {
    match to {
        // bpf_redirect(to, 0)
        Some(to) => vec![(0xb7, 1, 0, to.cast_signed()), (0xb7, 2, 0, 0), (CALL, 0, 0, 23), EXIT],
        None => always(TC_NEXT),
    }
}

/// Socket calls: `connect` to `port` is not permitted, all else is.
pub fn deny_port(port: u16) -> Vec<Insn> {
    vec![
        // r2 = ctx->user_port, in network byte order; if r2 != port goto +2
        (0x61, 0x12, 24, 0),
        (0x55, 2, 2, i32::from(port.to_be())),
        verdict(0),
        EXIT,
        verdict(1),
        EXIT,
    ]
}

/// A loaded program; where it was put, it stays when this is dropped.
pub struct Foreign {
    pin: PathBuf,
}

impl Foreign {
    /// Loads a program of a type that bpftool knows. `name` begins with the lab's prefix; `scratch` takes a file meanwhile.
    pub fn load(scratch: &Path, name: &str, kind: &str, insns: &[Insn]) -> Result<Self> {
        let object = scratch.join(format!("{name}.o"));
        fs::write(&object, file(insns)?).with_context(|| format!("cannot write {}", object.display()))?;
        let pin = Path::new(BPFFS).join(name);
        let mut load = Command::new("bpftool");
        process::output(load.args(["prog", "load"]).args([&object, &pin]).args(["type", kind]))?;
        fs::remove_file(&object).with_context(|| format!("cannot remove {}", object.display()))?;
        Ok(Self { pin })
    }

    pub fn put_on_xdp(&self, ns: &Netns, device: &str) -> Result<()> {
        ns.ip(&format!("link set dev {device} xdpdrv pinned {}\n", self.pin.display()))
    }

    /// As a filter in direct-action mode. `direction`: `ingress` or `egress`.
    pub fn put_on_clsact(&self, ns: &Netns, device: &str, direction: &str, priority: u16) -> Result<()> {
        // It may be there.
        let _ =
            ns.run(|| process::output(Command::new("tc").args(["qdisc", "add", "dev", device, "clsact"])))?;
        let mut add = Command::new("tc");
        add.args(["filter", "add", "dev", device, direction, "prio", &priority.to_string()]);
        add.args(["bpf", "da", "object-pinned"]).arg(&self.pin);
        ns.run(|| process::output(&mut add))?.map(drop)
    }

    /// On a cgroup, with others beside it. `hook` as bpftool calls it.
    pub fn put_on_cgroup(&self, cgroup: &Path, hook: &str) -> Result<()> {
        let mut attach = Command::new("bpftool");
        attach.args(["cgroup", "attach"]).arg(cgroup).args([hook, "pinned"]).arg(&self.pin).arg("multi");
        process::output(&mut attach).map(drop)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_file(&self.pin) {
            eprintln!("cannot remove {}: {err}", self.pin.display());
        }
    }
}

/// An object file with one program, `foreign`.
fn file(insns: &[Insn]) -> Result<Vec<u8>> {
    let code: Vec<u8> = insns
        .iter()
        .flat_map(|(code, regs, off, imm)| {
            let ([off0, off1], [imm0, imm1, imm2, imm3]) = (off.to_le_bytes(), imm.to_le_bytes());
            [*code, *regs, off0, off1, imm0, imm1, imm2, imm3]
        })
        .collect();
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let section = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    object.append_section_data(section, &code, 8);
    object.add_symbol(Symbol {
        name: b"foreign".to_vec(),
        value: 0,
        size: code.len() as u64,
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
