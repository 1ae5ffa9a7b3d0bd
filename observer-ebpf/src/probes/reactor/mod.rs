//! *reactor*: what a thread that waits for events does between two waits, how long, and whether it had a CPU; and how
//! late its waits return.

mod calls;

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST, BPF_RB_NO_WAKEUP},
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map},
    maps::{Array, HashMap, RingBuf, Stack},
    programs::BtfTracePointContext,
};
use observer_common::{
    block::{Block, CONTENDED, NO_CALL},
    deferred::Work,
    loss::Loss,
    origin::Origin,
    reactor::{
        Call, FOREVER, GC_UNKNOWN, PARTS, PLACES, Phase, Place, REACTORS as MOST, Reactor, Run, Stall,
    },
};

use super::{deferred, gc, origin, process};
use crate::{
    block::Blocked,
    emit::{lost, record_alone},
    kernel::{self, Off, Task},
    pool, presence, work,
};

/// Reactors by thread id. Only its own thread writes an entry, but for a wake-up, which the scheduler orders
/// between the switch that took the thread off its CPU and the one that puts it back.
#[map]
static REACTORS: HashMap<u32, Reactor> = HashMap::with_max_entries(MOST, 0);

/// Slices in progress, for the user side to see which of them take long.
#[map]
static BOARD: Array<Place> = Array::with_max_entries(PLACES, BPF_F_MMAPABLE);

/// Places on the board that nobody has, the lowest on top; filled by the loader.
#[map]
static FREE_PLACES: Stack<u32> = Stack::with_max_entries(PLACES, 0);

/// Slices that were longer than the threshold.
#[map]
static STALLS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The threshold, in nanoseconds; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static STALL_NS: u64 = 0;

/// What a new entry starts from: too large for the stack.
static NEW: Reactor = Reactor::EMPTY;

/// Whether this entry is of a thread that is gone, whose id the current one has been given before the loader came for the
/// figures: they make room.
#[inline(always)]
fn replaces(reactor: *const Reactor, tid: u32) -> bool {
    // SAFETY: a live map value; of a thread that is gone nobody writes it.
    let (phase, place) = unsafe { ((*reactor).phase, (*reactor).place) };
    if phase != Phase::Exited as u32 {
        return false;
    }
    lost(Loss::ReactorsReplaced);
    if REACTORS.remove(tid).is_ok() {
        presence::count_threads(tid, -1);
    }
    if place != 0 {
        let _has_room = FREE_PLACES.push(place, 0);
    }
    true
}

/// The current thread, if it is a target's.
struct Thread {
    tgid: u32,
    tid: u32,
    /// Null if it has none: of an `Option` the compiler copies what is not there, which the verifier does not let pass.
    known: *mut Reactor,
}

impl Thread {
    #[inline(always)]
    fn current() -> Option<Self> {
        let (tgid, tid) = kernel::current();
        let known = reactor_of(tid).filter(|reactor| !replaces(*reactor, tid)).unwrap_or(null_mut());
        if !known.is_null() || process::is_target(tgid) || process::comes_up(tgid) {
            Some(Self { tgid, tid, known })
        } else {
            None
        }
    }

    /// Its entry, made if there is none.
    #[inline(always)]
    #[expect(
        clippy::needless_borrows_for_generic_args,
        reason = "by value it would be copied to the stack first"
    )]
    fn reactor(&self) -> Option<*mut Reactor> {
        if !self.known.is_null() {
            return Some(self.known);
        }
        // Fails as well if the loader has made it meanwhile, which is fine.
        presence::count_threads(self.tid, 1);
        if REACTORS.insert(self.tid, &NEW, u64::from(BPF_NOEXIST)).is_err() {
            presence::count_threads(self.tid, -1);
        }
        let Some(reactor) = REACTORS.get_ptr_mut(self.tid) else {
            lost(Loss::ReactorsFull);
            return None;
        };
        // SAFETY: a live map value that only this thread writes.
        unsafe {
            (*reactor).tgid = self.tgid;
            if (*reactor).place == 0
                && let Ok(Some(free)) = FREE_PLACES.pop()
                && let Some(place) = BOARD.get_ptr_mut(free)
            {
                (*place).tid = self.tid;
                (*place).tgid = self.tgid;
                (*reactor).place = free;
            }
        }
        Some(reactor)
    }

    /// It enters this call, if it is one that may be a wait. If it is the wait of its event loop, the slice, if one
    /// was seen to begin, is over.
    #[inline(always)]
    fn enters(self, call: Option<Call>) {
        let Some(call) = call else { return };
        if self.known.is_null() && call.is_single {
            return;
        }
        let Some(reactor) = self.reactor() else { return };
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            let before = (*reactor).habit;
            if !(*reactor).habit.is_wait(call) {
                return;
            }
            if (*reactor).habit.is_counted == 0 {
                pool::leave((*reactor).tgid, before);
                pool::join((*reactor).tgid, &raw mut (*reactor).habit);
            }
            let now = bpf_ktime_get_ns();
            if (*reactor).phase == Phase::Slice as u32 {
                turn(reactor, Run::Cpu, now);
                slice_ends(reactor, self.tid, now);
            }
            (*reactor).phase = Phase::Waiting as u32;
            (*reactor).phase_since_ns = now;
            (*reactor).run = Run::Cpu as u32;
            (*reactor).run_since_ns = now;
            (*reactor).timeout_ns = call.timeout_ns;
            (*reactor).woken_ns = 0;
        }
    }
}

/// The slice of the current thread is over.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn slice_ends(reactor: *mut Reactor, tid: u32, now: u64) {
    // SAFETY: by contract.
    unsafe {
        gc::slice_ends(reactor, now);
        if (*reactor).works != 0 {
            deferred::turn_from(tid);
        }
        let length = now.saturating_sub((*reactor).phase_since_ns);
        record_alone(&raw mut (*reactor).slice, length);
        post(reactor, 0);
        if length >= core::ptr::read_volatile(&raw const STALL_NS) {
            report(reactor, tid, length);
        }
    }
}

/// The current thread returns from a call. If that was its wait a slice begins, else it goes on.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn returned(reactor: *mut Reactor, events: i64, timed_out: bool) {
    // SAFETY: by contract.
    unsafe {
        if (*reactor).phase != Phase::Waiting as u32 {
            return;
        }
        let now = bpf_ktime_get_ns();
        if (*reactor).phase_since_ns != 0 {
            let elapsed = now.saturating_sub((*reactor).phase_since_ns);
            (*reactor).waits += 1;
            (*reactor).wait_ns += elapsed;
            if events > 0 {
                (*reactor).events += events.cast_unsigned();
            }
            let (timeout, woken) = ((*reactor).timeout_ns, (*reactor).woken_ns);
            if woken != 0 {
                let is_due = timed_out && timeout != FOREVER;
                let reply = if is_due { elapsed.saturating_sub(timeout) } else { now.saturating_sub(woken) };
                record_alone(&raw mut (*reactor).reply, reply);
            }
        }
        gc::slice_begins(reactor);
        // Of one that waited when the loader came nobody saw that it does.
        pool::join((*reactor).tgid, &raw mut (*reactor).habit);
        slice_begins(reactor, now);
    }
}

/// A slice begins, on a CPU.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn slice_begins(reactor: *mut Reactor, now: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).phase = Phase::Slice as u32;
        (*reactor).phase_since_ns = now;
        (*reactor).run = Run::Cpu as u32;
        (*reactor).run_since_ns = now;
        (*reactor).parts_before_ns[Run::Cpu as usize] = (*reactor).parts_ns[Run::Cpu as usize];
        (*reactor).gc_at_start_ns = (*reactor).gc_ns;
        // Most slices are on their CPU all the time, and for nobody that is known: nothing to clear away.
        if (*reactor).is_eventful != 0 {
            (*reactor).is_eventful = 0;
            (*reactor).parts_before_ns = (*reactor).parts_ns;
            (*reactor).longest_block_ns = 0;
            (*reactor).longest_block_call = NO_CALL;
            (*reactor).longest_queue_ns = 0;
            (*reactor).longest_queue_after = 0;
            (*reactor).longest_work_for = Origin::NONE;
            (*reactor).longest_work_ns = 0;
        }
        post(reactor, now);
    }
}

/// Shows on the board since when this thread is in a slice, or with 0 that it is in none.
///
/// # Safety
/// `reactor` points to a live map value.
#[inline(always)]
unsafe fn post(reactor: *const Reactor, since_ns: u64) {
    // SAFETY: by contract; a place is written by its own thread alone, but for the first, which is nobody's.
    unsafe {
        if let Some(place) = BOARD.get_ptr_mut((*reactor).place) {
            (*place).since_ns = since_ns;
        }
    }
}

/// Sends word of the slice that has just ended.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn report(reactor: *mut Reactor, tid: u32, length_ns: u64) {
    let Some(mut entry) = STALLS.reserve::<Stall>(0) else {
        lost(Loss::StallsFull);
        return;
    };
    // SAFETY: the place is ours until it is submitted, and large enough; `reactor` by contract.
    unsafe {
        // What it has done since it last turned to something counts as well, be it nothing.
        let last = work::current(tid);
        keep_longest(reactor, &last.origin, last.since_ns, (*reactor).phase_since_ns + length_ns);
        origin::stalled((*reactor).tgid, &(*reactor).longest_work_for);
        let stall = entry.as_mut_ptr();
        (*stall).tid = tid;
        (*stall).tgid = (*reactor).tgid;
        (*stall).start_ns = (*reactor).phase_since_ns;
        (*stall).length_ns = length_ns;
        for part in 0..PARTS {
            (*stall).parts_ns[part] = (*reactor).parts_ns[part] - (*reactor).parts_before_ns[part];
        }
        (*stall).gc_ns = (*reactor).gc_ns - (*reactor).gc_at_start_ns;
        (*stall).longest_block_call = (*reactor).longest_block_call;
        (*stall).longest_queue_after = (*reactor).longest_queue_after;
        (*stall).request = (*reactor).longest_work_for.request;
    }
    // Rare, and fetched by the clock: waking the user side would cost more than all the rest.
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
}

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> u32 {
    let (previous, next) = (Task::argument(&ctx, 1).tid(), Task::argument(&ctx, 2).tid());
    if let Some(reactor) = reactor_of(previous) {
        let off = kernel::off(&ctx);
        let run = if off == Off::Preempted { Run::Preempted } else { Run::Blocked };
        // SAFETY: a live map value; its thread is here, going off its CPU.
        unsafe {
            let now = bpf_ktime_get_ns();
            turn(reactor, run, now);
            if (*reactor).phase == Phase::Slice as u32 {
                // Whoever is stopped waits for nothing, wherever that has met it.
                let at = if off == Off::Blocked { Blocked::current(&ctx) } else { Blocked::SOMEWHERE };
                // Some park at a counter, which comes past the value of a mutex.
                let may_be_parked = at.futex != 0 && (!at.is_contended || at.futex == (*reactor).parked_at);
                if may_be_parked {
                    (*reactor).parked_at = at.futex;
                }
                (*reactor).contended_at = if may_be_parked { 0 } else { at.futex };
                if may_be_parked && pool::is_any((*reactor).tgid, (*reactor).habit) {
                    slice_ends(reactor, previous, now);
                    (*reactor).phase = Phase::Parked as u32;
                    (*reactor).phase_since_ns = now;
                } else {
                    (*reactor).may_be_parked_ns = if may_be_parked { now } else { 0 };
                    (*reactor).call = at.call;
                    (*reactor).block = at.block;
                    if let Some(place) = BOARD.get_ptr_mut((*reactor).place) {
                        (*place).frame_pointer = at.frame_pointer;
                    }
                }
            }
        }
    }
    if let Some(reactor) = reactor_of(next) {
        // SAFETY: a live map value; its thread is here, going on its CPU.
        unsafe {
            let now = bpf_ktime_get_ns();
            if (*reactor).phase == Phase::Slice as u32 && (*reactor).may_be_parked_ns != 0 {
                if pool::is_any((*reactor).tgid, (*reactor).habit) {
                    was_parked(reactor, Task::argument(&ctx, 2).tid());
                }
                (*reactor).may_be_parked_ns = 0;
            }
            if (*reactor).phase == Phase::Slice as u32 && (*reactor).run != Run::Blocked as u32 {
                let queued = now.saturating_sub((*reactor).run_since_ns);
                if queued > (*reactor).longest_queue_ns {
                    (*reactor).longest_queue_ns = queued;
                    (*reactor).longest_queue_after = previous;
                }
            }
            turn(reactor, Run::Cpu, now);
            if (*reactor).phase == Phase::Parked as u32 {
                (*reactor).wait_ns += now.saturating_sub((*reactor).phase_since_ns);
                // Its memory cannot be read yet.
                (*reactor).gc_before_ns = GC_UNKNOWN;
                slice_begins(reactor, now);
            }
        }
    }
    0
}

/// A thread that is blocked as at a mutex is woken: if by its own process, what is there now tells a mutex, which another
/// has let go of, from a counter, which has been moved on.
///
/// # Safety
/// As below.
#[inline(always)]
unsafe fn look_again(reactor: *mut Reactor) {
    // SAFETY: by contract.
    unsafe {
        let is_counter = (*reactor).tgid == kernel::current().0
            && kernel::pointed::<u32>((*reactor).contended_at).is_some_and(|value| value > CONTENDED);
        if is_counter {
            (*reactor).parked_at = (*reactor).contended_at;
            (*reactor).may_be_parked_ns = (*reactor).run_since_ns;
        }
        (*reactor).contended_at = 0;
    }
}

/// A thread that is about to run was parked, though by then nobody else was known to wait on its set: the first time, one
/// parks because another is about to wait.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn was_parked(reactor: *mut Reactor, tid: u32) {
    const LOCK: usize = Run::Blocked as usize + Block::Lock as usize;
    // SAFETY: by contract.
    unsafe {
        let since = (*reactor).may_be_parked_ns;
        if (*reactor).run == Run::Woken as u32 {
            (*reactor).parts_ns[LOCK] -= (*reactor).run_since_ns.saturating_sub(since);
        }
        (*reactor).gc_before_ns = GC_UNKNOWN;
        slice_ends(reactor, tid, since);
        (*reactor).phase = Phase::Parked as u32;
        (*reactor).phase_since_ns = since;
    }
}

#[btf_tracepoint(function = "sched_wakeup")]
fn sched_wakeup(ctx: BtfTracePointContext) -> u32 {
    if let Some(reactor) = reactor_of(Task::argument(&ctx, 0).tid()) {
        // SAFETY: a live map value; its thread is blocked, so nothing else writes it.
        unsafe {
            if (*reactor).run == Run::Blocked as u32 {
                if (*reactor).phase == Phase::Slice as u32 && (*reactor).contended_at != 0 {
                    look_again(reactor);
                }
                let now = bpf_ktime_get_ns();
                turn(reactor, Run::Woken, now);
                (*reactor).woken_ns = now;
            }
        }
    }
    0
}

/// The current thread has collected garbage since that moment. What of that is in its slice counts as part of it.
#[inline(always)]
pub(super) fn collected(tid: u32, since: u64, now: u64) {
    if let Some(reactor) = reactor_of(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            if (*reactor).phase == Phase::Slice as u32 {
                (*reactor).gc_ns += now.saturating_sub(since.max((*reactor).phase_since_ns));
            }
        }
    }
}

/// The current thread has done this work until now; whether it turns to other work, or to none.
#[inline(always)]
pub(crate) fn worked(tid: u32, work: &Work, now: u64, works: bool) {
    if let Some(reactor) = reactor_of(tid) {
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            (*reactor).works = u32::from(works);
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
unsafe fn keep_longest(reactor: *mut Reactor, origin: &Origin, since_ns: u64, now: u64) {
    // SAFETY: by contract.
    unsafe {
        // Before that it waited.
        let elapsed = now.saturating_sub(since_ns.max((*reactor).phase_since_ns));
        if elapsed > (*reactor).longest_work_ns {
            (*reactor).is_eventful = 1;
            (*reactor).longest_work_ns = elapsed;
            (*reactor).longest_work_for = if origin.request == 0 { Origin::NONE } else { *origin };
        }
    }
}

/// The figures of a thread that exits are final: a stranger may get its id next.
#[inline(always)]
pub(super) fn thread_exited(tid: u32) {
    if let Some(reactor) = reactor_of(tid) {
        // SAFETY: a live map value; its thread is the one that exits.
        unsafe {
            (*reactor).phase = Phase::Exited as u32;
            pool::leave((*reactor).tgid, (*reactor).habit);
            post(reactor, 0);
        }
    }
}

/// The entry of a thread that may be a reactor; the idle thread, whose id is 0, never is.
#[inline(always)]
fn reactor_of(tid: u32) -> Option<*mut Reactor> {
    if presence::of_thread(tid) { REACTORS.get_ptr_mut(tid) } else { None }
}

/// Ends one scheduler state and begins another. Inside a slice the time goes to the slice's split; inside a
/// wait only the delay of a wake-up is of interest.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn turn(reactor: *mut Reactor, to: Run, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let from = (*reactor).run;
        let elapsed = now.saturating_sub((*reactor).run_since_ns);
        if (*reactor).phase == Phase::Slice as u32 {
            let part = (from + (*reactor).block) as usize;
            // Volatile for the reason given in `emit::bucket`.
            let part = core::ptr::read_volatile(&raw const part);
            if part < PARTS {
                (*reactor).is_eventful |= u32::from(from != Run::Cpu as u32);
                let part = (&raw mut (*reactor).parts_ns).cast::<u64>().add(part);
                *part += elapsed;
            }
            if from == Run::Blocked as u32 {
                if elapsed > (*reactor).longest_block_ns {
                    (*reactor).longest_block_ns = elapsed;
                    (*reactor).longest_block_call = (*reactor).call;
                }
                (*reactor).block = 0;
            }
        } else if (*reactor).phase == Phase::Waiting as u32
            && from == Run::Woken as u32
            && to as u32 == Run::Cpu as u32
        {
            record_alone(&raw mut (*reactor).wakeup, elapsed);
        }
        (*reactor).run = to as u32;
        (*reactor).run_since_ns = now;
    }
}
