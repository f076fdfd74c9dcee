//! Programs that write a packet and have another one take it on.
//!
//! `BPF_PROG_TEST_RUN` repeats a program on the packet as the run before has left it, and always the same packet. So what
//! is run is a program of ours, which first writes all headers anew, with the client and the Service of the next flow in
//! them, then calls the one that is measured (a tail call: nothing comes back here). What this costs is seen with a
//! program behind it that does nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};

use crate::asm::{Alu, Code, Helper, Reg, Size};
use crate::bpf::{self, Input, MapType, Output, ProgType};
use crate::frame::Family;

/// Ports that one client address uses: [`PORT_BITS`] of the number of the flow.
pub(crate) const PORTS: u32 = 1 << PORT_BITS;
const PORT_BITS: i32 = 14;
/// The first of them.
pub(crate) const FIRST_PORT: u16 = 0x4000;

/// `TC_ACT_UNSPEC`, which is also tcx's.
pub(crate) const TC_NEXT: i32 = -1;
const TC_SHOT: i32 = 2;
const XDP_ABORTED: i32 = 0;
pub(crate) const XDP_PASS: i32 = 2;

/// Which flow is next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Pick {
    /// One after the other.
    Next,
    /// Any of them.
    Random,
}

/// Which end of the packet is the client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Client {
    Source,
    Destination,
}

/// What packets are written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Traffic {
    pub(crate) kind: ProgType,
    pub(crate) family: Family,
    /// The first flow's packet. The last bits of the client's address are 1, its port is [`FIRST_PORT`].
    pub(crate) frame: Vec<u8>,
    pub(crate) client: Client,
    pub(crate) pick: Pick,
    pub(crate) flows: u32,
    /// Flows take turns in so many Services, whose addresses follow that of the frame.
    pub(crate) services: u32,
    /// What the target puts in front of a packet, bytes; taken away before the next.
    pub(crate) outer: u16,
}

/// A program that writes packets, and where they go.
pub(crate) struct Sender {
    kind: ProgType,
    /// The packet as the first run finds it.
    frame: Vec<u8>,
    ifindex: u32,
    program: OwnedFd,
    /// One number: the last flow, or the state of the generator.
    state: OwnedFd,
    _next: OwnedFd,
}

impl Sender {
    /// Packets for `target`, which believes that they came in through `ifindex`.
    pub(crate) fn new(traffic: &Traffic, target: BorrowedFd<'_>, ifindex: u32) -> Result<Self> {
        let state = bpf::map_create(MapType::Array, 4, 8, 1)?;
        let next = bpf::map_create(MapType::ProgArray, 4, 4, 1)?;
        let fd = target.as_raw_fd().to_ne_bytes();
        bpf::map_update(next.as_fd(), &[0; 4], &fd).context("a program of another kind")?;
        let code = traffic.code(state.as_fd(), next.as_fd())?;
        let program = bpf::prog_load(traffic.kind, code.insns())?;
        let mut frame = vec![0; traffic.outer.into()];
        frame.extend(&traffic.frame);
        Ok(Self { kind: traffic.kind, frame, ifindex, program, state, _next: next })
    }

    /// Packets for a program that does nothing.
    pub(crate) fn floor(traffic: &Traffic, ifindex: u32) -> Result<Self> {
        let mut nothing = Code::default();
        nothing.exit(if traffic.kind == ProgType::Xdp { XDP_PASS } else { TC_NEXT });
        let nothing = bpf::prog_load(traffic.kind, nothing.insns())?;
        Self::new(traffic, nothing.as_fd(), ifindex)
    }

    /// Starts with this flow.
    pub(crate) fn seek(&self, flow: u32) -> Result<()> {
        bpf::map_update(self.state.as_fd(), &[0; 4], &u64::from(flow).to_ne_bytes())
    }

    /// So many packets; what became of the last, and the mean time of one.
    pub(crate) fn send(&self, packets: u32) -> Result<Output> {
        bpf::test_run(self.program.as_fd(), self.input(), packets)
    }

    /// So many packets, which go where the program sends them. The mean time of one, ns.
    pub(crate) fn send_live(&self, packets: u32) -> Result<u32> {
        bpf::live_frames(self.program.as_fd(), self.input(), packets)
    }

    fn input(&self) -> Input<'_> {
        Input { kind: self.kind, frame: &self.frame, ifindex: self.ifindex }
    }
}

impl Traffic {
    /// The program.
    fn code(&self, state: BorrowedFd<'_>, next: BorrowedFd<'_>) -> Result<Code> {
        let headers = self.family.headers();
        let frame = self.frame.get(..headers).context("a frame without headers")?;
        let (aborted, data, data_end) = match self.kind {
            ProgType::Xdp => (XDP_ABORTED, 0, 4),
            // `struct __sk_buff`
            ProgType::SchedCls => (TC_SHOT, 76, 80),
        };
        let mut code = Code::default();
        code.mov_reg(Reg::R6, Reg::R1);
        if self.outer > 0 {
            code.mov(Reg::R2, self.outer.into()).call(Helper::XdpAdjustHead);
        }
        code.load(Size::Word, Reg::R2, Reg::R6, data)
            .load(Size::Word, Reg::R3, Reg::R6, data_end)
            .exit_if_shorter(i16::try_from(headers)?, aborted);
        write(&mut code, frame)?;
        pick(&mut code, state, self.pick, self.flows)?;
        if self.flows > 1 {
            self.set_client(&mut code);
        }
        if self.services > 1 {
            self.set_service(&mut code)?;
        }
        code.mov_reg(Reg::R1, Reg::R6)
            .load_map(Reg::R2, next)
            .mov(Reg::R3, 0)
            .call(Helper::TailCall)
            .exit(aborted);
        Ok(code)
    }

    /// Flow R0 has a port and an address of its own.
    fn set_client(&self, code: &mut Code) {
        let (address, port) = self.family.end(self.client);
        code.mov_reg(Reg::R3, Reg::R0)
            .alu(Alu::And, Reg::R3, (PORTS - 1).cast_signed())
            .alu(Alu::Add, Reg::R3, FIRST_PORT.into())
            .big_endian(Reg::R3, 16)
            .store(Size::Half, Reg::R2, port, Reg::R3)
            .mov_reg(Reg::R3, Reg::R0)
            .alu(Alu::Rsh, Reg::R3, PORT_BITS)
            .alu(Alu::Add, Reg::R3, 1)
            .big_endian(Reg::R3, 16)
            .store(Size::Half, Reg::R2, address + self.family.address_len() - 2, Reg::R3);
    }

    /// Flow R0 asks a Service of its own.
    fn set_service(&self, code: &mut Code) -> Result<()> {
        let (address, _) = self.family.end(Client::Destination);
        let at = address + self.family.address_len() - 4;
        let first = usize::try_from(at)?;
        let first = self.frame.get(first..first + 4).context("a frame without addresses")?;
        code.alu(Alu::Mod, Reg::R0, i32::try_from(self.services).context("too many Services")?)
            .alu(Alu::Add, Reg::R0, i32::from_be_bytes(first.try_into()?))
            .big_endian(Reg::R0, 32)
            .store(Size::Word, Reg::R2, at, Reg::R0);
        Ok(())
    }
}

/// R0: a number below `of`, chosen by what `state` remembers. R1 and R3 are used.
pub(crate) fn pick(code: &mut Code, state: BorrowedFd<'_>, how: Pick, of: u32) -> Result<()> {
    let of = i32::try_from(of).context("too many to choose from")?;
    code.load_map_value(Reg::R1, state).load(Size::Double, Reg::R0, Reg::R1, 0);
    match how {
        Pick::Next => {
            code.mov_reg(Reg::R3, Reg::R0)
                .alu(Alu::Add, Reg::R3, 1)
                .store(Size::Double, Reg::R1, 0, Reg::R3)
                .alu(Alu::Mod, Reg::R0, of);
        }
        Pick::Random => {
            // Knuth's MMIX; the high bits are the good ones.
            code.load_imm(Reg::R3, 6_364_136_223_846_793_005)
                .alu_reg(Alu::Mul, Reg::R0, Reg::R3)
                .load_imm(Reg::R3, 1_442_695_040_888_963_407)
                .alu_reg(Alu::Add, Reg::R0, Reg::R3)
                .store(Size::Double, Reg::R1, 0, Reg::R0)
                .alu(Alu::Rsh, Reg::R0, 33)
                .alu(Alu::Mul, Reg::R0, of)
                .alu(Alu::Rsh, Reg::R0, 31);
        }
    }
    Ok(())
}

/// Writes bytes from R2 on.
pub(crate) fn write(code: &mut Code, bytes: &[u8]) -> Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let (size, len) = match bytes.len() - at {
            8.. => (Size::Double, 8),
            4.. => (Size::Word, 4),
            2.. => (Size::Half, 2),
            _ => (Size::Byte, 1),
        };
        let mut value = [0; 8];
        value[..len].copy_from_slice(&bytes[at..at + len]);
        code.load_imm(Reg::R0, u64::from_ne_bytes(value)).store(size, Reg::R2, i16::try_from(at)?, Reg::R0);
        at += len;
    }
    Ok(())
}
