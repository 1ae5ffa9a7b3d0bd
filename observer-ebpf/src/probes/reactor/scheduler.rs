//! The scheduler: a thread of an event loop goes off its CPU, is woken, and comes back.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use observer_common::{
    block::{Block, CONTENDED},
    reactor::{GC_UNKNOWN, Phase, Reactor, RunState},
};

use super::slice::{slice_begins, slice_ends, switch_run_state};
use crate::{
    kernel::{self, OffCpuReason, Task},
    state::{pools, reactors::find, system_call::Blocked},
};

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> u32 {
    let (previous, next) = (Task::argument(&ctx, 1).tid(), Task::argument(&ctx, 2).tid());
    let mut switched_ns = 0;
    if let Some(reactor) = find(previous) {
        let off = kernel::off(&ctx);
        let run = if off == OffCpuReason::Preempted { RunState::Preempted } else { RunState::Blocked };
        // SAFETY: a live map value; its thread is here, going off its CPU.
        unsafe {
            let now = bpf_ktime_get_ns();
            switched_ns = now;
            switch_run_state(reactor, run, now);
            // Who is pushed off its CPU in a wait wants it back: it may have found something already.
            let waits = (*reactor).is_in_wait != 0 && off != OffCpuReason::Preempted;
            if (*reactor).phase == Phase::Slice as u32 {
                // Whoever is stopped waits for nothing, wherever that has met it.
                let is_asked = off == OffCpuReason::Blocked && !waits;
                let at = if is_asked { Blocked::current(&ctx) } else { Blocked::SOMEWHERE };
                // Some park at a counter, which comes past the value of a mutex.
                let may_be_parked = at.futex != 0 && (!at.is_contended || at.futex == (*reactor).parked_at);
                if may_be_parked {
                    (*reactor).parked_at = at.futex;
                }
                (*reactor).contended_at = if may_be_parked { 0 } else { at.futex };
                if waits || (may_be_parked && pools::is_any((*reactor).tgid, (*reactor).pattern)) {
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
                if pools::is_any((*reactor).tgid, (*reactor).pattern) {
                    reclassify_as_parked(reactor, Task::argument(&ctx, 2).tid());
                }
                (*reactor).may_be_parked_ns = 0;
            }
            if (*reactor).phase == Phase::Slice as u32 && (*reactor).run != RunState::Blocked as u32 {
                let queued = now.saturating_sub((*reactor).run_since_ns);
                if queued > (*reactor).longest_queue_ns {
                    (*reactor).longest_queue_ns = queued;
                    (*reactor).longest_queue_after = previous;
                }
            }
            switch_run_state(reactor, RunState::Cpu, now);
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
unsafe fn recheck_futex(reactor: *mut Reactor) {
    // SAFETY: by contract.
    unsafe {
        let is_counter = (*reactor).tgid == kernel::current().0
            && kernel::read_user::<u32>((*reactor).contended_at).is_some_and(|value| value > CONTENDED);
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
unsafe fn reclassify_as_parked(reactor: *mut Reactor, tid: u32) {
    const LOCK: usize = RunState::Blocked as usize + Block::Lock as usize;
    // SAFETY: by contract.
    unsafe {
        let since = (*reactor).may_be_parked_ns;
        if (*reactor).run == RunState::Woken as u32 {
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
            if (*reactor).run == RunState::Blocked as u32 {
                if (*reactor).phase == Phase::Slice as u32 && (*reactor).contended_at != 0 {
                    recheck_futex(reactor);
                }
                let now = bpf_ktime_get_ns();
                switch_run_state(reactor, RunState::Woken, now);
                (*reactor).woken_ns = now;
            }
        }
    }
    0
}
