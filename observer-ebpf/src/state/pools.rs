//! Pools: threads of a process that wait on the same epoll set, either all at once, or one at a time while the others
//! are parked. The workers of tokio and of Asio are such threads. A parked thread delays no event.

use aya_ebpf::{bindings::BPF_NOEXIST, macros::map, maps::HashMap};
use observer_common::reactor::{Kind, Pool, REACTORS, WaitPattern};

use crate::emit::add_u32;

/// Number of threads that wait on each set. Each thread is counted once, so the map has space for all.
#[map]
static POOLS: HashMap<Pool, u32> = HashMap::with_max_entries(REACTORS, 0);

/// Counts a thread of this process that waits in this way, unless it is already counted.
///
/// # Safety
/// `pattern` is part of a live map value that only this thread writes.
#[inline(always)]
pub(crate) unsafe fn join(tgid: u32, pattern: *mut WaitPattern) {
    // SAFETY: by contract.
    let WaitPattern { kind, set, is_counted, .. } = unsafe { *pattern };
    if kind != Kind::Epoll as u32 || is_counted != 0 {
        return;
    }
    // SAFETY: by contract.
    unsafe { (*pattern).is_counted = 1 };
    let pool = Pool { tgid, set };
    if POOLS.insert(pool, 1, u64::from(BPF_NOEXIST)).is_err()
        && let Some(threads) = POOLS.get_ptr_mut(pool)
    {
        // SAFETY: a live map value.
        unsafe { add_u32(threads, 1) };
    }
}

/// Uncounts a thread that no longer waits in this way.
#[inline(always)]
pub(crate) fn leave(tgid: u32, pattern: WaitPattern) {
    let pool = Pool { tgid, set: pattern.set };
    if pattern.is_counted != 0
        && let Some(threads) = POOLS.get_ptr_mut(pool)
    {
        // SAFETY: a live map value.
        let is_last = unsafe {
            add_u32(threads, 1_u32.wrapping_neg());
            threads.read_volatile() == 0
        };
        if is_last {
            let _present = POOLS.remove(pool);
        }
    }
}

/// Whether other threads wait on the same set.
#[inline(always)]
pub(crate) fn is_shared(tgid: u32, pattern: WaitPattern) -> bool {
    // SAFETY: a live map value; four bytes are read atomically.
    pattern.is_counted != 0
        && POOLS.get_ptr(Pool { tgid, set: pattern.set }).is_some_and(|threads| unsafe { *threads > 1 })
}
