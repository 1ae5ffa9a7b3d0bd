//! The slice of an event loop: how it begins and ends, and where its time goes.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, macros::map, maps::RingBuf};
use observer_common::{
    block::NO_CALL,
    loss::Loss,
    origin::Origin,
    reactor::{PARTS, Part, Phase, Reactor, RunState, Stall},
};

use crate::{
    emit::lost,
    state::{
        gc,
        reactors::{keep_longest, took},
        requests, tasks, work,
    },
};

/// Slices that were longer than the threshold.
#[map]
static STALLS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The threshold, in nanoseconds; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static STALL_NS: u64 = 0;

/// The slice of the current thread is over.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn slice_ends(reactor: *mut Reactor, tid: u32, now: u64) {
    // SAFETY: by contract.
    unsafe {
        gc::slice_ends(reactor, now);
        if (*reactor).has_work != 0 {
            tasks::turn_from(tid, now);
        }
        let length = now.saturating_sub((*reactor).phase_since_ns);
        took(reactor, |durations| &raw mut (*durations).slice, length);
        if length >= core::ptr::read_volatile(&raw const STALL_NS) {
            emit_stall(reactor, tid, length);
        }
    }
}

/// A slice begins, on a CPU.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn slice_begins(reactor: *mut Reactor, since_ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).phase = Phase::Slice as u32;
        (*reactor).is_in_wait = 0;
        (*reactor).phase_since_ns = since_ns;
        (*reactor).run = RunState::Cpu as u32;
        (*reactor).run_since_ns = since_ns;
        let on_cpu = &raw mut (*reactor).parts[RunState::Cpu as usize];
        (*on_cpu).before_ns = (*on_cpu).ns;
        // Most slices are on their CPU all the time, and for nobody that is known: nothing to clear away.
        if (*reactor).was_off_cpu != 0 {
            (*reactor).was_off_cpu = 0;
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
unsafe fn emit_stall(reactor: *mut Reactor, tid: u32, length_ns: u64) {
    let Some(mut entry) = STALLS.reserve::<Stall>(0) else {
        lost(Loss::StallsFull);
        return;
    };
    // SAFETY: the place is ours until it is submitted, and large enough; `reactor` by contract.
    unsafe {
        // What it has done since it last turned to something counts as well, be it nothing.
        let last = work::current(tid);
        keep_longest(reactor, &last.origin, last.since_ns, (*reactor).phase_since_ns + length_ns);
        requests::stalled((*reactor).tgid, &(*reactor).longest_work_for);
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

/// Ends one scheduler state and begins another. Inside a slice the time goes to the slice's split; inside a
/// wait only the delay of a wake-up is of interest.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn switch_run_state(reactor: *mut Reactor, to: RunState, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let from = (*reactor).run;
        let elapsed = now.saturating_sub((*reactor).run_since_ns);
        if (*reactor).phase == Phase::Slice as u32 {
            let part = (from + (*reactor).block) as usize;
            // Volatile for the reason given in `emit::bucket`.
            let part = core::ptr::read_volatile(&raw const part);
            if part < PARTS {
                (*reactor).was_off_cpu |= u16::from(from != RunState::Cpu as u32);
                let part = (&raw mut (*reactor).parts).cast::<Part>().add(part);
                (*part).ns += elapsed;
            }
            if from == RunState::Blocked as u32 {
                if elapsed > (*reactor).longest_block_ns {
                    (*reactor).longest_block_ns = elapsed;
                    (*reactor).longest_block_call = (*reactor).call;
                }
                (*reactor).block = 0;
            }
        } else if (*reactor).phase == Phase::Waiting as u32
            && from == RunState::Woken as u32
            && to as u32 == RunState::Cpu as u32
        {
            took(reactor, |durations| &raw mut (*durations).wakeup, elapsed);
        }
        (*reactor).run = to as u32;
        (*reactor).run_since_ns = now;
    }
}
