//! Scheduler events: a thread that waits for events leaves its CPU, is woken, and returns to a CPU.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use observer_common::{
    reactor::Evidence,
    waiter::{FOREVER, Phase, RunState},
};

use super::slice::{end_slice, switch_run_state};
use crate::{
    kernel::{self, OffCpuReason, Task},
    state::{system_call::Blocked, waiters::find},
};

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> u32 {
    let (previous, next) = (Task::argument(&ctx, 1).tid(), Task::argument(&ctx, 2).tid());
    let mut switched_ns = 0;
    if let Some(waiter) = find(previous) {
        let reason = kernel::off_cpu_reason(&ctx);
        let run = if reason == OffCpuReason::Preempted { RunState::Preempted } else { RunState::Blocked };
        // SAFETY: a live map value; its thread is leaving its CPU here.
        unsafe {
            let now = bpf_ktime_get_ns();
            switched_ns = now;
            switch_run_state(waiter, run, now);
            if (*waiter).phase == Phase::Slice as u32 {
                let is_in_wait = (*waiter).is_in_wait != 0;
                // A stopped thread does not wait for what its system call waits for.
                let is_blocked = reason == OffCpuReason::Blocked && !is_in_wait;
                let blocked = if is_blocked { Blocked::current(&ctx) } else { Blocked::UNKNOWN };
                let polls_its_set = (*waiter).pattern.is_polled(blocked.polled);
                // A thread that is preempted in its wait call is still runnable: it may already have found an event.
                if (is_in_wait && reason != OffCpuReason::Preempted) || polls_its_set {
                    end_slice(waiter, previous, now, |_| Evidence::NothingWaited);
                    (*waiter).phase = Phase::Waiting as u32;
                    (*waiter).phase_since_ns = now;
                    if polls_its_set {
                        (*waiter).timeout_ns = FOREVER;
                        (*waiter).woken_ns = 0;
                    }
                } else {
                    (*waiter).call = blocked.call;
                    (*waiter).block = blocked.block;
                    (*waiter).frame_pointer = blocked.frame_pointer;
                }
            }
        }
    }
    if let Some(waiter) = find(next) {
        // SAFETY: a live map value; its thread is being put on a CPU here.
        unsafe {
            let now = if switched_ns == 0 { bpf_ktime_get_ns() } else { switched_ns };
            if (*waiter).phase == Phase::Slice as u32 && (*waiter).run != RunState::Blocked as u32 {
                let queued = now.saturating_sub((*waiter).run_since_ns);
                if queued > (*waiter).longest_queue_ns {
                    (*waiter).longest_queue_ns = queued;
                    (*waiter).longest_queue_after = previous;
                }
            }
            switch_run_state(waiter, RunState::Cpu, now);
        }
    }
    0
}

#[btf_tracepoint(function = "sched_wakeup")]
fn sched_wakeup(ctx: BtfTracePointContext) -> u32 {
    if let Some(waiter) = find(Task::argument(&ctx, 0).tid()) {
        // SAFETY: a live map value; its thread is blocked, so nothing else writes it.
        unsafe {
            if (*waiter).run == RunState::Blocked as u32 {
                let now = bpf_ktime_get_ns();
                switch_run_state(waiter, RunState::Woken, now);
                (*waiter).woken_ns = now;
            }
        }
    }
    0
}
