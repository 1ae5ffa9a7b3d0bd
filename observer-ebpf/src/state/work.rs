//! What each thread works for now. *origin* sets it when a request arrives, *deferred* when a task starts or continues,
//! and the end of a slice clears it. *reactor* reads it to attribute stalls.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::BPF_ANY, macros::map, maps::HashMap};
use observer_common::{
    deferred::{TaskKey, Work},
    loss::Loss,
};

use super::waiters;
use crate::{emit::count_loss, words};

/// Work by thread ID. An entry stays until its thread exits; it is empty while the thread has no known work.
#[map]
static WORK: HashMap<u32, Work> = HashMap::with_max_entries(10_240, 0);

/// The current work of this thread.
#[inline(always)]
pub(crate) fn current(tid: u32) -> Work {
    let mut current = MaybeUninit::<Work>::uninit();
    // SAFETY: either branch writes all words; the entry is a live map value that only this thread writes.
    unsafe {
        match WORK.get_ptr(tid) {
            Some(work) => words::copy(work, current.as_mut_ptr()),
            None => words::clear(current.as_mut_ptr()),
        }
        current.assume_init()
    }
}

/// Switches the current thread to other work.
#[inline(always)]
pub(crate) fn switch_to(tid: u32, next: &Work, now: u64) {
    let is_none = next.origin.inode == 0 && next.key.tgid == 0;
    if let Some(work) = WORK.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe {
            waiters::account_work(tid, &*work, now, !is_none);
            words::copy(next, work);
            (*work).since_ns = now;
        }
    } else if !is_none {
        let work = Work { since_ns: now, ..*next };
        if WORK.insert(tid, work, u64::from(BPF_ANY)).is_err() {
            count_loss(Loss::WorkFull);
            return;
        }
        waiters::account_work(tid, &work, now, true);
    }
}

/// Changes the key of the current thread's task.
#[inline(always)]
pub(crate) fn rekey(tid: u32, key: TaskKey) {
    if let Some(work) = WORK.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe { (*work).key = key };
    }
}

/// Removes the entry of a thread that has exited: its ID may be reused.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    let _absent = WORK.remove(tid);
}

/// A unique ID for a request or task that this thread begins now: the low bits of the clock, and the thread ID. The bits
/// of the clock repeat after more than an hour, when the previous request or task with this ID has long ended.
#[inline(always)]
pub(crate) const fn unique_id(tid: u32, now: u64) -> u64 {
    /// Number of bits of a thread ID.
    const TID_BITS: u32 = 22;
    now << TID_BITS | tid as u64
}
