//! Threads that wait for events. Each is kept in a slot, which its id leads to by way of `ID_FILTER`. That costs less than a look
//! into a hash map, and every wait, switch and wake-up of a target makes it.

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
    reactor::{Durations, Phase, REACTORS as MOST, Reactor, SLOTS},
};

use super::{id_filter, pools};
use crate::emit::{lost, record_alone};

/// Only its own thread writes an entry, but for a wake-up, which the scheduler orders between the switch that took the
/// thread off its CPU and the one that puts it back. Mapped by the user side, to see which slices take long.
#[map]
static REACTORS: Array<Reactor> = Array::with_max_entries(SLOTS, BPF_F_MMAPABLE);

/// How long what they do has taken, in the same slots.
#[map]
static DURATIONS: Array<Durations> = Array::with_max_entries(SLOTS, 0);

/// Slots by thread id, for threads whose ids meet in one place.
#[map]
static THREADS: HashMap<u32, u32> = HashMap::with_max_entries(MOST, 0);

/// Slots that nobody has, the lowest on top; filled by the loader.
#[map]
static FREE_SLOTS: Stack<u32> = Stack::with_max_entries(SLOTS, 0);

/// What a slot starts from: too large for the stack. No thread has this id; one that no thread has had would end the user
/// side's search for others.
static NEW: Reactor = Reactor { tid: u32::MAX, ..Reactor::EMPTY };

static NONE: Durations = Durations::NONE;

/// The entry of a thread that may be a reactor; the idle thread, whose id is 0, never is.
#[inline(always)]
pub(crate) fn find(tid: u32) -> Option<*mut Reactor> {
    let slot = match id_filter::of_thread(tid) {
        Seen::Nobody => return None,
        Seen::One(slot) => slot,
        // SAFETY: a live map value, written once.
        Seen::Several => THREADS.get_ptr(tid).map(|slot| unsafe { *slot })?,
    };
    // SAFETY: a live map value; of one that is another thread's this never becomes true.
    REACTORS.get_ptr_mut(slot).filter(|reactor| unsafe { (**reactor).tid } == tid)
}

/// Makes an entry for a thread that has none.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn claim(tid: u32, tgid: u32) -> Option<*mut Reactor> {
    let Ok(Some(slot)) = FREE_SLOTS.pop() else {
        lost(Loss::ReactorsFull);
        return None;
    };
    let _in_range = (REACTORS.set(slot, &NEW, 0), DURATIONS.set(slot, &NONE, 0));
    let reactor = REACTORS.get_ptr_mut(slot)?;
    // SAFETY: a live map value that nobody else has.
    unsafe {
        (*reactor).tid = tid;
        (*reactor).tgid = tgid;
        (*reactor).slot = slot;
    }
    id_filter::add_thread(tid, slot);
    if THREADS.insert(tid, slot, u64::from(BPF_NOEXIST)).is_ok() {
        return Some(reactor);
    }
    // The loader has made one meanwhile.
    give_back(tid, slot);
    find(tid)
}

/// Whether this entry is of a thread that is gone, whose id the current one has been given before the loader came for the
/// figures: they make room.
#[inline(always)]
pub(crate) fn evict_stale(reactor: *const Reactor, tid: u32) -> bool {
    // SAFETY: a live map value; of a thread that is gone nobody writes it.
    let (phase, slot) = unsafe { ((*reactor).phase, (*reactor).slot) };
    if phase != Phase::Exited as u32 {
        return false;
    }
    lost(Loss::ReactorsReplaced);
    if THREADS.remove(tid).is_ok() {
        give_back(tid, slot);
    }
    true
}

/// Adds to how long this has taken the reactor.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn took(reactor: *const Reactor, histogram: fn(*mut Durations) -> *mut Histogram, ns: u64) {
    // SAFETY: by contract; what is in its slot nobody else writes either.
    unsafe {
        if let Some(durations) = DURATIONS.get_ptr_mut((*reactor).slot) {
            record_alone(histogram(durations), ns);
        }
    }
}

#[inline(always)]
fn give_back(tid: u32, slot: u32) {
    id_filter::remove_thread(tid, slot);
    let _has_room = FREE_SLOTS.push(slot, 0);
}

/// The current thread has collected garbage since that moment. What of that is in its slice counts as part of it.
#[inline(always)]
pub(crate) fn collected(tid: u32, since: u64, now: u64) {
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            if (*reactor).phase == Phase::Slice as u32 {
                add_collected(reactor, now.saturating_sub(since.max((*reactor).phase_since_ns)));
            }
        }
    }
}

/// Of the present slice, so much went into collections.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn add_collected(reactor: *mut Reactor, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).was_off_cpu |= u16::from(ns != 0);
        (*reactor).gc.ns += ns;
    }
}

/// The current thread has done this work until now; whether it turns to other work, or to none.
#[inline(always)]
pub(crate) fn account_work(tid: u32, work: &Work, now: u64, has_work: bool) {
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            (*reactor).has_work = u32::from(has_work);
            keep_longest(reactor, &work.origin, work.since_ns, now);
        }
    }
}

/// What a slice was for is what it did longest at once, be it for nobody that is known: that is no reason to put it down to
/// somebody who had little of it.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn keep_longest(reactor: *mut Reactor, origin: &Origin, since_ns: u64, now: u64) {
    // SAFETY: by contract.
    unsafe {
        // Before that it waited.
        let elapsed = now.saturating_sub(since_ns.max((*reactor).phase_since_ns));
        if elapsed > (*reactor).longest_work_ns {
            (*reactor).was_off_cpu = 1;
            (*reactor).longest_work_ns = elapsed;
            (*reactor).longest_work_for = if origin.request == 0 { Origin::NONE } else { *origin };
        }
    }
}

/// The figures of a thread that exits are final: a stranger may get its id next.
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
