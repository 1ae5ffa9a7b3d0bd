//! What each thread works for now: set by *origin* when a request comes in and by *deferred* when put-off work goes on,
//! ended by the slice. Shared by both, and by *reactor* to say what a stall was for.

use aya_ebpf::{bindings::BPF_ANY, macros::map, maps::HashMap};
use observer_common::{
    deferred::{TaskKey, Work},
    loss::Loss,
};

use super::reactors;
use crate::emit::lost;

/// By thread id. An entry stays until its thread is gone, empty while the thread works for nobody.
#[map]
static WORK: HashMap<u32, Work> = HashMap::with_max_entries(10_240, 0);

/// What this thread works for.
#[inline(always)]
pub(crate) fn current(tid: u32) -> Work {
    // SAFETY: a live map value that only this thread writes.
    WORK.get_ptr(tid).map_or(Work::NONE, |work| unsafe { *work })
}

/// The current thread turns to other work now.
#[inline(always)]
pub(crate) fn turn_to(tid: u32, next: &Work, now: u64) {
    let is_nothing = next.origin.inode == 0 && next.key.tgid == 0;
    if let Some(work) = WORK.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe {
            reactors::account_work(tid, &*work, now, !is_nothing);
            *work = *next;
            (*work).since_ns = now;
        }
    } else if !is_nothing {
        let work = Work { since_ns: now, ..*next };
        if WORK.insert(tid, work, u64::from(BPF_ANY)).is_err() {
            lost(Loss::WorkFull);
            return;
        }
        reactors::account_work(tid, &work, now, true);
    }
}

/// What the current thread works on has got another key.
#[inline(always)]
pub(crate) fn is_known_by(tid: u32, key: TaskKey) {
    if let Some(work) = WORK.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe { (*work).key = key };
    }
}

/// A thread is gone: a stranger may get its id next.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    let _absent = WORK.remove(tid);
}

/// A number for something that this thread begins now. Nothing else has it: what the same thread began when its clock
/// showed the same, an hour before, is long over.
#[inline(always)]
pub(crate) const fn number(tid: u32, now: u64) -> u64 {
    /// As many bits as a thread id can have.
    const TID_BITS: u32 = 22;
    now << TID_BITS | tid as u64
}
