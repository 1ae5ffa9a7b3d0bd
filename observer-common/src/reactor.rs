//! Shared types of the *reactor* probe: a thread that waits for events, and what it does between two waits.

use crate::histogram::Histogram;

/// What a reactor is doing.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Inside a wait for events.
    Waiting = 0,
    /// Between the return of a wait and the next wait: a slice.
    Slice = 1,
    /// The thread is gone; its figures are final.
    Exited = 2,
}

/// What the scheduler does with a reactor's thread.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// On a CPU.
    Cpu = 0,
    /// Runnable after it had blocked, waiting for a CPU.
    Woken = 1,
    /// Runnable but pushed off its CPU by another thread.
    Preempted = 2,
    /// Blocked.
    Blocked = 3,
}

/// Number of [`Run`] states.
pub const RUN_STATES: usize = 4;

/// Value of `REACTORS`, whose key is the thread id (as the initial pid namespace has it).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reactor {
    /// Process of the thread.
    pub tgid: u32,
    /// A [`Phase`].
    pub phase: u32,
    /// Start of the current phase, monotonic nanoseconds.
    pub phase_since_ns: u64,
    /// Start of the current [`Run`] state, or of the slice if that is later; monotonic nanoseconds.
    pub run_since_ns: u64,
    /// A [`Run`] state.
    pub run: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
    /// Finished waits.
    pub waits: u64,
    /// Events those waits returned.
    pub events: u64,
    /// Time spent in finished waits, nanoseconds.
    pub wait_ns: u64,
    /// Time in slices by [`Run`] state, nanoseconds, up to `run_since_ns`.
    pub split_ns: [u64; RUN_STATES],
    /// Lengths of finished slices.
    pub slice: Histogram,
    /// Made runnable -> running, for wake-ups out of a wait.
    pub wakeup: Histogram,
}
crate::shared!(Reactor, 88 + 2 * size_of::<Histogram>());

impl Reactor {
    /// One that has done nothing.
    pub const EMPTY: Self = Self {
        tgid: 0,
        phase: Phase::Waiting as u32,
        phase_since_ns: 0,
        run_since_ns: 0,
        run: Run::Cpu as u32,
        reserved: 0,
        waits: 0,
        events: 0,
        wait_ns: 0,
        split_ns: [0; RUN_STATES],
        slice: Histogram::EMPTY,
        wakeup: Histogram::EMPTY,
    };
}
