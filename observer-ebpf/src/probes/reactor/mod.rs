//! *reactor*: what a thread that waits for events does between two waits, how long, and whether it had a CPU; and how
//! late its waits return.

mod calls;
mod slots;

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map},
    maps::RingBuf,
    programs::BtfTracePointContext,
};
use observer_common::{
    block::{Block, CONTENDED, NO_CALL},
    deferred::Work,
    loss::Loss,
    origin::Origin,
    reactor::{Call, FOREVER, GC_UNKNOWN, PARTS, Part, Phase, Reactor, Run, Stall},
};

use self::slots::{claim, find, replaces, took};
use super::{deferred, gc, origin, process};
use crate::{
    block::Blocked,
    emit::lost,
    kernel::{self, Off, Task},
    pool, work,
};

/// Slices that were longer than the threshold.
#[map]
static STALLS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The threshold, in nanoseconds; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static STALL_NS: u64 = 0;

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
        let known = find(tid).filter(|reactor| !replaces(*reactor, tid)).unwrap_or(null_mut());
        if !known.is_null() || process::is_target(tgid) || process::comes_up(tgid) {
            Some(Self { tgid, tid, known })
        } else {
            None
        }
    }

    /// Its entry, made if there is none.
    #[inline(always)]
    fn reactor(&self) -> Option<*mut Reactor> {
        if self.known.is_null() { claim(self.tid, self.tgid) } else { Some(self.known) }
    }

    /// It enters this call, if it is one that may be a wait. If it is the wait of its event loop, the slice, if one
    /// was seen to begin, is over as soon as the thread blocks there.
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
            if (*reactor).phase == Phase::Slice as u32 {
                (*reactor).is_in_wait = 1;
            } else {
                let now = bpf_ktime_get_ns();
                (*reactor).phase = Phase::Waiting as u32;
                (*reactor).phase_since_ns = now;
                (*reactor).run = Run::Cpu as u32;
                (*reactor).run_since_ns = now;
            }
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
            deferred::turn_from(tid, now);
        }
        let length = now.saturating_sub((*reactor).phase_since_ns);
        took(reactor, |durations| &raw mut (*durations).slice, length);
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
unsafe fn returned(reactor: *mut Reactor, tid: u32, events: i64, timed_out: bool) {
    // SAFETY: by contract.
    unsafe {
        let since = if (*reactor).phase == Phase::Waiting as u32 {
            // It came onto its CPU in the wait. A look at the clock would be most of what this program takes.
            let is_known = (*reactor).run == Run::Cpu as u32;
            let since = if is_known { (*reactor).run_since_ns } else { bpf_ktime_get_ns() };
            let elapsed = since.saturating_sub((*reactor).phase_since_ns);
            (*reactor).wait_ns += elapsed;
            let (timeout, woken) = ((*reactor).timeout_ns, (*reactor).woken_ns);
            if woken != 0 {
                let is_due = timed_out && timeout != FOREVER;
                let reply =
                    if is_due { elapsed.saturating_sub(timeout) } else { since.saturating_sub(woken) };
                took(reactor, |durations| &raw mut (*durations).reply, reply);
            }
            since
        } else if (*reactor).is_in_wait != 0 {
            // It has not blocked: a wait of no time.
            let now = bpf_ktime_get_ns();
            turn(reactor, Run::Cpu, now);
            slice_ends(reactor, tid, now);
            now
        } else {
            return;
        };
        (*reactor).waits += 1;
        if events > 0 {
            (*reactor).events += events.cast_unsigned();
        }
        gc::slice_begins(reactor);
        // Of one that waited when the loader came nobody saw that it does.
        pool::join((*reactor).tgid, &raw mut (*reactor).habit);
        slice_begins(reactor, since);
    }
}

/// A slice begins, on a CPU.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
unsafe fn slice_begins(reactor: *mut Reactor, since_ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).phase = Phase::Slice as u32;
        (*reactor).is_in_wait = 0;
        (*reactor).phase_since_ns = since_ns;
        (*reactor).run = Run::Cpu as u32;
        (*reactor).run_since_ns = since_ns;
        let on_cpu = &raw mut (*reactor).parts[Run::Cpu as usize];
        (*on_cpu).before_ns = (*on_cpu).ns;
        // Most slices are on their CPU all the time, and for nobody that is known: nothing to clear away.
        if (*reactor).is_eventful != 0 {
            (*reactor).is_eventful = 0;
            for part in &mut (*reactor).parts {
                part.before_ns = part.ns;
            }
            (*reactor).gc.before_ns = (*reactor).gc.ns;
            (*reactor).longest_block_ns = 0;
            (*reactor).longest_block_call = NO_CALL;
            (*reactor).longest_queue_ns = 0;
            (*reactor).longest_queue_after = 0;
            (*reactor).longest_work_for = Origin::NONE;
            (*reactor).longest_work_ns = 0;
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
            let Part { ns, before_ns } = (*reactor).parts[part];
            (*stall).parts_ns[part] = ns - before_ns;
        }
        (*stall).gc_ns = (*reactor).gc.ns - (*reactor).gc.before_ns;
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
    let mut switched_ns = 0;
    if let Some(reactor) = find(previous) {
        let off = kernel::off(&ctx);
        let run = if off == Off::Preempted { Run::Preempted } else { Run::Blocked };
        // SAFETY: a live map value; its thread is here, going off its CPU.
        unsafe {
            let now = bpf_ktime_get_ns();
            switched_ns = now;
            turn(reactor, run, now);
            // Who is pushed off its CPU in a wait wants it back: it may have found something already.
            let waits = (*reactor).is_in_wait != 0 && off != Off::Preempted;
            if (*reactor).phase == Phase::Slice as u32 {
                // Whoever is stopped waits for nothing, wherever that has met it.
                let is_asked = off == Off::Blocked && !waits;
                let at = if is_asked { Blocked::current(&ctx) } else { Blocked::SOMEWHERE };
                // Some park at a counter, which comes past the value of a mutex.
                let may_be_parked = at.futex != 0 && (!at.is_contended || at.futex == (*reactor).parked_at);
                if may_be_parked {
                    (*reactor).parked_at = at.futex;
                }
                (*reactor).contended_at = if may_be_parked { 0 } else { at.futex };
                if waits || (may_be_parked && pool::is_any((*reactor).tgid, (*reactor).habit)) {
                    slice_ends(reactor, previous, now);
                    (*reactor).phase = if waits { Phase::Waiting } else { Phase::Parked } as u32;
                    (*reactor).phase_since_ns = now;
                } else {
                    (*reactor).may_be_parked_ns = if may_be_parked { now } else { 0 };
                    (*reactor).call = at.call;
                    (*reactor).block = at.block;
                    (*reactor).frame_pointer = at.frame_pointer;
                }
            }
        }
    }
    if let Some(reactor) = find(next) {
        // SAFETY: a live map value; its thread is here, going on its CPU.
        unsafe {
            let now = if switched_ns == 0 { bpf_ktime_get_ns() } else { switched_ns };
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
            (*reactor).parts[LOCK].ns -= (*reactor).run_since_ns.saturating_sub(since);
        }
        (*reactor).gc_before_ns = GC_UNKNOWN;
        slice_ends(reactor, tid, since);
        (*reactor).phase = Phase::Parked as u32;
        (*reactor).phase_since_ns = since;
    }
}

#[btf_tracepoint(function = "sched_wakeup")]
fn sched_wakeup(ctx: BtfTracePointContext) -> u32 {
    if let Some(reactor) = find(Task::argument(&ctx, 0).tid()) {
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
pub(super) unsafe fn add_collected(reactor: *mut Reactor, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).is_eventful |= u16::from(ns != 0);
        (*reactor).gc.ns += ns;
    }
}

/// The current thread has done this work until now; whether it turns to other work, or to none.
#[inline(always)]
pub(crate) fn worked(tid: u32, work: &Work, now: u64, works: bool) {
    if let Some(reactor) = find(tid) {
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
    if let Some(reactor) = find(tid) {
        // SAFETY: a live map value; its thread is the one that exits.
        unsafe {
            (*reactor).phase = Phase::Exited as u32;
            pool::leave((*reactor).tgid, (*reactor).habit);
        }
    }
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
                (*reactor).is_eventful |= u16::from(from != Run::Cpu as u32);
                let part = (&raw mut (*reactor).parts).cast::<Part>().add(part);
                (*part).ns += elapsed;
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
            took(reactor, |durations| &raw mut (*durations).wakeup, elapsed);
        }
        (*reactor).run = to as u32;
        (*reactor).run_since_ns = now;
    }
}
