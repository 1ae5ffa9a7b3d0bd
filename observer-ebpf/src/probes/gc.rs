//! *gc*: garbage collections. Where a runtime tells when one begins and ends, each pause is measured; where it keeps
//! totals of its own, what they grow by during a slice is.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::bpf_ktime_get_ns,
    macros::{map, uprobe},
    maps::{Array, HashMap},
    programs::ProbeContext,
};
use observer_common::{
    gc::{Begun, PROCESSES, Totals},
    histogram::Histogram,
    loss::Loss,
    reactor::{GC_UNKNOWN, Reactor},
};

use super::reactor;
use crate::{
    emit::{lost, record},
    kernel,
};

/// Pauses by process id; the loader makes an entry for each process it attaches to.
#[map]
static GC_PAUSES: HashMap<u32, Histogram> = HashMap::with_max_entries(PROCESSES, 0);

/// Collections in progress by the thread id of who collects.
#[map]
static GC_BEGUN: HashMap<u32, Begun> = HashMap::with_max_entries(1024, 0);

/// Places of totals by process id; the loader makes an entry for each process that has some.
#[map]
static GC_TOTALS: HashMap<u32, Totals> = HashMap::with_max_entries(PROCESSES, 0);

/// Whether there is any such process: all others' waits need not look for them.
#[map]
static GC_TOTALS_USED: Array<u32> = Array::with_max_entries(1, 0);

#[uprobe]
fn gc_start(_ctx: ProbeContext) -> u32 {
    let (_, tid) = kernel::current();
    if let Some(begun) = GC_BEGUN.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe { (*begun).depth += 1 };
        return 0;
    }
    // SAFETY: has no preconditions.
    let begun = Begun { since_ns: unsafe { bpf_ktime_get_ns() }, depth: 1 };
    if GC_BEGUN.insert(tid, begun, u64::from(BPF_ANY)).is_err() {
        lost(Loss::GcBegunFull);
    }
    0
}

/// One that began before observer came has no beginning here, and is not counted.
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
    reactor::collected(tid, since, now);
    0
}

/// A thread that exits while it collects never gets done: a stranger may get its id next.
#[inline(always)]
pub(super) fn thread_exited(tid: u32) {
    let _in_progress = GC_BEGUN.remove(tid);
}

/// The process runs another program now, with other things at the same addresses. Its only thread has its id.
#[inline(always)]
pub(super) fn program_changed(tgid: u32) {
    let _in_progress = GC_BEGUN.remove(tgid);
    let _known = GC_TOTALS.remove(tgid);
}

/// What the totals of a process were is for the loader to read; another may get its id before that.
#[inline(always)]
pub(super) fn process_exited(tgid: u32) {
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
pub(super) unsafe fn slice_begins(reactor: *mut Reactor) {
    // SAFETY: by contract.
    unsafe { (*reactor).gc_before_ns = nanoseconds((*reactor).tgid) };
}

/// The slice of a reactor ends now. What the totals grew by meanwhile is part of it, whichever thread collected:
/// where a runtime keeps totals, it lets no other thread run meanwhile.
///
/// # Safety
/// As above.
#[inline(always)]
pub(super) unsafe fn slice_ends(reactor: *mut Reactor, now: u64) {
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
            reactor::add_collected(reactor, after.saturating_sub(before).min(slice));
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
        let Some(count) = kernel::pointed::<u64>((*totals).count_address) else {
            lost(Loss::GcTotalsUnread);
            return GC_UNKNOWN;
        };
        let mut sum = 0;
        for address in (*totals).ns_addresses {
            if address != 0 {
                let Some(part) = kernel::pointed::<u64>(address) else {
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
