//! Threads that wait for events. Each has a slot, which is found from its ID through `ID_FILTER`. That costs less than
//! a hash map lookup, and every wait, switch and wake-up of a target needs it.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, Stack},
};
use observer_common::{
    deferred::Work,
    id_filter::Seen,
    loss::Loss,
    origin::Origin,
    reactor::{REACTORS as MAX_WAITERS, SLOTS},
    waiter::{Phase, Waiter},
};

use super::id_filter;
use crate::{emit::count_loss, words};

/// Only its own thread writes an entry, except for wake-ups. The scheduler orders these between the switch that takes
/// the thread off its CPU and the one that puts it back. Mapped into user space, which looks for long slices, marks their
/// threads as stale, and removes threads of processes that are not targets any more.
#[map]
static WAITERS: Array<Waiter> = Array::with_max_entries(SLOTS, BPF_F_MMAPABLE);

/// Slots by thread ID, for threads that share a bucket of `ID_FILTER`.
#[map]
static THREADS: HashMap<u32, u32> = HashMap::with_max_entries(MAX_WAITERS, 0);

/// Slots that are free, the lowest on top; filled by the loader.
#[map]
static FREE_WAITERS: Stack<u32> = Stack::with_max_entries(SLOTS, 0);

/// Initial value of a slot, which is too large for the stack. No thread has this ID. An ID of 0 would mark the slot as
/// never used, where user space ends its search for waiters.
static NEW: Waiter = Waiter { tid: u32::MAX, ..Waiter::EMPTY };

/// The waiter in a slot.
#[inline(always)]
pub(crate) fn in_slot(slot: u32) -> Option<*mut Waiter> {
    WAITERS.get_ptr_mut(slot)
}

/// The entry of a thread, if it waits for events. The idle thread, whose ID is 0, never does.
#[inline(always)]
pub(crate) fn find(tid: u32) -> Option<*mut Waiter> {
    let waiter = find_or_null(tid);
    if waiter.is_null() { None } else { Some(waiter) }
}

/// The same, for callers that keep the result: of an `Option`, the compiler would copy the uninitialised value of `None`,
/// which the verifier rejects.
#[inline(always)]
pub(crate) fn find_or_null(tid: u32) -> *mut Waiter {
    let slot = match id_filter::lookup_thread(tid) {
        Seen::None => return null_mut(),
        Seen::One(slot) => slot,
        Seen::Several => match THREADS.get_ptr(tid) {
            // SAFETY: a live map value that is written once.
            Some(slot) => unsafe { *slot },
            None => return null_mut(),
        },
    };
    match WAITERS.get_ptr_mut(slot) {
        // SAFETY: a live map value; the `tid` of another thread's entry never becomes equal.
        Some(waiter) if unsafe { (*waiter).tid } == tid => waiter,
        _ => null_mut(),
    }
}

/// Creates an entry for a thread that has none.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn claim(tid: u32, tgid: u32) -> Option<*mut Waiter> {
    let Ok(Some(slot)) = FREE_WAITERS.pop() else {
        count_loss(Loss::ReactorsFull);
        return None;
    };
    let _in_range = WAITERS.set(slot, &NEW, 0);
    let waiter = WAITERS.get_ptr_mut(slot)?;
    // SAFETY: a live map value that no other thread uses.
    unsafe {
        (*waiter).tid = tid;
        (*waiter).tgid = tgid;
        (*waiter).slot = slot;
    }
    id_filter::add_thread(tid, slot);
    if THREADS.insert(tid, slot, u64::from(BPF_NOEXIST)).is_ok() {
        return Some(waiter);
    }
    // The loader has created an entry in the meantime.
    free(tid, slot);
    find(tid)
}

/// Frees the slot of a thread that is not in `THREADS`.
#[inline(always)]
pub(crate) fn free(tid: u32, slot: u32) {
    id_filter::remove_thread(tid, slot);
    let _has_room = FREE_WAITERS.push(slot, 0);
}

/// Records that the current thread has collected garbage since `since`. Only the part within its slice counts.
#[inline(always)]
pub(crate) fn record_collection(tid: u32, since: u64, now: u64) {
    if let Some(waiter) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            if (*waiter).phase == Phase::Slice as u32 {
                add_gc_time(waiter, now.saturating_sub(since.max((*waiter).phase_since_ns)));
            }
        }
    }
}

/// Adds time spent in collections to the present slice.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn add_gc_time(waiter: *mut Waiter, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*waiter).was_off_cpu |= u16::from(ns != 0);
        (*waiter).gc_ns += ns;
    }
}

/// Records that the current thread has done this work until now. `has_work` says whether it switches to other work or
/// to none.
#[inline(always)]
pub(crate) fn account_work(tid: u32, work: &Work, now: u64, has_work: bool) {
    if let Some(waiter) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            (*waiter).has_work = u16::from(has_work);
            update_longest_work(waiter, &work.origin, work.since_ns, now);
        }
    }
}

/// Attributes the slice to the work that ran longest without interruption, even if its origin is unknown: otherwise the
/// slice would be attributed to a request that had a small share of it.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn update_longest_work(waiter: *mut Waiter, origin: &Origin, since_ns: u64, now: u64) {
    // SAFETY: by contract.
    unsafe {
        // Before the slice began, the thread was waiting.
        let elapsed = now.saturating_sub(since_ns.max((*waiter).phase_since_ns));
        if elapsed > (*waiter).longest_work_ns {
            (*waiter).was_off_cpu = 1;
            (*waiter).longest_work_ns = elapsed;
            if origin.request == 0 {
                words::clear(&raw mut (*waiter).longest_work_for);
            } else {
                words::copy(origin, &raw mut (*waiter).longest_work_for);
            }
        }
    }
}

/// Removes a thread from `THREADS`. Returns whether it was there.
#[inline(always)]
pub(crate) fn forget(tid: u32) -> bool {
    THREADS.remove(tid).is_ok()
}
