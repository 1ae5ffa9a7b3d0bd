//! *process*: keeps the set of targets true while they fork, exec and exit, and has others come up for selection as soon
//! as they listen or wait for events.

use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_NOEXIST},
    macros::{btf_tracepoint, map},
    maps::{HashMap, LruHashMap},
    programs::BtfTracePointContext,
};
use aya_log_ebpf::warn;
use observer_common::{loss::Loss, process::Target};

use super::{accept, gc, reactor};
use crate::{emit::lost, kernel::Task, presence, work};

/// Processes under observation, by id in the initial pid namespace.
#[map]
static TARGETS: HashMap<u32, Target> = HashMap::with_max_entries(4096, 0);

/// Whether children of targets become targets; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static FOLLOW: u8 = 1;

/// Processes that the loader has turned down, until they run another program.
#[map]
static STRANGERS: LruHashMap<u32, u8> = LruHashMap::with_max_entries(16_384, 0);

/// Whether processes are selected by more than their ids; set by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static SELECTS: u8 = 0;

#[inline(always)]
fn selects() -> bool {
    // SAFETY: a static that only the loader writes, before any program runs.
    unsafe { core::ptr::read_volatile(&raw const SELECTS) != 0 }
}

/// A process that is no target waits for events: observed from now on, until the loader decides; unless it has.
#[inline(always)]
pub(super) fn comes_up(tgid: u32) -> bool {
    selects() && STRANGERS.get_ptr(tgid).is_none() && is_made_candidate(tgid)
}

/// A process that is no target listens, which may be what it is selected for.
#[inline(always)]
pub(super) fn comes_up_again(tgid: u32) -> bool {
    selects() && {
        let _new = STRANGERS.remove(tgid);
        is_made_candidate(tgid)
    }
}

#[inline(always)]
fn is_made_candidate(tgid: u32) -> bool {
    let candidate = Target { exited: 0, execs: 0, is_candidate: 1 };
    // Fails as well if another thread was first, which is fine.
    let is_there = add(tgid, candidate) || is_target(tgid);
    if !is_there {
        lost(Loss::TargetsFull);
    }
    is_there
}

/// Adds an entry if there is none. Tells whether it did.
#[inline(always)]
fn add(tgid: u32, target: Target) -> bool {
    presence::count_processes(tgid, 1);
    let is_new = TARGETS.insert(tgid, target, u64::from(BPF_NOEXIST)).is_ok();
    if !is_new {
        presence::count_processes(tgid, -1);
    }
    is_new
}

/// Whether a process is under observation.
#[inline(always)]
pub(super) fn is_target(tgid: u32) -> bool {
    target(tgid).is_some()
}

#[inline(always)]
fn target(tgid: u32) -> Option<*mut Target> {
    if presence::of_process(tgid) { TARGETS.get_ptr_mut(tgid) } else { None }
}

/// Children of candidates are selected by themselves.
#[inline(always)]
fn is_candidate(tgid: u32) -> u32 {
    // SAFETY: a live map value, of which this part never changes.
    target(tgid).map_or(0, |target| unsafe { (*target).is_candidate })
}

/// How many programs a process has started that is or was observed.
#[inline(always)]
fn execs_of(tgid: u32) -> Option<u32> {
    // SAFETY: a live map value; four bytes are read at once.
    target(tgid).map(|target| unsafe { (*target).execs })
}

#[btf_tracepoint(function = "sched_process_fork")]
fn process_fork(ctx: BtfTracePointContext) -> u32 {
    let (parent, child) = (Task::argument(&ctx, 0).tgid(), Task::argument(&ctx, 1).tgid());
    // SAFETY: a static that only the loader writes, before any program runs.
    let follow = unsafe { core::ptr::read_volatile(&raw const FOLLOW) } != 0;
    if parent != child && follow && is_target(parent) {
        // Over what may be there: a process of that id that has exited since the loader looked, whose program is not this.
        let execs = execs_of(child).map_or(0, |before| before.wrapping_add(1));
        let target = Target { exited: 0, execs, is_candidate: is_candidate(parent) };
        if !add(child, target) && TARGETS.insert(child, target, u64::from(BPF_EXIST)).is_err() {
            lost(Loss::TargetsFull);
            warn!(&ctx, "no room to follow process {}, forked by {}", child, parent);
        }
    }
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
fn process_exec(ctx: BtfTracePointContext) -> u32 {
    let tgid = Task::argument(&ctx, 0).tgid();
    let Some(target) = target(tgid) else {
        if selects() {
            let _unknown = STRANGERS.remove(tgid);
        }
        return 0;
    };
    // SAFETY: a live map value; an exec leaves a process no other thread that could write it.
    unsafe { (*target).execs += 1 };
    gc::program_changed(tgid);
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
fn process_exit(ctx: BtfTracePointContext) -> u32 {
    let task = Task::argument(&ctx, 0);
    // Even if the loader has heard of the end of its process already: threads that exit together are told one by one.
    reactor::thread_exited(task.tid());
    let Some(target) = target(task.tgid()) else {
        if selects() {
            // It may have been turned down inside a call.
            accept::thread_exited(task.tid());
            gc::thread_exited(task.tid());
            work::thread_exited(task.tid());
            // Its id may become another's.
            if task.live_threads() == 0 {
                let _unknown = STRANGERS.remove(task.tgid());
            }
        }
        return 0;
    };
    accept::thread_exited(task.tid());
    gc::thread_exited(task.tid());
    work::thread_exited(task.tid());
    if task.live_threads() == 0 {
        gc::process_exited(task.tgid());
        // SAFETY: a live map value; only the last thread of a process gets here.
        unsafe { (*target).exited = 1 };
    }
    0
}
