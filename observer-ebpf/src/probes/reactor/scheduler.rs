//! Scheduler events: the thread of an event loop leaves its CPU, is woken, and returns to a CPU.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use observer_common::{
    block::{Block, CONTENDED},
    reactor::{Evidence, GC_UNKNOWN, Phase, Reactor, RunState},
};

use super::slice::{begin_slice, end_slice, switch_run_state};
use crate::{
    kernel::{self, OffCpuReason, Task},
    state::{pools, reactors::find, system_call::Blocked},
};

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> u32 {
    let (previous, next) = (Task::argument(&ctx, 1).tid(), Task::argument(&ctx, 2).tid());
    let mut switched_ns = 0;
    if let Some(reactor) = find(previous) {
        let reason = kernel::off_cpu_reason(&ctx);
        let run = if reason == OffCpuReason::Preempted { RunState::Preempted } else { RunState::Blocked };
        // SAFETY: a live map value; its thread is leaving its CPU here.
        unsafe {
            let now = bpf_ktime_get_ns();
            switched_ns = now;
            switch_run_state(reactor, run, now);
            // A thread that is preempted in its wait call is still runnable: it may already have found an event.
            let enters_wait = (*reactor).is_in_wait != 0 && reason != OffCpuReason::Preempted;
            if (*reactor).phase == Phase::Slice as u32 {
                // A stopped thread does not wait for what its system call waits for.
                let needs_cause = reason == OffCpuReason::Blocked && !enters_wait;
                let blocked = if needs_cause { Blocked::current(&ctx) } else { Blocked::UNKNOWN };
                // Some runtimes park at a counter, which at times has the value of a contended mutex.
                let may_be_parked =
                    blocked.futex != 0 && (!blocked.is_contended || blocked.futex == (*reactor).parked_at);
                if may_be_parked {
                    (*reactor).parked_at = blocked.futex;
                }
                (*reactor).contended_at = if may_be_parked { 0 } else { blocked.futex };
                if enters_wait || (may_be_parked && pools::is_shared((*reactor).tgid, (*reactor).pattern)) {
                    let evidence = if enters_wait { Evidence::NothingWaited } else { Evidence::Unknown };
                    end_slice(reactor, previous, now, evidence);
                    (*reactor).phase = if enters_wait { Phase::Waiting } else { Phase::Parked } as u32;
                    (*reactor).phase_since_ns = now;
                } else {
                    (*reactor).may_be_parked_ns = if may_be_parked { now } else { 0 };
                    (*reactor).call = blocked.call;
                    (*reactor).block = blocked.block;
                    (*reactor).frame_pointer = blocked.frame_pointer;
                }
            }
        }
    }
    if let Some(reactor) = find(next) {
        // SAFETY: a live map value; its thread is being put on a CPU here.
        unsafe {
            let now = if switched_ns == 0 { bpf_ktime_get_ns() } else { switched_ns };
            if (*reactor).phase == Phase::Slice as u32 && (*reactor).may_be_parked_ns != 0 {
                if pools::is_shared((*reactor).tgid, (*reactor).pattern) {
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
                // The thread's memory cannot be read before the switch is complete.
                (*reactor).gc_before_ns = GC_UNKNOWN;
                begin_slice(reactor, now);
            }
        }
    }
    0
}

/// Checks the futex of a woken thread that was blocked as at a contended mutex. If its own process wakes it, the
/// present value shows which it is: a mutex has been unlocked by another thread, and a counter has been incremented.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
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

/// Reclassifies a block as parking when its thread is about to run. No other thread was known to wait on the set when
/// the thread blocked: the first time, a thread parks because another one is about to wait.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
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
        end_slice(reactor, tid, since, Evidence::Unknown);
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
