//! Garbage collections: those in progress, and the totals that runtimes keep.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap},
};
use observer_common::{
    gc::{GcInProgress, PROCESSES, Totals},
    histogram::Histogram,
    loss::Loss,
    waiter::{GC_UNKNOWN, Waiter},
};

use super::waiters;
use crate::{emit::count_loss, kernel};

/// Lengths of pauses by process ID; the loader makes an entry for each process it attaches to.
#[map]
pub(crate) static GC_PAUSES: HashMap<u32, Histogram> = HashMap::with_max_entries(PROCESSES, 0);

/// Collections in progress, by the ID of the collecting thread.
#[map]
pub(crate) static GC_BEGUN: HashMap<u32, GcInProgress> = HashMap::with_max_entries(1024, 0);

/// Addresses of totals by process ID; the loader makes an entry for each process that has some.
#[map]
static GC_TOTALS: HashMap<u32, Totals> = HashMap::with_max_entries(PROCESSES, 0);

/// Whether `GC_TOTALS` has any entry. If not, waits need no lookup.
#[map]
static GC_TOTALS_USED: Array<u32> = Array::with_max_entries(1, 0);

/// Removes the collection of a thread that has exited during it: the thread ID may be reused.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    let _in_progress = GC_BEGUN.remove(tid);
}

/// The process has executed another program, so addresses are invalid. Its only thread has the ID of the process.
#[inline(always)]
pub(crate) fn process_execed(tgid: u32) {
    let _in_progress = GC_BEGUN.remove(tgid);
    let _known = GC_TOTALS.remove(tgid);
}

/// Marks the totals of a process as final. The loader reads them later, and the process ID may be reused before.
#[inline(always)]
pub(crate) fn process_exited(tgid: u32) {
    if let Some(totals) = GC_TOTALS.get_ptr_mut(tgid) {
        // SAFETY: a live map value; only the last thread of a process reaches this.
        unsafe { (*totals).count_address = 0 };
    }
}

/// Called when a slice of a reactor begins.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn on_slice_begin(waiter: *mut Waiter) {
    // SAFETY: by contract.
    unsafe { (*waiter).gc_before_ns = runtime_total_ns((*waiter).tgid) };
}

/// Called when a slice of a reactor ends. The growth of the totals is part of the slice, whichever thread collected: a
/// runtime that keeps totals lets no other thread run during a collection.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn on_slice_end(waiter: *mut Waiter, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let before = (*waiter).gc_before_ns;
        if before == GC_UNKNOWN {
            return;
        }
        let after = runtime_total_ns((*waiter).tgid);
        if after != GC_UNKNOWN {
            let slice = now.saturating_sub((*waiter).phase_since_ns);
            // The runtime uses another clock, so the growth may exceed the slice.
            waiters::add_gc_time(waiter, after.saturating_sub(before).min(slice));
        }
    }
}

/// Total time in collections that the current process's runtime reports, in nanoseconds; [`GC_UNKNOWN`] if it reports
/// none.
#[inline(always)]
fn runtime_total_ns(tgid: u32) -> u64 {
    if GC_TOTALS_USED.get(0).is_none_or(|used| *used == 0) {
        return GC_UNKNOWN;
    }
    let Some(totals) = GC_TOTALS.get_ptr_mut(tgid) else { return GC_UNKNOWN };
    // SAFETY: a live map value. If several threads write it at once, the values of one remain, and all are valid.
    unsafe {
        if (*totals).count_address == 0 {
            return GC_UNKNOWN;
        }
        let Some(count) = kernel::read_user::<u64>((*totals).count_address) else {
            count_loss(Loss::GcTotalsUnread);
            return GC_UNKNOWN;
        };
        let mut sum = 0;
        for address in (*totals).ns_addresses {
            if address != 0 {
                let Some(part) = kernel::read_user::<u64>(address) else {
                    count_loss(Loss::GcTotalsUnread);
                    return GC_UNKNOWN;
                };
                sum += part;
            }
        }
        (*totals).count = count;
        (*totals).ns = sum;
        sum
    }
}
