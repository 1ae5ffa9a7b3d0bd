//! Processes under observation, which the loader adds, and candidates, which the programs nominate and the loader
//! decides about.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{HashMap, LruHashMap},
};
use observer_common::{loss::Loss, process::Target};

use super::id_filter;
use crate::emit::count_loss;

/// Processes under observation, by ID in the initial PID namespace.
#[map]
pub(crate) static TARGETS: HashMap<u32, Target> = HashMap::with_max_entries(4096, 0);

/// Processes that the loader has rejected, until they execute another program.
#[map]
pub(crate) static REJECTED_PIDS: LruHashMap<u32, u8> = LruHashMap::with_max_entries(16_384, 0);

/// Whether processes are selected by anything but their IDs; set by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
static SELECTS: u8 = 0;

#[inline(always)]
pub(crate) fn selects() -> bool {
    // SAFETY: a static that only the loader writes, before any program runs.
    unsafe { core::ptr::read_volatile(&raw const SELECTS) != 0 }
}

/// Makes a process that waits for events a candidate, unless the loader has rejected it. The process is not a target
/// yet. A candidate is observed until the loader decides. Returns whether the process is observed.
#[inline(always)]
pub(crate) fn nominate_candidate(tgid: u32) -> bool {
    selects() && REJECTED_PIDS.get_ptr(tgid).is_none() && add_candidate(tgid)
}

/// Makes a process that begins to listen a candidate, even if the loader has rejected it: its port may match a selector
/// now. The process is not a target yet.
#[inline(always)]
pub(crate) fn renominate_candidate(tgid: u32) -> bool {
    selects() && {
        let _new = REJECTED_PIDS.remove(tgid);
        add_candidate(tgid)
    }
}

#[inline(always)]
fn add_candidate(tgid: u32) -> bool {
    let candidate = Target { exited: 0, execs: 0, is_candidate: 1 };
    // This also fails if another thread was first, which is harmless.
    let is_observed = add(tgid, candidate) || is_target(tgid);
    if !is_observed {
        count_loss(Loss::TargetsFull);
    }
    is_observed
}

/// Adds an entry if there is none. Returns whether it did.
#[inline(always)]
pub(crate) fn add(tgid: u32, target: Target) -> bool {
    id_filter::count_processes(tgid, 1);
    let is_new = TARGETS.insert(tgid, target, u64::from(BPF_NOEXIST)).is_ok();
    if !is_new {
        id_filter::count_processes(tgid, -1);
    }
    is_new
}

/// Whether a process is under observation.
#[inline(always)]
pub(crate) fn is_target(tgid: u32) -> bool {
    target(tgid).is_some()
}

#[inline(always)]
pub(crate) fn target(tgid: u32) -> Option<*mut Target> {
    if id_filter::may_contain_process(tgid) { TARGETS.get_ptr_mut(tgid) } else { None }
}

/// Whether a process is a candidate, as 0 or 1. Its children are candidates, too: the loader decides about each.
#[inline(always)]
pub(crate) fn is_candidate(tgid: u32) -> u32 {
    // SAFETY: a live map value; this field never changes.
    target(tgid).map_or(0, |target| unsafe { (*target).is_candidate })
}

/// Number of times that a process has executed another program; `None` if it has no entry.
#[inline(always)]
pub(crate) fn execs_of(tgid: u32) -> Option<u32> {
    // SAFETY: a live map value; four bytes are read atomically.
    target(tgid).map(|target| unsafe { (*target).execs })
}
