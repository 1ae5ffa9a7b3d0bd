//! Detaches programs from processes. With each the kernel waits for grace periods, a tenth of a second on a busy machine,
//! one program after the other, and attaches none meanwhile. So a thread waits that has nothing else to do, and whoever
//! wants to attach comes back when it is done.

use std::{
    os::fd::OwnedFd,
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
};

const STACK: usize = 64 << 10;

/// What is to be detached, each with its process.
#[derive(Default)]
struct Pending {
    /// The last comes first.
    waiting: Vec<(u32, OwnedFd)>,
    /// The process of what the thread is at.
    in_hand: Option<u32>,
    has_thread: bool,
}

#[derive(Default)]
struct Detacher {
    pending: Mutex<Pending>,
    has_more: Condvar,
    has_less: Condvar,
}

static DETACHER: LazyLock<Detacher> = LazyLock::new(Detacher::default);

/// Detaches what this descriptor stands for from a process, soon.
pub(super) fn later(pid: u32, attached: OwnedFd) {
    let mut pending = DETACHER.lock();
    if !pending.has_thread {
        let thread = thread::Builder::new().name("detach".into()).stack_size(STACK);
        pending.has_thread = thread.spawn(|| DETACHER.work()).is_ok();
    }
    // Without a thread it is done here and now, when it is dropped.
    if pending.has_thread {
        pending.waiting.push((pid, attached));
        DETACHER.has_more.notify_one();
    }
}

/// Whether anything is still to be detached.
pub(crate) fn is_busy() -> bool {
    let pending = DETACHER.lock();
    !pending.waiting.is_empty() || pending.in_hand.is_some()
}

/// Returns when all is detached that was to be from this process: until then a program may still run where it stood.
pub(crate) fn finish(pid: u32) {
    let mut pending = DETACHER.lock();
    pending.waiting.sort_by_key(|(of, _)| *of == pid);
    while pending.in_hand == Some(pid) || pending.waiting.iter().any(|(of, _)| *of == pid) {
        pending = DETACHER.has_less.wait(pending).unwrap_or_else(PoisonError::into_inner);
    }
}

impl Detacher {
    /// Nobody panics with this in hand.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut pending = self.lock();
        loop {
            if let Some((pid, attached)) = pending.waiting.pop() {
                pending.in_hand = Some(pid);
                drop(pending);
                drop(attached);
                pending = self.lock();
                pending.in_hand = None;
                self.has_less.notify_all();
            } else {
                pending = self.has_more.wait(pending).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
