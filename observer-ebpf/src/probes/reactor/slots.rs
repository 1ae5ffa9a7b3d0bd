//! Where reactors are kept: in slots, which a thread's id leads to by way of `PRESENCE`. That costs less than a look
//! into a hash map, and every wait, switch and wake-up of a target makes it.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, Stack},
};
use observer_common::{
    histogram::Histogram,
    loss::Loss,
    presence::Seen,
    reactor::{Durations, Phase, REACTORS as MOST, Reactor, SLOTS},
};

use crate::{
    emit::{lost, record_alone},
    presence,
};

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
pub(super) fn find(tid: u32) -> Option<*mut Reactor> {
    let slot = match presence::of_thread(tid) {
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
pub(super) fn claim(tid: u32, tgid: u32) -> Option<*mut Reactor> {
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
    presence::add_thread(tid, slot);
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
pub(super) fn replaces(reactor: *const Reactor, tid: u32) -> bool {
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

#[inline(always)]
fn give_back(tid: u32, slot: u32) {
    presence::remove_thread(tid, slot);
    let _has_room = FREE_SLOTS.push(slot, 0);
}

/// Adds to how long this has taken the reactor.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(super) unsafe fn took(reactor: *const Reactor, histogram: fn(*mut Durations) -> *mut Histogram, ns: u64) {
    // SAFETY: by contract; what is in its slot nobody else writes either.
    unsafe {
        if let Some(durations) = DURATIONS.get_ptr_mut((*reactor).slot) {
            record_alone(histogram(durations), ns);
        }
    }
}
