//! Small programs, written instruction by instruction: packets are made, and floors measured, without a compiler.

use std::os::fd::{AsRawFd, BorrowedFd};

use fairlead::sys::bpf::Insn;

/// A register; R10 is the frame pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R6 = 6,
    R10 = 10,
}

/// Width of a memory access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// 64-bit arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Alu {
    Add = 0x00,
    Mul = 0x20,
    And = 0x50,
    Rsh = 0x70,
    Mod = 0x90,
    Mov = 0xb0,
}

/// Helpers by number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub(crate) enum Helper {
    MapLookup = 1,
    MapUpdate = 2,
    TailCall = 12,
    XdpAdjustHead = 44,
}

/// A program in the making.
#[derive(Clone, Default, Debug)]
pub(crate) struct Code(Vec<Insn>);

impl Code {
    pub(crate) fn insns(&self) -> &[Insn] {
        &self.0
    }

    fn push(&mut self, code: u8, dst: Reg, src: u8, off: i16, imm: i32) -> &mut Self {
        self.0.push(Insn { code, regs: dst as u8 | src << 4, off, imm });
        self
    }

    pub(crate) fn alu(&mut self, op: Alu, dst: Reg, imm: i32) -> &mut Self {
        self.push(0x07 | op as u8, dst, 0, 0, imm)
    }

    pub(crate) fn alu_reg(&mut self, op: Alu, dst: Reg, src: Reg) -> &mut Self {
        self.push(0x0f | op as u8, dst, src as u8, 0, 0)
    }

    pub(crate) fn mov(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.alu(Alu::Mov, dst, imm)
    }

    pub(crate) fn mov_reg(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.alu_reg(Alu::Mov, dst, src)
    }

    /// Any 64 bits.
    pub(crate) fn load_imm(&mut self, dst: Reg, value: u64) -> &mut Self {
        self.wide(dst, 0, value)
    }

    /// A map, for helpers.
    pub(crate) fn load_map(&mut self, dst: Reg, map: BorrowedFd<'_>) -> &mut Self {
        self.wide(dst, 1, u64::from(map.as_raw_fd().cast_unsigned()))
    }

    /// The address of the first value of an array map.
    pub(crate) fn load_map_value(&mut self, dst: Reg, map: BorrowedFd<'_>) -> &mut Self {
        self.wide(dst, 2, u64::from(map.as_raw_fd().cast_unsigned()))
    }

    fn wide(&mut self, dst: Reg, kind: u8, value: u64) -> &mut Self {
        let [low, high] = halves(value);
        self.push(0x18, dst, kind, 0, low);
        self.push(0, Reg::R0, 0, 0, high)
    }

    pub(crate) fn load(&mut self, size: Size, dst: Reg, base: Reg, off: i16) -> &mut Self {
        self.push(0x61 | size as u8, dst, base as u8, off, 0)
    }

    pub(crate) fn store(&mut self, size: Size, base: Reg, off: i16, src: Reg) -> &mut Self {
        self.push(0x63 | size as u8, base, src as u8, off, 0)
    }

    /// The lowest `bits` of a register, in wire order.
    pub(crate) fn big_endian(&mut self, dst: Reg, bits: i32) -> &mut Self {
        self.push(0xdc, dst, 0, 0, bits)
    }

    pub(crate) fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(0x85, Reg::R0, 0, 0, helper as i32)
    }

    /// Ends the program with this result, unless the packet has `len` bytes from R2 on. R3: its end.
    pub(crate) fn exit_if_shorter(&mut self, len: i16, verdict: i32) -> &mut Self {
        self.mov_reg(Reg::R4, Reg::R2).alu(Alu::Add, Reg::R4, len.into());
        // if r4 <= r3 goto over the exit
        self.push(0xbd, Reg::R4, Reg::R3 as u8, 2, 0);
        self.exit(verdict)
    }

    /// Ends the program with this result if R0 is 0.
    pub(crate) fn exit_if_null(&mut self, verdict: i32) -> &mut Self {
        // if r0 != 0 goto over the exit
        self.push(0x55, Reg::R0, 0, 2, 0);
        self.exit(verdict)
    }

    pub(crate) fn exit(&mut self, verdict: i32) -> &mut Self {
        self.mov(Reg::R0, verdict).push(0x95, Reg::R0, 0, 0, 0)
    }
}

/// The low and the high half of a number, as instructions hold them.
fn halves(value: u64) -> [i32; 2] {
    let half = |from: usize| {
        let bytes = value.to_le_bytes();
        i32::from_le_bytes([bytes[from], bytes[from + 1], bytes[from + 2], bytes[from + 3]])
    };
    [half(0), half(4)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_the_kernel() {
        let mut code = Code::default();
        code.load_imm(Reg::R1, 0x1122_3344_5566_7788).store(Size::Half, Reg::R2, 34, Reg::R3).exit(2);
        let insn = |code, regs, off, imm| Insn { code, regs, off, imm };
        let want = [
            insn(0x18, 1, 0, 0x5566_7788),
            insn(0, 0, 0, 0x1122_3344),
            insn(0x6b, 0x32, 34, 0),
            insn(0xb7, 0, 0, 2),
            insn(0x95, 0, 0, 0),
        ];
        assert_eq!(code.insns(), want);
    }
}
