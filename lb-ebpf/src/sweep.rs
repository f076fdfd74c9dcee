//! Garbage collection inside the kernel: iterators over the flow tables (`iter/bpf_map_elem`, kernel commit d6c4503cc296
//! of 5.9). The agent begins a walk and reads on; each byte it reads is one entry that was looked at.

use core::cell::Cell;
use core::ffi::c_void;

use aya_ebpf::bindings::seq_file;
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_seq_write};
use lb_common::abi::{Flow, FlowKey};
use lb_common::sweep::sweep;
use lb_common::tables::FlowTable;
use lb_common::{Family, Tables, V4, V6};

use crate::maps::Kernel;

/// `struct bpf_iter__bpf_map_elem` (kernel/bpf/map_iter.c).
#[repr(C)]
pub struct Element {
    meta: *const Meta,
    map: *const c_void,
    /// Null: the walk has come to its end.
    key: *const c_void,
    value: *const c_void,
}

/// `struct bpf_iter_meta`, as far as it matters here.
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter")]
pub extern "C" fn sweep_flows4(element: *const Element) -> i32 {
    visit::<V4>(element, FlowTable::Established)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter")]
pub extern "C" fn sweep_pending4(element: *const Element) -> i32 {
    visit::<V4>(element, FlowTable::Pending)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter")]
pub extern "C" fn sweep_flows6(element: *const Element) -> i32 {
    visit::<V6>(element, FlowTable::Established)
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter")]
pub extern "C" fn sweep_pending6(element: *const Element) -> i32 {
    visit::<V6>(element, FlowTable::Pending)
}

/// Looks at one entry, and writes down what it found.
#[inline(always)]
fn visit<F: Family>(element: *const Element, table: FlowTable) -> i32
where
    Kernel: Tables<F>,
{
    // SAFETY: the context is valid while the program runs.
    let Element { meta, key, value, .. } = unsafe { element.read() };
    if key.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: the agent puts each program on the table it is for, and the kernel refuses if its entries are too short.
    let (key, seen) = unsafe { (*key.cast::<FlowKey<F::Addr>>(), Cell::new(*value.cast::<Flow<F::Addr>>())) };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let found = sweep::<F, Kernel>(&Kernel, table, &key, &seen, now);
    // A failure shows as an entry that was not counted.
    // SAFETY: the file that the kernel hands the program, and one byte of its stack.
    unsafe { bpf_seq_write((*meta).seq, (&raw const found).cast(), 1) };
    0
}
