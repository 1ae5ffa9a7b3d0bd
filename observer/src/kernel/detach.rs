//! Detaches uprobes: closes the perf events that they are attached by.
//!
//! The kernel removes a breakpoint when the last descriptor of its event is closed. If the closing thread is being
//! killed meanwhile, as happens when its process exits, the kernel gives up and the breakpoint stays in the target for
//! ever ("failed to unregister, leaking uprobe"). A process that is already exiting cannot be killed. So events are
//! closed by a child process that does nothing but exit.
//!
//! The kernel waits for grace periods for each event, 100 ms on a busy machine, and attaches no uprobes meanwhile. So a
//! background thread waits for the child, and callers that attach retry after it is done.

use std::{
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    libc,
    sys::{signal::SigSet, wait::waitpid},
    unistd::{ForkResult, fork, pipe2},
};

const STACK: usize = 64 << 10;

/// Events closed by one child. A fork takes 1 ms and an event 100 ms, during which nothing can be attached.
const BATCH: usize = 4;

/// Events to be closed.
#[derive(Default)]
struct Pending {
    /// Waiting events, each with the process it is attached to. The last is closed first.
    waiting: Vec<(u32, OwnedFd)>,
    /// The process whose events are being closed, and their number.
    in_progress: Option<(u32, usize)>,
    has_thread: bool,
}

impl Pending {
    fn count(&self) -> usize {
        self.waiting.len() + self.in_progress.map_or(0, |(_, count)| count)
    }

    /// Removes the next batch of waiting events, all of one process.
    fn next(&mut self) -> Option<(u32, Vec<OwnedFd>)> {
        let (pid, _) = *self.waiting.last()?;
        let count = self.waiting.iter().rev().take(BATCH).take_while(|(of, _)| *of == pid).count();
        let batch = self.waiting.split_off(self.waiting.len() - count);
        Some((pid, batch.into_iter().map(|(_, event)| event).collect()))
    }
}

#[derive(Default)]
struct Detacher {
    pending: Mutex<Pending>,
    /// Notified when events are added.
    added: Condvar,
    /// Notified when a batch is closed.
    closed: Condvar,
}

static DETACHER: LazyLock<Detacher> = LazyLock::new(Detacher::default);

/// Detaches the program of this event from a process, in the background.
pub(super) fn schedule(pid: u32, event: OwnedFd) {
    let mut pending = DETACHER.lock();
    if !pending.has_thread {
        let thread = thread::Builder::new().name("detach".into()).stack_size(STACK);
        pending.has_thread = thread.spawn(|| DETACHER.work()).is_ok();
    }
    if pending.has_thread {
        pending.waiting.push((pid, event));
        DETACHER.added.notify_one();
    } else {
        drop(pending);
        close_by_exit(vec![event]);
    }
}

/// Whether events are waiting or being closed.
pub(crate) fn is_busy() -> bool {
    DETACHER.lock().count() > 0
}

/// Waits until all events of this process are closed: before that, its programs may still run.
pub(crate) fn finish(pid: u32) {
    let mut pending = DETACHER.lock();
    pending.waiting.sort_by_key(|(of, _)| *of == pid);
    while pending.in_progress.is_some_and(|(of, _)| of == pid)
        || pending.waiting.iter().any(|(of, _)| *of == pid)
    {
        pending = DETACHER.closed.wait(pending).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Waits until all events are closed. Whenever no batch is closed within `patience`, calls `report` with the number of
/// events left.
pub(crate) fn finish_all(patience: Duration, report: impl Fn(usize)) {
    let mut pending = DETACHER.lock();
    while pending.count() > 0 {
        let outcome = DETACHER.closed.wait_timeout(pending, patience);
        let (guard, timeout) = outcome.unwrap_or_else(PoisonError::into_inner);
        pending = guard;
        if timeout.timed_out() && pending.count() > 0 {
            report(pending.count());
        }
    }
}

impl Detacher {
    /// A poisoned lock is harmless here: no code panics while holding it.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        // Signals are handled by the main thread, and must not reach the children forked here.
        let _cannot_fail = SigSet::all().thread_block();
        let mut pending = self.lock();
        loop {
            if let Some((pid, events)) = pending.next() {
                pending.in_progress = Some((pid, events.len()));
                drop(pending);
                close_by_exit(events);
                pending = self.lock();
                pending.in_progress = None;
                self.closed.notify_all();
            } else {
                pending = self.added.wait(pending).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Closes events in a child process that exits; returns when the kernel is done. If fork fails, they are closed here,
/// which only a signal that kills observer at this very moment can interrupt.
fn close_by_exit(mut events: Vec<OwnedFd>) {
    events.sort_by_key(|event| event.as_raw_fd());
    let Ok((go, hold)) = pipe2(OFlag::O_CLOEXEC) else { return };
    // SAFETY: the child makes only system calls, which are async-signal-safe.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => run_child(&events, go.as_raw_fd(), hold.as_raw_fd()),
        Ok(ForkResult::Parent { child }) => {
            // From here on the child has the last descriptors, even if this process is killed.
            drop(events);
            drop(hold);
            let _its_end = waitpid(child, None);
        }
        Err(_) => {}
    }
}

/// The child: closes all descriptors but those of the events, which must be sorted, waits until observer has closed its
/// own, and exits. It must not allocate: another thread may have held the allocator's lock during the fork.
fn run_child(events: &[OwnedFd], go: RawFd, hold: RawFd) -> ! {
    // SAFETY: system calls on descriptors and memory of this process, which runs nothing else.
    unsafe {
        libc::close(hold);
        // Done while observer still has all of these open. Thus observer's sockets and maps end with observer, and the
        // last descriptor of another event is never closed here.
        let mut first: RawFd = 0;
        for event in events {
            close_between(first, event.as_raw_fd(), go);
            first = event.as_raw_fd() + 1;
        }
        close_between(first, RawFd::MAX, go);
        let mut byte = 0_u8;
        while libc::read(go, (&raw mut byte).cast(), 1) > 0 {}
        // Killed rather than exiting: after SIGKILL, no further signal can interrupt the exit.
        libc::kill(libc::getpid(), libc::SIGKILL);
        libc::_exit(0)
    }
}

/// Closes the descriptors in `first..end`, except `kept`.
fn close_between(first: RawFd, end: RawFd, kept: RawFd) {
    if (first..end).contains(&kept) {
        close_all(first, kept - 1);
        close_all(kept + 1, end - 1);
    } else {
        close_all(first, end - 1);
    }
}

/// Closes the descriptors from `first` to `last`; one by one if `close_range` is missing or blocked by a seccomp
/// filter.
fn close_all(first: RawFd, last: RawFd) {
    if first > last {
        return;
    }
    /// Above every descriptor that observer opens.
    const MAX_DESCRIPTOR: RawFd = 1 << 16;
    // SAFETY: system calls on descriptors that this process no longer uses.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) != 0 {
            for descriptor in first..=last.min(MAX_DESCRIPTOR) {
                libc::close(descriptor);
            }
        }
    }
}
