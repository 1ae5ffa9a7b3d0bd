//! *gc*: garbage collections. If a runtime has hooks at the start and the end of a collection, each pause is measured.
//! If it keeps totals, their growth during a slice is measured.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_ktime_get_ns, macros::uprobe, programs::ProbeContext};
use observer_common::{gc::GcInProgress, loss::Loss};

use crate::{
    emit::{count_loss, record},
    kernel,
    state::{
        gc::{GC_BEGUN, GC_PAUSES},
        waiters,
    },
};

#[uprobe]
fn gc_start(_ctx: ProbeContext) -> u32 {
    let (_, tid) = kernel::current();
    if let Some(begun) = GC_BEGUN.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe { (*begun).depth += 1 };
        return 0;
    }
    // SAFETY: has no preconditions.
    let begun = GcInProgress { since_ns: unsafe { bpf_ktime_get_ns() }, depth: 1 };
    if GC_BEGUN.insert(tid, begun, u64::from(BPF_ANY)).is_err() {
        count_loss(Loss::GcBegunFull);
    }
    0
}

/// A collection that began before observer attached has no entry, and is not counted.
#[uprobe]
fn gc_done(_ctx: ProbeContext) -> u32 {
    let (tgid, tid) = kernel::current();
    let Some(begun) = GC_BEGUN.get_ptr_mut(tid) else { return 0 };
    // SAFETY: a live map value that only this thread writes while it runs.
    let (since, now) = unsafe {
        (*begun).depth -= 1;
        if (*begun).depth > 0 {
            return 0;
        }
        ((*begun).since_ns, bpf_ktime_get_ns())
    };
    let _present = GC_BEGUN.remove(tid);
    if let Some(pauses) = GC_PAUSES.get_ptr_mut(tgid) {
        // SAFETY: a live map value.
        unsafe { record(pauses, now.saturating_sub(since)) };
    }
    waiters::record_collection(tid, since, now);
    0
}
