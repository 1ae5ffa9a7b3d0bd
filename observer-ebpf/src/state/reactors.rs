//! Event loops: the sets that threads wait on, who waits on them now, and their counters. A loop is identified by the
//! `struct file` of its epoll set or ring, so that it stays the same however many threads and processes wait on it. What
//! a thread polls has no such object: each thread that polls is a loop of its own.
//!
//! A loop of one thread is written by that thread only. A shared one is written by all of its threads, with atomic
//! additions. Exactly one of them opens and closes each gap: the one that inserts into `GAPS`, and removes from it. BPF
//! before 5.12 has no other atomic operation that tells whether it succeeded.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, HashMap, Stack},
};
use observer_common::{
    histogram::Histogram,
    loss::Loss,
    reactor::{ABANDONED_NS, Durations, Gap, REACTORS as MAX_REACTORS, Reactor, SLOTS, SetDescriptor},
    waiter::{Call, Kind, NO_SET, Phase, Waiter},
};

use super::waiters;
use crate::{
    emit::{add, add_u32, count_loss, record, record_unshared},
    kernel::OpenFile,
};

/// Mapped into user space, which looks for long slices.
#[map]
static REACTORS: Array<Reactor> = Array::with_max_entries(SLOTS, BPF_F_MMAPABLE);

/// Histograms of slices and waits, in the same slots.
#[map]
static DURATIONS: Array<Durations> = Array::with_max_entries(SLOTS, 0);

/// Slots that are free, the lowest on top; filled by the loader.
#[map]
static FREE_REACTORS: Stack<u32> = Stack::with_max_entries(SLOTS, 0);

/// Slots by the address of the `struct file`.
#[map]
static SETS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_REACTORS, 0);

/// Gaps in progress of shared loops, by slot.
#[map]
static GAPS: HashMap<u32, Gap> = HashMap::with_max_entries(MAX_REACTORS, 0);

/// The `struct file` of descriptors that user space asks for; 0 until it is found.
#[map]
static SET_FILES: HashMap<SetDescriptor, u64> = HashMap::with_max_entries(MAX_REACTORS, 0);

/// Initial value of a slot, which is too large for the stack. A `created_ns` of 0 would mark the slot as never used, where
/// user space ends its search for loops.
static NEW: Reactor = Reactor { created_ns: 1, ..Reactor::EMPTY };

static NONE: Durations = Durations::NONE;

/// The loop of a waiter.
///
/// # Safety
/// `waiter` points to a live map value.
#[inline(always)]
pub(crate) unsafe fn of(waiter: *const Waiter) -> Option<*mut Reactor> {
    // SAFETY: by contract.
    let slot = unsafe { (*waiter).reactor };
    if slot == 0 { None } else { in_slot(slot) }
}

/// The loop in a slot.
#[inline(always)]
pub(crate) fn in_slot(slot: u32) -> Option<*mut Reactor> {
    REACTORS.get_ptr_mut(slot)
}

/// Address of the `struct file` that a call of the current thread waits on; 0 if there is none.
#[inline(always)]
pub(crate) fn file_of(call: Call) -> u64 {
    // What `io_uring_enter` calls a registered ring is no descriptor, and what is polled has no file of its own.
    if call.kind as u32 == Kind::Poll as u32 || call.set == NO_SET {
        return 0;
    }
    OpenFile::of(call.set).map_or(0, OpenFile::address)
}

/// Whether the waiter's loop is that of this file, or that of its own polls if `file` is 0.
///
/// # Safety
/// `waiter` points to a live map value.
#[inline(always)]
pub(crate) unsafe fn is_member(waiter: *const Waiter, kind: Kind, file: u64) -> bool {
    // SAFETY: by contract; entries of `REACTORS` are live map values as well.
    unsafe {
        let Some(reactor) = of(waiter) else { return false };
        if (*reactor).file != file || (*reactor).kind != kind as u32 {
            return false;
        }
        // An abandoned loop may have been replaced.
        file == 0 || known(file).is_none_or(|present| (*present).slot == (*reactor).slot)
    }
}

/// Makes the current thread, which belongs to no loop, a member of the one that it is about to wait in. Creates the loop
/// if it is new.
///
/// # Safety
/// `waiter` points to the live map value of the current thread.
#[inline(always)]
pub(crate) unsafe fn join(waiter: *mut Waiter, call: Call, file: u64, now: u64) {
    // SAFETY: by contract; entries of `REACTORS` are live map values as well.
    unsafe {
        let existing = known(file);
        if let Some(reactor) = existing
            && (*reactor).kind == call.kind as u32
            && is_in_use(reactor, (*waiter).tid, now)
        {
            add_member(reactor, waiter, now);
            return;
        }
        // Unless another thread has replaced the entry of an abandoned loop meanwhile.
        let abandoned = existing.map_or(0, |reactor| (*reactor).slot);
        if abandoned != 0 && SETS.get_ptr(file).is_some_and(|slot| *slot == abandoned) {
            let _present = SETS.remove(file);
        }
        create(waiter, call, file, now);
    }
}

#[inline(always)]
fn known(file: u64) -> Option<*mut Reactor> {
    if file == 0 {
        return None;
    }
    // SAFETY: a live map value that is written once.
    let slot = SETS.get_ptr(file).map(|slot| unsafe { *slot })?;
    REACTORS.get_ptr_mut(slot)
}

/// Whether a loop is that of a set which is still open, as far as its threads show, and not of another one that had the
/// same address before.
///
/// # Safety
/// `reactor` points to a live map value.
#[inline(always)]
unsafe fn is_in_use(reactor: *const Reactor, tid: u32, now: u64) -> bool {
    // SAFETY: by contract.
    unsafe {
        let is_recent = now.saturating_sub((*reactor).left_ns) < ABANDONED_NS;
        if (*reactor).members == 0 {
            (*reactor).tid == tid && (*reactor).is_over == 0
        } else {
            (*reactor).inside != 0 || is_recent
        }
    }
}

/// # Safety
/// Both point to live map values; `waiter` is the current thread's.
#[inline(always)]
unsafe fn add_member(reactor: *mut Reactor, waiter: *mut Waiter, now: u64) {
    // SAFETY: by contract.
    unsafe {
        (*waiter).reactor = (*reactor).slot;
        (*waiter).is_shared = u16::from((*reactor).is_shared != 0);
        if (*reactor).members == 0 {
            // It has been alone here before.
            (*reactor).waiter = (*waiter).slot;
            add_u32(&raw mut (*reactor).members, 1);
            return;
        }
        add_u32(&raw mut (*reactor).members, 1);
        if (*reactor).is_shared == 0 {
            (*waiter).is_shared = 1;
            share(reactor, now);
        }
    }
}

/// Makes a loop a shared one, because a second thread is about to wait in it. The time of the first thread so far is
/// counted here: a slice goes on as a gap, which the second thread is about to close.
///
/// # Safety
/// `reactor` points to a live map value.
#[inline(always)]
unsafe fn share(reactor: *mut Reactor, now: u64) {
    // SAFETY: by contract. If the first thread begins or ends a wait at the same time, that wait or slice may count
    // twice or not at all: at most once in the life of a loop.
    unsafe {
        (*reactor).shared_since_ns = now;
        (*reactor).is_shared = 1;
        let Some(first) = waiters::in_slot((*reactor).waiter) else { return };
        if (*first).reactor != (*reactor).slot {
            return;
        }
        let since_ns = (*first).phase_since_ns;
        if (*first).phase == Phase::Slice as u32 {
            (*reactor).shared_since_ns = since_ns;
            open_gap(reactor, first, since_ns);
        } else if since_ns != 0 {
            add(&raw mut (*reactor).wait_ns, now.saturating_sub(since_ns));
        }
    }
}

/// # Safety
/// `waiter` points to a live map value, of a thread without a loop.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
unsafe fn create(waiter: *mut Waiter, call: Call, file: u64, now: u64) {
    let Ok(Some(slot)) = FREE_REACTORS.pop() else {
        count_loss(Loss::ReactorsFull);
        return;
    };
    let _in_range = (REACTORS.set(slot, &NEW, 0), DURATIONS.set(slot, &NONE, 0));
    let Some(reactor) = REACTORS.get_ptr_mut(slot) else { return };
    // SAFETY: a live map value that no other thread uses; `waiter` by contract.
    unsafe {
        (*reactor).created_ns = now;
        (*reactor).tid = (*waiter).tid;
        (*reactor).slot = slot;
        (*reactor).members = 1;
        (*reactor).waiter = (*waiter).slot;
        (*reactor).set = call.set;
        (*reactor).kind = call.kind as u32;
        (*reactor).file = file;
        (*reactor).left_ns = now;
        // Last, because it marks the slot as used.
        (*reactor).tgid = (*waiter).tgid;
        (*waiter).is_shared = 0;
        if file != 0
            && SETS.insert(file, slot, u64::from(BPF_NOEXIST)).is_err()
            && let Some(existing) = known(file)
        {
            // Another thread was first.
            (*reactor).tgid = 0;
            let _has_room = FREE_REACTORS.push(slot, 0);
            add_member(existing, waiter, now);
            return;
        }
        (*waiter).reactor = slot;
    }
}

/// Ends the membership of a waiter in its loop, if it has one: the thread exits, or waits on another set from now on.
///
/// # Safety
/// `waiter` points to the live map value of the current thread.
#[inline(always)]
pub(crate) unsafe fn leave(waiter: *mut Waiter, now: u64) {
    // SAFETY: by contract; entries of `REACTORS` are live map values as well.
    unsafe {
        let Some(reactor) = of(waiter) else { return };
        add_u32(&raw mut (*reactor).members, 1_u32.wrapping_neg());
        (*reactor).left_ns = now;
        if (*waiter).is_inside != 0 {
            (*waiter).is_inside = 0;
            add_u32(&raw mut (*reactor).inside, 1_u32.wrapping_neg());
            if (*reactor).is_shared != 0 && (*reactor).members != 0 && is_empty(reactor) {
                open_gap(reactor, waiter, now);
            }
        }
        (*waiter).reactor = 0;
    }
}

/// Removes an exiting thread.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    // The loader may release the entry at the same time.
    if let Some(waiter) = waiters::find(tid)
        && waiters::forget(tid)
    {
        // SAFETY: a live map value; its thread is the one that exits.
        unsafe {
            let slot = (*waiter).reactor;
            leave(waiter, bpf_ktime_get_ns());
            if slot != 0
                && let Some(reactor) = REACTORS.get_ptr_mut(slot)
                && (*reactor).members == 0
            {
                (*reactor).is_over = 1;
            }
            waiters::free(tid, (*waiter).slot);
        }
    }
}

/// Counts the current thread as inside a wait of its loop.
///
/// # Safety
/// Both point to live map values; `waiter` is the current thread's.
#[inline(always)]
pub(crate) unsafe fn enter(reactor: *mut Reactor, waiter: *mut Waiter) {
    // SAFETY: by contract.
    unsafe {
        if (*waiter).is_inside == 0 {
            (*waiter).is_inside = 1;
            add_u32(&raw mut (*reactor).inside, 1);
        }
        (*waiter).is_shared = u16::from((&raw const (*reactor).is_shared).read_volatile() != 0);
    }
}

/// Counts the current thread, whose slice began at `now`, as outside. Returns whether no thread waits in the loop any
/// more.
///
/// # Safety
/// As for [`enter`].
#[inline(always)]
pub(crate) unsafe fn exit(reactor: *mut Reactor, waiter: *mut Waiter, now: u64) -> bool {
    // SAFETY: by contract.
    unsafe {
        if (*waiter).is_inside != 0 {
            (*waiter).is_inside = 0;
            add_u32(&raw mut (*reactor).inside, 1_u32.wrapping_neg());
        }
        (*reactor).left_ns = now;
        (*waiter).is_shared = u16::from((&raw const (*reactor).is_shared).read_volatile() != 0);
        (*waiter).is_shared == 0 || (is_empty(reactor) && open_gap(reactor, waiter, now))
    }
}

#[inline(always)]
unsafe fn is_empty(reactor: *const Reactor) -> bool {
    // SAFETY: by contract of the callers, a live map value.
    unsafe { (&raw const (*reactor).inside).read_volatile() == 0 }
}

/// Begins a gap with the slice of this waiter. Returns whether it did: another thread may have been faster, or wait
/// already.
///
/// # Safety
/// Both point to live map values.
#[inline(always)]
unsafe fn open_gap(reactor: *mut Reactor, waiter: *const Waiter, since_ns: u64) -> bool {
    // SAFETY: by contract.
    unsafe {
        let slot = (*reactor).slot;
        let gap = Gap { since_ns, waiter: (*waiter).slot, reserved: 0 };
        // Before the insertion, so that a thread which enters after it sees it.
        (&raw mut (*reactor).gap_since_ns).write_volatile(since_ns);
        if GAPS.insert(slot, gap, u64::from(BPF_NOEXIST)).is_err() {
            if let Some(present) = GAPS.get_ptr(slot) {
                (&raw mut (*reactor).gap_since_ns).write_volatile((*present).since_ns);
            }
            return false;
        }
        (*reactor).waiter = gap.waiter;
        // Another thread that tried the same may have overwritten it.
        (&raw mut (*reactor).gap_since_ns).write_volatile(since_ns);
        if !is_empty(reactor) && GAPS.remove(slot).is_ok() {
            (&raw mut (*reactor).gap_since_ns).write_volatile(0);
            return false;
        }
        true
    }
}

/// Ends the gap in progress, if there is one. The current thread is inside.
///
/// # Safety
/// `reactor` points to a live map value.
#[inline(always)]
pub(crate) unsafe fn close_gap(reactor: *mut Reactor) -> Option<Gap> {
    // SAFETY: by contract.
    unsafe {
        if (&raw const (*reactor).gap_since_ns).read_volatile() == 0 {
            return None;
        }
        let slot = (*reactor).slot;
        let Some(gap) = GAPS.get_ptr(slot).map(|gap| *gap) else {
            // Left behind by a thread that tried to open a gap. Whoever is opening one now finds this thread inside.
            (&raw mut (*reactor).gap_since_ns).write_volatile(0);
            return None;
        };
        if GAPS.remove(slot).is_err() {
            return None;
        }
        (&raw mut (*reactor).gap_since_ns).write_volatile(0);
        Some(gap)
    }
}

/// Adds a duration to one of the loop's histograms.
///
/// # Safety
/// `reactor` points to a live map value, which only the current thread writes unless it is shared.
#[inline(always)]
pub(crate) unsafe fn record_duration(
    slot: u32,
    is_shared: bool,
    histogram: fn(*mut Durations) -> *mut Histogram,
    ns: u64,
) {
    if let Some(durations) = DURATIONS.get_ptr_mut(slot) {
        // SAFETY: a live map value; nothing else writes the histograms of a loop that is not shared.
        unsafe {
            if is_shared {
                record(histogram(durations), ns);
            } else {
                record_unshared(histogram(durations), ns);
            }
        }
    }
}

/// Adds to a counter of a loop.
///
/// # Safety
/// `counter` points into a live map value, which only the current thread writes unless the loop is shared.
#[inline(always)]
pub(crate) unsafe fn count(counter: *mut u64, is_shared: bool, n: u64) {
    // SAFETY: by contract.
    unsafe {
        if is_shared {
            add(counter, n);
        } else {
            *counter += n;
        }
    }
}

/// Notes the address of a file that user space has asked for.
#[inline(always)]
pub(crate) fn note_file(tgid: u32, fd: u32, file: OpenFile) {
    if let Some(address) = SET_FILES.get_ptr_mut(SetDescriptor { tgid, fd }) {
        // SAFETY: a live map value; the loader walks over files one at a time.
        unsafe { *address = file.address() };
    }
}
