//! *process*: keeps the set of targets true while they fork, exec and exit.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::{btf_tracepoint, map},
    maps::HashMap,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::warn;
use observer_common::{loss::Loss, process::Target};

use super::{accept, gc, reactor};
use crate::{emit::lost, kernel::Task, work};

/// Processes under observation, by id in the initial pid namespace.
#[map]
static TARGETS: HashMap<u32, Target> = HashMap::with_max_entries(4096, 0);

/// Whether children of targets become targets; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static FOLLOW: u8 = 1;

/// Whether a process is under observation.
#[inline(always)]
pub(super) fn is_target(tgid: u32) -> bool {
    TARGETS.get_ptr(tgid).is_some()
}

#[btf_tracepoint(function = "sched_process_fork")]
fn process_fork(ctx: BtfTracePointContext) -> u32 {
    let (parent, child) = (Task::argument(&ctx, 0).tgid(), Task::argument(&ctx, 1).tgid());
    // SAFETY: a static that only the loader writes, before any program runs.
    let follow = unsafe { core::ptr::read_volatile(&raw const FOLLOW) } != 0;
    if parent != child && follow && is_target(parent) {
        let target = Target { exited: 0, execs: 0 };
        // Over what may be there: a process of that id that has exited since the loader looked.
        if TARGETS.insert(child, target, u64::from(BPF_ANY)).is_err() {
            lost(Loss::TargetsFull);
            warn!(&ctx, "no room to follow process {}, forked by {}", child, parent);
        }
    }
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
fn process_exec(ctx: BtfTracePointContext) -> u32 {
    let tgid = Task::argument(&ctx, 0).tgid();
    let Some(target) = TARGETS.get_ptr_mut(tgid) else { return 0 };
    // SAFETY: a live map value; an exec leaves a process no other thread that could write it.
    unsafe { (*target).execs += 1 };
    gc::program_changed(tgid);
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
fn process_exit(ctx: BtfTracePointContext) -> u32 {
    let task = Task::argument(&ctx, 0);
    let Some(target) = TARGETS.get_ptr_mut(task.tgid()) else { return 0 };
    reactor::thread_exited(task.tid());
    accept::thread_exited(task.tid());
    gc::thread_exited(task.tid());
    work::thread_exited(task.tid());
    if task.live_threads() == 0 {
        // SAFETY: a live map value; only the last thread of a process gets here.
        unsafe { (*target).exited = 1 };
    }
    0
}
