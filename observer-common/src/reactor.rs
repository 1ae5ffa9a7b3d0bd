//! Shared types of the *reactor* probe: event loops. The threads that wait in them are in `waiter.rs`.

use crate::{histogram::Histogram, waiter::PARTS};

/// Whether an event was waiting at the end of a slice, that is, when the thread looked for events again.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Unknown: the wait returned at once, but without events (such as a call that never blocks), or with events that
    /// may not have waited.
    Unknown = 0,
    /// No: the wait blocked.
    NothingWaited = 1,
    /// Yes: the wait returned at once, with events. They had waited for the length of the slice or less: an event may be
    /// the reaction of a client to the response with which the slice ended.
    EventsWaited = 2,
}

impl Evidence {
    /// The variant with this index; [`Evidence::Unknown`] if there is none.
    pub const fn of(index: u32) -> Self {
        match index {
            1 => Self::NothingWaited,
            2 => Self::EventsWaited,
            _ => Self::Unknown,
        }
    }
}

/// Length from which on the event at the end of a slice is read, in nanoseconds: reading it costs as much as the rest of the
/// program.
pub const EXAMINED_NS: u64 = 10_000_000;

/// Time without a wait after which a loop counts as abandoned, in nanoseconds: its set may have been closed, and the
/// address of its file reused. Handlers that take longer are rare.
pub const ABANDONED_NS: u64 = 2_000_000_000;

/// Value of `REACTORS`: an event loop, that is, an epoll set, a ring, or the descriptors that a thread polls. It looks for
/// events while at least one thread waits, of whatever process. The slots are mapped into user space.
///
/// Most loops have one thread, and only that one writes the entry. While several threads wait on a set, the time between
/// two waits is a *gap*: it begins when the last thread returns from its wait, and ends when the first one is in a wait
/// again. A gap is the first part of a slice of the thread that returned last.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reactor {
    /// When it was seen first, in monotonic nanoseconds; 0 in a slot that has never been used. With the slot, it
    /// identifies the loop.
    pub created_ns: u64,
    /// The thread that waited first.
    pub tid: u32,
    /// Its process; 0 in a slot that is free.
    pub tgid: u32,
    /// Index of this slot.
    pub slot: u32,
    /// Number of threads that belong to it.
    pub members: u32,
    /// Number of these that are inside a wait.
    pub inside: u32,
    /// 1 as soon as a second thread has waited on the set.
    pub is_shared: u32,
    /// Slot of the waiter whose slices are those of the loop: its only thread, or the one that returned last.
    pub waiter: u32,
    /// Descriptor of the epoll set or of the ring in the process of `tid`, as in [`Call`](crate::waiter::Call).
    pub set: u32,
    /// A [`Kind`](crate::waiter::Kind).
    pub kind: u32,
    /// 1 once its last thread has exited or executed another program.
    pub is_over: u32,
    /// Address of the kernel's `struct file` of the set; 0 if the loop has none.
    pub file: u64,
    /// When a thread last returned from a wait, in monotonic nanoseconds.
    pub left_ns: u64,
    /// When `is_shared` was set, in monotonic nanoseconds.
    pub shared_since_ns: u64,
    /// Start of the gap in progress, in monotonic nanoseconds; 0 if there is none, or if the loop is not shared.
    pub gap_since_ns: u64,
    /// Total length of finished gaps, in nanoseconds.
    pub gaps_ns: u64,
    /// Number of finished waits.
    pub waits: u64,
    /// Number of events that those waits returned.
    pub events: u64,
    /// Of these, events that were already waiting when their wait began.
    pub events_delayed: u64,
    /// Time spent in finished waits before the loop was shared, in nanoseconds.
    pub wait_ns: u64,
    /// Time in finished slices by part (see [`PARTS`]), in nanoseconds.
    pub parts_ns: [u64; PARTS],
    /// Of that, time in garbage collections.
    pub gc_ns: u64,
    /// Always zero: explicit padding.
    pub padding: [u64; 7],
}
crate::shared::shared!(Reactor, 256);

impl Reactor {
    /// A loop without any activity.
    pub const EMPTY: Self = Self {
        created_ns: 0,
        tid: 0,
        tgid: 0,
        slot: 0,
        members: 0,
        inside: 0,
        is_shared: 0,
        waiter: 0,
        set: 0,
        kind: 0,
        is_over: 0,
        file: 0,
        left_ns: 0,
        shared_since_ns: 0,
        gap_since_ns: 0,
        gaps_ns: 0,
        waits: 0,
        events: 0,
        events_delayed: 0,
        wait_ns: 0,
        parts_ns: [0; PARTS],
        gc_ns: 0,
        padding: [0; 7],
    };
}

/// Value of `GAPS`, by the slot of a shared loop: the gap in progress.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Start of the gap, in monotonic nanoseconds.
    pub since_ns: u64,
    /// Slot of the waiter that returned last.
    pub waiter: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(Gap, 16);

/// Key of `SET_FILES`: a descriptor of a process, whose `struct file` user space asks for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SetDescriptor {
    /// The process.
    pub tgid: u32,
    /// The descriptor.
    pub fd: u32,
}
crate::shared::shared!(SetDescriptor, 8);

/// Value of `DURATIONS`, at the index of the reactor's slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durations {
    /// Lengths of finished slices.
    pub slice: Histogram,
    /// Time from being made runnable to running, for wake-ups out of a wait.
    pub wakeup: Histogram,
    /// Time from the event that ended a wait until its thread is on a CPU, one sample for each wait that blocked. The
    /// event is the end of the timeout if the wait timed out, and otherwise the moment the thread was made runnable.
    pub wait_return_delay: Histogram,
    /// Lengths of the slices at whose end events were waiting ([`Evidence::EventsWaited`]).
    pub event_delay: Histogram,
}
crate::shared::shared!(Durations, 4 * size_of::<Histogram>());

impl Durations {
    /// No durations.
    pub const NONE: Self = Self {
        slice: Histogram::EMPTY,
        wakeup: Histogram::EMPTY,
        wait_return_delay: Histogram::EMPTY,
        event_delay: Histogram::EMPTY,
    };
}

/// A slice that reached the stall threshold, sent through the ring `STALLS` when it ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Slot of the loop.
    pub reactor: u32,
    /// Process of the loop.
    pub tgid: u32,
    /// When the loop was seen first, in monotonic nanoseconds.
    pub created_ns: u64,
    /// Start of the slice, in monotonic nanoseconds.
    pub start_ns: u64,
    /// Length of the slice, in nanoseconds.
    pub length_ns: u64,
    /// The length by part (see [`PARTS`]), in nanoseconds.
    pub parts_ns: [u64; PARTS],
    /// Of the length, time in garbage collections, in nanoseconds.
    pub gc_ns: u64,
    /// System call of the longest uninterrupted block; [`NO_CALL`](crate::block::NO_CALL) if there was none.
    pub longest_block_call: u32,
    /// Thread that had the CPU before this one at the end of the longest wait for a CPU; 0 if there was none.
    pub longest_queue_after: u32,
    /// Request of the longest uninterrupted work; 0 if unknown.
    pub request: u64,
    /// An [`Evidence`].
    pub evidence: u32,
    /// Thread of the slice; 0 if it has exited or waits elsewhere.
    pub tid: u32,
}
crate::shared::shared!(Stall, 64 + 8 * PARTS);

/// Maximum number of event loops at a time, and of threads that wait for events.
pub const REACTORS: u32 = 1024;

/// Number of slots for either; slot 0 is never used.
pub const SLOTS: u32 = 1 + REACTORS;
