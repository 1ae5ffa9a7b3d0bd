//! *reactor*: what a thread that waits for events does between two waits, how long, and whether it had a CPU.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map, tracepoint},
    maps::HashMap,
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::warn;
use observer_common::{
    loss::Loss,
    reactor::{Phase, RUN_STATES, Reactor, Run},
};

use super::process;
use crate::{
    emit::{lost, record},
    kernel::{self, Task},
};

/// Reactors by thread id. Only its own thread writes an entry, but for a wake-up, which the scheduler orders
/// between the switch that took the thread off its CPU and the one that puts it back.
#[map]
static REACTORS: HashMap<u32, Reactor> = HashMap::with_max_entries(1024, 0);

/// What a new entry starts from: too large for the stack.
static NEW: Reactor = Reactor::EMPTY;

/// The current thread enters a wait for events: the slice, if one was seen to begin, is over.
#[tracepoint]
fn wait_enter(ctx: TracePointContext) -> u32 {
    let Some(reactor) = current_reactor(&ctx) else { return 0 };
    // SAFETY: a live map value that only this thread writes while it runs.
    unsafe {
        let now = bpf_ktime_get_ns();
        if (*reactor).phase == Phase::Slice as u32 {
            turn(reactor, Run::Cpu, now);
            record(&raw mut (*reactor).slice, now.saturating_sub((*reactor).phase_since_ns));
        }
        (*reactor).phase = Phase::Waiting as u32;
        (*reactor).phase_since_ns = now;
        (*reactor).run = Run::Cpu as u32;
        (*reactor).run_since_ns = now;
    }
    0
}

/// The current thread returns from a wait for events: a slice begins.
#[tracepoint]
fn wait_exit(ctx: TracePointContext) -> u32 {
    let Some(reactor) = current_reactor(&ctx) else { return 0 };
    // SAFETY: as above.
    unsafe {
        let now = bpf_ktime_get_ns();
        if (*reactor).phase == Phase::Waiting as u32 && (*reactor).phase_since_ns != 0 {
            (*reactor).waits += 1;
            (*reactor).wait_ns += now.saturating_sub((*reactor).phase_since_ns);
            let events = kernel::returned(&ctx).unwrap_or(0);
            if events > 0 {
                (*reactor).events += events.cast_unsigned();
            }
        }
        (*reactor).phase = Phase::Slice as u32;
        (*reactor).phase_since_ns = now;
        (*reactor).run = Run::Cpu as u32;
        (*reactor).run_since_ns = now;
    }
    0
}

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> u32 {
    let (_, previous) = kernel::current();
    let next = Task::argument(&ctx, 2).tid();
    if let Some(reactor) = reactor_of(previous) {
        let run = if kernel::blocks(&ctx) { Run::Blocked } else { Run::Preempted };
        // SAFETY: a live map value; its thread is here, going off its CPU.
        unsafe { turn(reactor, run, bpf_ktime_get_ns()) };
    }
    if let Some(reactor) = reactor_of(next) {
        // SAFETY: a live map value; its thread is here, going on its CPU.
        unsafe { turn(reactor, Run::Cpu, bpf_ktime_get_ns()) };
    }
    0
}

#[btf_tracepoint(function = "sched_wakeup")]
fn sched_wakeup(ctx: BtfTracePointContext) -> u32 {
    if let Some(reactor) = reactor_of(Task::argument(&ctx, 0).tid()) {
        // SAFETY: a live map value; its thread is blocked, so nothing else writes it.
        unsafe {
            if (*reactor).run == Run::Blocked as u32 {
                turn(reactor, Run::Woken, bpf_ktime_get_ns());
            }
        }
    }
    0
}

/// The figures of a thread that exits are final: a stranger may get its id next.
#[inline(always)]
pub(super) fn thread_exited(tid: u32) {
    if let Some(reactor) = REACTORS.get_ptr_mut(tid) {
        // SAFETY: a live map value; its thread is the one that exits.
        unsafe { (*reactor).phase = Phase::Exited as u32 };
    }
}

/// The entry of a thread that may be a reactor; the idle thread never is.
#[inline(always)]
fn reactor_of(tid: u32) -> Option<*mut Reactor> {
    if tid == 0 { None } else { REACTORS.get_ptr_mut(tid) }
}

/// The entry of the current thread, made if its process is a target.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
fn current_reactor(ctx: &TracePointContext) -> Option<*mut Reactor> {
    let (tgid, tid) = kernel::current();
    if let Some(reactor) = REACTORS.get_ptr_mut(tid) {
        return Some(reactor);
    }
    if !process::is_target(tgid) {
        return None;
    }
    // Fails as well if the loader has made it meanwhile, which is fine.
    let _full = REACTORS.insert(tid, &NEW, u64::from(BPF_NOEXIST));
    let Some(reactor) = REACTORS.get_ptr_mut(tid) else {
        lost(Loss::ReactorsFull);
        warn!(ctx, "no room for reactor {} of process {}", tid, tgid);
        return None;
    };
    // SAFETY: a live map value that only this thread writes.
    unsafe { (*reactor).tgid = tgid };
    Some(reactor)
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
        let from = (*reactor).run as usize;
        let elapsed = now.saturating_sub((*reactor).run_since_ns);
        if (*reactor).phase == Phase::Slice as u32 {
            if from < RUN_STATES {
                let split = (&raw mut (*reactor).split_ns).cast::<u64>().add(from);
                *split += elapsed;
            }
        } else if from == Run::Woken as usize && to as u32 == Run::Cpu as u32 {
            record(&raw mut (*reactor).wakeup, elapsed);
        }
        (*reactor).run = to as u32;
        (*reactor).run_since_ns = now;
    }
}
