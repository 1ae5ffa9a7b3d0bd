//! Garbage collections: those in progress, and totals that runtimes keep.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap},
};
use observer_common::{
    gc::{Begun, PROCESSES, Totals},
    histogram::Histogram,
    loss::Loss,
    reactor::{GC_UNKNOWN, Reactor},
};

use super::reactors;
use crate::{emit::lost, kernel};

/// Pauses by process id; the loader makes an entry for each process it attaches to.
#[map]
pub(crate) static GC_PAUSES: HashMap<u32, Histogram> = HashMap::with_max_entries(PROCESSES, 0);

/// Collections in progress by the thread id of who collects.
#[map]
pub(crate) static GC_BEGUN: HashMap<u32, Begun> = HashMap::with_max_entries(1024, 0);

/// Places of totals by process id; the loader makes an entry for each process that has some.
#[map]
static GC_TOTALS: HashMap<u32, Totals> = HashMap::with_max_entries(PROCESSES, 0);

/// Whether there is any such process: all others' waits need not look for them.
#[map]
static GC_TOTALS_USED: Array<u32> = Array::with_max_entries(1, 0);

/// A thread that exits while it collects never gets done: a stranger may get its id next.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    let _in_progress = GC_BEGUN.remove(tid);
}

/// The process runs another program now, with other things at the same addresses. Its only thread has its id.
#[inline(always)]
pub(crate) fn program_changed(tgid: u32) {
    let _in_progress = GC_BEGUN.remove(tgid);
    let _known = GC_TOTALS.remove(tgid);
}

/// What the totals of a process were is for the loader to read; another may get its id before that.
#[inline(always)]
pub(crate) fn process_exited(tgid: u32) {
    if let Some(totals) = GC_TOTALS.get_ptr_mut(tgid) {
        // SAFETY: a live map value; only the last thread of a process gets here.
        unsafe { (*totals).count_address = 0 };
    }
}

/// A slice of a reactor begins now.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn slice_begins(reactor: *mut Reactor) {
    // SAFETY: by contract.
    unsafe { (*reactor).gc_before_ns = nanoseconds((*reactor).tgid) };
}

/// The slice of a reactor ends now. What the totals grew by meanwhile is part of it, whichever thread collected:
/// where a runtime keeps totals, it lets no other thread run meanwhile.
///
/// # Safety
/// As above.
#[inline(always)]
pub(crate) unsafe fn slice_ends(reactor: *mut Reactor, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let before = (*reactor).gc_before_ns;
        if before == GC_UNKNOWN {
            return;
        }
        let after = nanoseconds((*reactor).tgid);
        if after != GC_UNKNOWN {
            let slice = now.saturating_sub((*reactor).phase_since_ns);
            // The runtime's clock is another one.
            reactors::add_collected(reactor, after.saturating_sub(before).min(slice));
        }
    }
}

/// Time that the current process says it has spent in collections; [`GC_UNKNOWN`] if it does not say.
#[inline(always)]
fn nanoseconds(tgid: u32) -> u64 {
    if GC_TOTALS_USED.get(0).is_none_or(|used| *used == 0) {
        return GC_UNKNOWN;
    }
    let Some(totals) = GC_TOTALS.get_ptr_mut(tgid) else { return GC_UNKNOWN };
    // SAFETY: a live map value. Of several threads that write it at once, one leaves what it read: all are right.
    unsafe {
        if (*totals).count_address == 0 {
            return GC_UNKNOWN;
        }
        let Some(count) = kernel::read_user::<u64>((*totals).count_address) else {
            lost(Loss::GcTotalsUnread);
            return GC_UNKNOWN;
        };
        let mut sum = 0;
        for address in (*totals).ns_addresses {
            if address != 0 {
                let Some(part) = kernel::read_user::<u64>(address) else {
                    lost(Loss::GcTotalsUnread);
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
