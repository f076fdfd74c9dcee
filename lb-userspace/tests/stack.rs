//! The stack that each program needs over its nested calls, read from the object: a kernel newer than the oldest we
//! support may not notice.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::Object;
use aya_obj::generated::bpf_insn;
use fairlead::datapath::program_names;
use lb_common::maps::programs::SWEEPS;

/// Bytes that a program has (`MAX_BPF_STACK`).
const STACK: usize = 512;
/// What each function's frame is rounded up to. Kernel 6.12 rounds to 16 where programs are compiled; kernels up to at
/// least 6.1 to 32 (`check_max_stack_depth` in kernel/bpf/verifier.c).
const FRAME: usize = 32;

const R10: u8 = 10;

#[test]
fn programs_keep_within_the_stack_of_every_supported_kernel() {
    let bytes = std::fs::read(env!("FAIRLEAD_BPF_OBJECT")).expect("the object");
    let mut object = Object::parse(&bytes).expect("a BPF object");
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).expect("every called function");
    for name in program_names().chain(SWEEPS.map(|(name, _)| name)) {
        let program = object.programs.get(name).expect(name);
        let linked = object.functions.get(&program.function_key()).expect(name);
        let need = Functions::of(&linked.instructions).stack(0);
        println!("{name}: {need} bytes of stack");
        assert!(need <= STACK, "{name} needs {need} bytes of stack, of {STACK}");
    }
}

#[test]
fn frames_add_up_along_the_deepest_path() {
    let insn = |code, regs: u8, off, imm| {
        let registers = bpf_insn::new_bitfield_1(regs & 15, regs >> 4);
        bpf_insn { code, _bitfield_align_1: [], _bitfield_1: registers, off, imm }
    };
    let store = |off| insn(0x7a, R10, off, 0);
    let call = |over| insn(0x85, 1 << 4, 0, over);
    let helper = insn(0x85, 0, 0, 1);
    let exit = insn(0x95, 0, 0, 0);
    assert_eq!(Functions::of(&[store(-8), helper, exit]).stack(0), 32);
    // main (33 bytes) calls a leaf without a frame, and one whose address of r10 - 40 goes elsewhere.
    let [address, minus] = [insn(0xbf, 1 | R10 << 4, 0, 0), insn(0x07, 1, 0, -40)];
    let code = [store(-33), call(2), call(2), exit, exit, address, minus, exit];
    assert_eq!(Functions::of(&code).stack(0), 64 + 64);
}

/// The functions of a program, by where they start.
struct Functions(BTreeMap<usize, Function>);

#[derive(Default)]
struct Function {
    /// Bytes.
    frame: usize,
    calls: BTreeSet<usize>,
}

impl Functions {
    fn of(code: &[bpf_insn]) -> Self {
        let starts = code.iter().enumerate().filter_map(|(at, insn)| callee(at, *insn));
        let mut functions: BTreeMap<usize, Function> =
            starts.chain([0]).map(|start| (start, Function::default())).collect();
        let mut copies = BTreeSet::new();
        for (at, insn) in code.iter().enumerate() {
            let (_, function) = functions.range_mut(..=at).next_back().expect("one starts at 0");
            function.calls.extend(callee(at, *insn));
            let below = below_frame(*insn, &mut copies);
            function.frame = function.frame.max(below);
        }
        Self(functions)
    }

    /// Bytes that a call of the function takes.
    fn stack(&self, start: usize) -> usize {
        let Function { frame, calls } = &self.0[&start];
        let deepest = calls.iter().map(|callee| self.stack(*callee)).max().unwrap_or(0);
        (*frame).max(1).next_multiple_of(FRAME) + deepest
    }
}

/// Where the function begins that an instruction calls (`BPF_PSEUDO_CALL`); helpers have a stack of their own.
fn callee(at: usize, insn: bpf_insn) -> Option<usize> {
    let calls = insn.code == 0x85 && insn.src_reg() == 1;
    calls.then(|| (at + 1).checked_add_signed(insn.imm as isize).expect("inside of the program"))
}

/// How far below the frame pointer an instruction reaches. `copies`: registers that hold the frame pointer.
fn below_frame(insn: bpf_insn, copies: &mut BTreeSet<u8>) -> usize {
    const LD: u8 = 0;
    const LDX: u8 = 1;
    const ST: u8 = 2;
    const STX: u8 = 3;
    const ADD: u8 = 0x07;
    const COPY: u8 = 0xbf;
    let (dst, src, class) = (insn.dst_reg(), insn.src_reg(), insn.code & 7);
    let was_copy = match class {
        ST | STX => false,
        _ => copies.remove(&dst),
    };
    let offset = match (class, insn.code) {
        (LD | LDX, _) if src == R10 => i32::from(insn.off),
        (ST | STX, _) if dst == R10 => i32::from(insn.off),
        (_, ADD) if was_copy => insn.imm,
        (_, COPY) if src == R10 => {
            copies.insert(dst);
            0
        }
        _ => 0,
    };
    offset.min(0).unsigned_abs() as usize
}
