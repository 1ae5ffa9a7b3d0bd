//! Detaches programs from processes. With each the kernel waits for a grace period, a tenth of a second on a busy machine,
//! during which nothing else could be observed: so others wait, several at a time, who then share one.

use std::{
    os::fd::OwnedFd,
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
};

/// How many wait at a time.
const THREADS: usize = 16;
const STACK: usize = 64 << 10;

/// What is to be detached.
#[derive(Default)]
struct Pending {
    waiting: Vec<OwnedFd>,
    /// What threads are at.
    in_hand: usize,
    threads: usize,
}

#[derive(Default)]
struct Pool {
    pending: Mutex<Pending>,
    has_more: Condvar,
    has_less: Condvar,
}

static POOL: LazyLock<Pool> = LazyLock::new(Pool::default);

/// Detaches what this descriptor stands for, soon.
pub(super) fn later(attached: OwnedFd) {
    let mut pending = POOL.lock();
    if pending.threads < THREADS {
        let thread = thread::Builder::new().name("detach".into()).stack_size(STACK);
        pending.threads += usize::from(thread.spawn(|| POOL.work()).is_ok());
    }
    // Without any thread it is done here and now, when it is dropped.
    if pending.threads > 0 {
        pending.waiting.push(attached);
        POOL.has_more.notify_one();
    }
}

/// Returns when all that is to be detached is: until then a program may still run in places where it stood.
pub(crate) fn finish() {
    let mut pending = POOL.lock();
    while !pending.waiting.is_empty() || pending.in_hand > 0 {
        pending = POOL.has_less.wait(pending).unwrap_or_else(PoisonError::into_inner);
    }
}

impl Pool {
    /// Nobody panics with this in hand.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut pending = self.lock();
        loop {
            if let Some(attached) = pending.waiting.pop() {
                pending.in_hand += 1;
                drop(pending);
                drop(attached);
                pending = self.lock();
                pending.in_hand -= 1;
                self.has_less.notify_all();
            } else {
                pending = self.has_more.wait(pending).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
