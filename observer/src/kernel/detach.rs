//! Detaches programs from places in processes: closes the events that they are attached by.
//!
//! The kernel removes a breakpoint when the last descriptor of its event is closed. If the closing thread is being killed
//! meanwhile, as happens when its process exits, the kernel gives up and the breakpoint stays in the target for ever
//! ("failed to unregister, leaking uprobe"). A process that is exiting can no longer be interrupted. So events are closed by a
//! child process that does nothing but exit.
//!
//! With each event the kernel waits for grace periods, a tenth of a second on a busy machine, and attaches none meanwhile. So a
//! thread waits for the child, and what wants to attach comes back when it is done.

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

/// Events that one child closes: a fork takes a millisecond, an event a hundred, and others wait for the child.
const BATCH: usize = 4;

/// What is to be detached.
#[derive(Default)]
struct Pending {
    /// Events, each with the process it is attached to. The last comes first.
    waiting: Vec<(u32, OwnedFd)>,
    /// The process that events are being detached from, and how many.
    in_hand: Option<(u32, usize)>,
    has_thread: bool,
}

impl Pending {
    fn count(&self) -> usize {
        self.waiting.len() + self.in_hand.map_or(0, |(_, count)| count)
    }

    /// The next of one process.
    fn next(&mut self) -> Option<(u32, Vec<OwnedFd>)> {
        let (pid, _) = *self.waiting.last()?;
        let alike = self.waiting.iter().rev().take(BATCH).take_while(|(of, _)| *of == pid).count();
        let batch = self.waiting.split_off(self.waiting.len() - alike);
        Some((pid, batch.into_iter().map(|(_, event)| event).collect()))
    }
}

#[derive(Default)]
struct Detacher {
    pending: Mutex<Pending>,
    has_more: Condvar,
    has_less: Condvar,
}

static DETACHER: LazyLock<Detacher> = LazyLock::new(Detacher::default);

/// Detaches the program of this event from a process, soon.
pub(super) fn later(pid: u32, event: OwnedFd) {
    let mut pending = DETACHER.lock();
    if !pending.has_thread {
        let thread = thread::Builder::new().name("detach".into()).stack_size(STACK);
        pending.has_thread = thread.spawn(|| DETACHER.work()).is_ok();
    }
    if pending.has_thread {
        pending.waiting.push((pid, event));
        DETACHER.has_more.notify_one();
    } else {
        drop(pending);
        close_by_exit(vec![event]);
    }
}

/// Whether anything is still to be detached.
pub(crate) fn is_busy() -> bool {
    DETACHER.lock().count() > 0
}

/// Returns when all is detached that was to be from this process: until then a program may still run where it stood.
pub(crate) fn finish(pid: u32) {
    let mut pending = DETACHER.lock();
    pending.waiting.sort_by_key(|(of, _)| *of == pid);
    while pending.in_hand.is_some_and(|(of, _)| of == pid) || pending.waiting.iter().any(|(of, _)| *of == pid)
    {
        pending = DETACHER.has_less.wait(pending).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Returns when nothing is to be detached any more. When that takes longer than so long, `report` is called, again and again,
/// with the number of events that are left.
pub(crate) fn finish_all(patience: Duration, report: impl Fn(usize)) {
    let mut pending = DETACHER.lock();
    while pending.count() > 0 {
        let outcome = DETACHER.has_less.wait_timeout(pending, patience);
        let (guard, timeout) = outcome.unwrap_or_else(PoisonError::into_inner);
        pending = guard;
        if timeout.timed_out() && pending.count() > 0 {
            report(pending.count());
        }
    }
}

impl Detacher {
    /// Nobody panics with this in hand.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        // Signals are for the main thread, and never for the children made here.
        let _cannot_fail = SigSet::all().thread_block();
        let mut pending = self.lock();
        loop {
            if let Some((pid, events)) = pending.next() {
                pending.in_hand = Some((pid, events.len()));
                drop(pending);
                close_by_exit(events);
                pending = self.lock();
                pending.in_hand = None;
                self.has_less.notify_all();
            } else {
                pending = self.has_more.wait(pending).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Closes events in a process that is exiting; returns when the kernel is done. Where no process can be made they are closed
/// here, which only a signal that kills observer at this very moment can interrupt.
fn close_by_exit(mut events: Vec<OwnedFd>) {
    events.sort_by_key(|event| event.as_raw_fd());
    let Ok((go, hold)) = pipe2(OFlag::O_CLOEXEC) else { return };
    // SAFETY: the child makes nothing but system calls.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => exit_with(&events, go.as_raw_fd(), hold.as_raw_fd()),
        Ok(ForkResult::Parent { child }) => {
            // The child's are the last descriptors from now on, whatever becomes of this process.
            drop(events);
            drop(hold);
            let _its_end = waitpid(child, None);
        }
        Err(_) => {}
    }
}

/// What the child does: closes all descriptors but those of these events, which are in order, waits until observer has closed
/// its own, and exits. Allocates nothing: another thread may have held the allocator's lock.
fn exit_with(events: &[OwnedFd], go: RawFd, hold: RawFd) -> ! {
    // SAFETY: system calls on descriptors and memory of this process, which runs nothing else.
    unsafe {
        libc::close(hold);
        // While observer still has all of these: observer's sockets and maps end with observer, and the last descriptor of
        // another event is never closed here.
        let mut first: RawFd = 0;
        for event in events {
            close_between(first, event.as_raw_fd(), go);
            first = event.as_raw_fd() + 1;
        }
        close_between(first, RawFd::MAX, go);
        let mut byte = 0_u8;
        while libc::read(go, (&raw mut byte).cast(), 1) > 0 {}
        // Killed rather than told to exit: from then on further signals no longer reach it.
        libc::kill(libc::getpid(), libc::SIGKILL);
        libc::_exit(0)
    }
}

/// Closes descriptors from the first up to the end, which is left open, as is the kept one.
fn close_between(first: RawFd, end: RawFd, kept: RawFd) {
    if (first..end).contains(&kept) {
        close_all(first, kept - 1);
        close_all(kept + 1, end - 1);
    } else {
        close_all(first, end - 1);
    }
}

/// Closes these descriptors and all between them, one by one where the kernel or a filter refuses to do it at once.
fn close_all(first: RawFd, last: RawFd) {
    if first > last {
        return;
    }
    /// More than observer ever has.
    const MOST: RawFd = 1 << 16;
    // SAFETY: system calls on descriptors that this process no longer uses.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) != 0 {
            for descriptor in first..=last.min(MOST) {
                libc::close(descriptor);
            }
        }
    }
}
