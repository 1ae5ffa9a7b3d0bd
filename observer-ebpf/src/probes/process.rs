//! *process*: keeps the set of targets up to date on fork, exec and exit. A process that was rejected can become a
//! candidate again after an exec.

use aya_ebpf::{bindings::BPF_EXIST, macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::warn;
use observer_common::{loss::Loss, process::Target};

use crate::{
    emit::count_loss,
    kernel::Task,
    state::{
        accept_queue, gc, reactors,
        targets::{self, REJECTED_PIDS, TARGETS, execs_of, is_candidate, is_target, selects, target},
        work,
    },
};

/// Whether children of targets become targets; set by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
static FOLLOW: u8 = 1;

#[btf_tracepoint(function = "sched_process_fork")]
fn process_fork(ctx: BtfTracePointContext) -> u32 {
    let (parent, child) = (Task::argument(&ctx, 0).tgid(), Task::argument(&ctx, 1).tgid());
    // SAFETY: a static that only the loader writes, before any program runs.
    let follow = unsafe { core::ptr::read_volatile(&raw const FOLLOW) } != 0;
    if parent != child && follow && is_target(parent) {
        // Replaces an exited process of the same ID that the loader has not removed yet: `execs` shows the difference.
        let execs = execs_of(child).map_or(0, |before| before.wrapping_add(1));
        let target = Target { exited: 0, execs, is_candidate: is_candidate(parent) };
        if !targets::add(child, target) && TARGETS.insert(child, target, u64::from(BPF_EXIST)).is_err() {
            count_loss(Loss::TargetsFull);
            warn!(&ctx, "no room to follow process {}, forked by {}", child, parent);
        }
    }
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
fn process_exec(ctx: BtfTracePointContext) -> u32 {
    let tgid = Task::argument(&ctx, 0).tgid();
    // The event loops of the program before have ended. A thread that executes a program takes the ID of its process.
    reactors::thread_exited(ctx.arg(1));
    let Some(target) = target(tgid) else {
        if selects() {
            let _unknown = REJECTED_PIDS.remove(tgid);
        }
        return 0;
    };
    // SAFETY: a live map value; after an exec the process has no other thread that could write it.
    unsafe { (*target).execs += 1 };
    gc::process_execed(tgid);
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
fn process_exit(ctx: BtfTracePointContext) -> u32 {
    let task = Task::argument(&ctx, 0);
    // This is also needed if the loader has already removed the process: threads that exit together do so one after
    // another.
    reactors::thread_exited(task.tid());
    let Some(target) = target(task.tgid()) else {
        if selects() {
            // The process may have been rejected while the thread was inside a call.
            accept_queue::thread_exited(task.tid());
            gc::thread_exited(task.tid());
            work::thread_exited(task.tid());
            // The process ID may be reused.
            if task.live_threads() == 0 {
                let _unknown = REJECTED_PIDS.remove(task.tgid());
            }
        }
        return 0;
    };
    accept_queue::thread_exited(task.tid());
    gc::thread_exited(task.tid());
    work::thread_exited(task.tid());
    if task.live_threads() == 0 {
        gc::process_exited(task.tgid());
        // SAFETY: a live map value; only the last thread of a process reaches this.
        unsafe { (*target).exited = 1 };
    }
    0
}
