//! Threads that wait for events. Each has a slot, which is found from its ID through `ID_FILTER`. That costs less than
//! a hash map lookup, and every wait, switch and wake-up of a target needs it.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, Stack},
};
use observer_common::{
    deferred::Work,
    histogram::Histogram,
    id_filter::Seen,
    loss::Loss,
    origin::Origin,
    reactor::{Durations, Phase, REACTORS as MAX_REACTORS, Reactor, SLOTS},
};

use super::{id_filter, pools};
use crate::emit::{count_loss, record_unshared};

/// Only its own thread writes an entry, except for wake-ups. The scheduler orders these between the switch that takes
/// the thread off its CPU and the one that puts it back. Mapped into user space, which looks for long slices.
#[map]
static REACTORS: Array<Reactor> = Array::with_max_entries(SLOTS, BPF_F_MMAPABLE);

/// Histograms of slices and waits, in the same slots.
#[map]
static DURATIONS: Array<Durations> = Array::with_max_entries(SLOTS, 0);

/// Slots by thread ID, for threads that share a bucket of `ID_FILTER`.
#[map]
static THREADS: HashMap<u32, u32> = HashMap::with_max_entries(MAX_REACTORS, 0);

/// Slots that are free, the lowest on top; filled by the loader.
#[map]
static FREE_SLOTS: Stack<u32> = Stack::with_max_entries(SLOTS, 0);

/// Initial value of a slot, which is too large for the stack. No thread has this ID. An ID of 0 would mark the slot as
/// never used, where user space ends its search for reactors.
static NEW: Reactor = Reactor { tid: u32::MAX, ..Reactor::EMPTY };

static NONE: Durations = Durations::NONE;

/// The entry of a thread, if it is a reactor. The idle thread, whose ID is 0, never is.
#[inline(always)]
pub(crate) fn find(tid: u32) -> Option<*mut Reactor> {
    let slot = match id_filter::lookup_thread(tid) {
        Seen::None => return None,
        Seen::One(slot) => slot,
        // SAFETY: a live map value that is written once.
        Seen::Several => THREADS.get_ptr(tid).map(|slot| unsafe { *slot })?,
    };
    // SAFETY: a live map value; the `tid` of another thread's entry never becomes equal.
    REACTORS.get_ptr_mut(slot).filter(|reactor| unsafe { (**reactor).tid } == tid)
}

/// Creates an entry for a thread that has none.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn claim(tid: u32, tgid: u32) -> Option<*mut Reactor> {
    let Ok(Some(slot)) = FREE_SLOTS.pop() else {
        count_loss(Loss::ReactorsFull);
        return None;
    };
    let _in_range = (REACTORS.set(slot, &NEW, 0), DURATIONS.set(slot, &NONE, 0));
    let reactor = REACTORS.get_ptr_mut(slot)?;
    // SAFETY: a live map value that no other thread uses.
    unsafe {
        (*reactor).tid = tid;
        (*reactor).tgid = tgid;
        (*reactor).slot = slot;
    }
    id_filter::add_thread(tid, slot);
    if THREADS.insert(tid, slot, u64::from(BPF_NOEXIST)).is_ok() {
        return Some(reactor);
    }
    // The loader has created an entry in the meantime.
    release_slot(tid, slot);
    find(tid)
}

/// Removes an entry whose thread has exited and whose ID was reused by the current thread before the loader read the
/// counters. Returns whether the entry was of such a thread.
#[inline(always)]
pub(crate) fn evict_stale(reactor: *const Reactor, tid: u32) -> bool {
    // SAFETY: a live map value; nothing writes the entry of a thread that has exited.
    let (phase, slot) = unsafe { ((*reactor).phase, (*reactor).slot) };
    if phase != Phase::Exited as u32 {
        return false;
    }
    count_loss(Loss::ReactorsReplaced);
    if THREADS.remove(tid).is_ok() {
        release_slot(tid, slot);
    }
    true
}

/// Adds a duration to one of the reactor's histograms.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn record_duration(
    reactor: *const Reactor,
    histogram: fn(*mut Durations) -> *mut Histogram,
    ns: u64,
) {
    // SAFETY: by contract; nothing else writes the histograms of its slot either.
    unsafe {
        if let Some(durations) = DURATIONS.get_ptr_mut((*reactor).slot) {
            record_unshared(histogram(durations), ns);
        }
    }
}

#[inline(always)]
fn release_slot(tid: u32, slot: u32) {
    id_filter::remove_thread(tid, slot);
    let _has_room = FREE_SLOTS.push(slot, 0);
}

/// Records that the current thread has collected garbage since `since`. Only the part within its slice counts.
#[inline(always)]
pub(crate) fn record_collection(tid: u32, since: u64, now: u64) {
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            if (*reactor).phase == Phase::Slice as u32 {
                add_gc_time(reactor, now.saturating_sub(since.max((*reactor).phase_since_ns)));
            }
        }
    }
}

/// Adds time spent in collections to the present slice.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn add_gc_time(reactor: *mut Reactor, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).was_off_cpu |= u16::from(ns != 0);
        (*reactor).gc.ns += ns;
    }
}

/// Records that the current thread has done this work until now. `has_work` says whether it switches to other work or
/// to none.
#[inline(always)]
pub(crate) fn account_work(tid: u32, work: &Work, now: u64, has_work: bool) {
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            (*reactor).has_work = u32::from(has_work);
            update_longest_work(reactor, &work.origin, work.since_ns, now);
        }
    }
}

/// Attributes the slice to the work that ran longest without interruption, even if its origin is unknown: otherwise the
/// slice would be attributed to a request that had a small share of it.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn update_longest_work(reactor: *mut Reactor, origin: &Origin, since_ns: u64, now: u64) {
    // SAFETY: by contract.
    unsafe {
        // Before the slice began, the thread was waiting.
        let elapsed = now.saturating_sub(since_ns.max((*reactor).phase_since_ns));
        if elapsed > (*reactor).longest_work_ns {
            (*reactor).was_off_cpu = 1;
            (*reactor).longest_work_ns = elapsed;
            (*reactor).longest_work_for = if origin.request == 0 { Origin::NONE } else { *origin };
        }
    }
}

/// Marks the counters of an exiting thread as final: its ID may be reused.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value; its thread is the one that exits.
        unsafe {
            (*reactor).phase = Phase::Exited as u32;
            pools::leave((*reactor).tgid, (*reactor).pattern);
        }
    }
}
