//! Shared types of the *reactor* probe: a thread that waits for events, and what it does between two waits; and
//! the rule that tells such waits from other calls that block.

use crate::{
    block::{BLOCKS, NO_CALL},
    histogram::Histogram,
    origin::Origin,
};

/// What a reactor is doing.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Inside a wait for events.
    Waiting = 0,
    /// Between the end of a wait, when the thread was on a CPU again, and the moment it blocks in the next: a slice.
    Slice = 1,
    /// The thread is gone; its figures are final.
    Exited = 2,
    /// One of a pool that is parked, while others of it wait for events.
    Parked = 3,
}

/// What the scheduler does with a reactor's thread.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// On a CPU.
    Cpu = 0,
    /// Runnable after it had blocked, waiting for a CPU.
    Woken = 1,
    /// Runnable but pushed off its CPU by another thread.
    Preempted = 2,
    /// Blocked.
    Blocked = 3,
}

/// What the time of a slice is divided into: the [`RunState`] states, the last of them by [`Block`](crate::block::Block).
/// The index is that of the one plus that of the other.
pub const PARTS: usize = RunState::Blocked as usize + BLOCKS;

/// Families of calls that wait for events. A higher one takes precedence in a thread that uses several.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `poll`, `ppoll`, `select`, `pselect6`.
    Poll = 1,
    /// `io_uring_enter` that asks for completions.
    IoUring = 2,
    /// `epoll_wait`, `epoll_pwait`, `epoll_pwait2`.
    Epoll = 3,
}

/// The timeout of a call that has none.
pub const FOREVER: u64 = u64::MAX;

/// Nothing is known of the runtime's totals.
pub const GC_UNKNOWN: u64 = u64::MAX;

/// A call that may be a wait for events.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Which family it belongs to.
    pub kind: Kind,
    /// What it waits on: the descriptor of the epoll set or of the ring, or the first of those polled.
    pub set: u32,
    /// Whether that is a single descriptor, polled by itself.
    pub is_single: bool,
    /// After how many nanoseconds it gives up: 0 if it only looks, [`FOREVER`] if it does not.
    pub timeout_ns: u64,
}

/// How a thread waits for events, as far as its calls have shown.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitPattern {
    /// The [`Kind`] of its waits; 0 before the first.
    pub kind: u32,
    /// What it waits on, as [`Call`] has it.
    pub set: u32,
    /// 1 once a wait that may block has shown this.
    pub is_firm: u32,
    /// 1 once the thread is counted among those that wait on this set.
    pub is_counted: u32,
}
crate::shared::shared!(WaitPattern, 16);

impl WaitPattern {
    /// One that nothing is known of.
    pub const NONE: Self = Self { kind: 0, set: 0, is_firm: 0, is_counted: 0 };

    /// Whether a call of this thread is the wait of its event loop, rather than a part of the slice; learns from it.
    ///
    /// - A look (a timeout of 0) at what the thread waits on is a wait that returns at once. A look at anything else is
    ///   part of the slice: loops that nest epoll sets wait on the outer one and look into the inner ones one after
    ///   another, and what is due in one of them is not met by a look into another.
    /// - A call that may block is a wait, whatever it waits on, unless the thread is known for calls that take
    ///   precedence: then it blocks the slice, as a client library's poll on its connection does.
    /// - A poll on one descriptor alone is a wait only of a thread that is known to poll several, that one first
    ///   (a server without clients); any other blocks the slice.
    #[inline(always)]
    pub const fn is_wait(&mut self, call: Call) -> bool {
        let kind = call.kind as u32;
        let is_same = self.kind == kind && self.set == call.set;
        let blocks = call.timeout_ns != 0;
        if !is_same {
            let is_taken = self.kind != 0 && (!blocks || (self.is_firm != 0 && kind < self.kind));
            if call.is_single || is_taken {
                return false;
            }
            self.kind = kind;
            self.set = call.set;
            self.is_firm = 0;
            self.is_counted = 0;
        }
        if blocks {
            self.is_firm = 1;
        }
        true
    }
}

/// Key of `POOLS`, whose values are how many threads wait on an epoll set, by turns or at once: of several one may park.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Their process.
    pub tgid: u32,
    /// The set's descriptor.
    pub set: u32,
}
crate::shared::shared!(Pool, 8);

/// Value of `REACTORS`: who a reactor is and what it is doing, in slots that the user side has mapped. What every wait
/// writes is in the first two cache lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reactor {
    /// The thread, as the initial pid namespace has it; 0 in a slot that nobody has had yet.
    pub tid: u32,
    /// Its process.
    pub tgid: u32,
    /// This slot.
    pub slot: u32,
    /// A [`Phase`].
    pub phase: u32,
    /// Start of the current phase, monotonic nanoseconds.
    pub phase_since_ns: u64,
    /// Start of the current [`RunState`] state, or of the slice if that is later; monotonic nanoseconds.
    pub run_since_ns: u64,
    /// A [`RunState`] state.
    pub run: u32,
    /// Of a thread that is blocked in a slice, the [`Block`](crate::block::Block); else 0.
    pub block: u32,
    /// Timeout of the wait in progress, nanoseconds; [`FOREVER`] if it has none.
    pub timeout_ns: u64,
    /// When the wait in progress was last made runnable, monotonic nanoseconds; 0 if it was not.
    pub woken_ns: u64,
    /// 1 while its thread is known to work for something.
    pub has_work: u32,
    /// 1 once the present slice has had more than time on its CPU: else what is kept of it besides needs no clearing.
    pub was_off_cpu: u16,
    /// 1 once the thread has called its wait in the present slice, which goes on until it blocks there or returns.
    pub is_in_wait: u16,
    /// Which of its calls are waits.
    pub pattern: WaitPattern,
    /// Finished waits.
    pub waits: u64,
    /// Events those waits returned.
    pub events: u64,
    /// Time spent in finished waits, and parked, nanoseconds.
    pub wait_ns: u64,
    /// What the runtime's own totals said of its collections when the slice began; [`GC_UNKNOWN`] where nobody reads any.
    pub gc_before_ns: u64,
    /// Time in slices by part (see [`PARTS`]), up to `run_since_ns`.
    pub parts: [Part; PARTS],
    /// Of that, what went into garbage collections.
    pub gc: Part,
    /// Longest time that the thread was blocked at once in the present slice, nanoseconds.
    pub longest_block_ns: u64,
    /// Longest time that it waited at once for a CPU in the present slice, nanoseconds.
    pub longest_queue_ns: u64,
    /// The system call it was blocked in for longest; [`NO_CALL`] if there was none.
    pub longest_block_call: u32,
    /// The thread that had the CPU before it after the longest wait for one; 0 if there was none.
    pub longest_queue_after: u32,
    /// What it worked for in the present slice, longest at once; nothing where nobody knows what that was for.
    pub longest_work_for: Origin,
    /// How long that was, nanoseconds.
    pub longest_work_ns: u64,
    /// Since when it is blocked in a way that may mean that it is parked, monotonic nanoseconds; else 0. Taken for parked as
    /// soon as others are known to wait on the same set.
    pub may_be_parked_ns: u64,
    /// The futex where that was last.
    pub parked_at: u64,
    /// The futex that it is blocked at as at a mutex; else 0.
    pub contended_at: u64,
    /// Frame pointer that it had when it last blocked in a slice; 0 if that is not known.
    pub frame_pointer: u64,
    /// The system call it is blocked in in a slice; [`NO_CALL`] if there is none.
    pub call: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: [u32; 5],
}
crate::shared::shared!(Reactor, 384);

/// Time that is kept as a total.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// All of it, nanoseconds.
    pub ns: u64,
    /// The same as it was when the present slice began.
    pub before_ns: u64,
}
crate::shared::shared!(Part, 16);

impl Part {
    /// None.
    pub const NONE: Self = Self { ns: 0, before_ns: 0 };
}

impl Reactor {
    /// One that has done nothing.
    pub const EMPTY: Self = Self {
        tid: 0,
        tgid: 0,
        slot: 0,
        phase: Phase::Waiting as u32,
        phase_since_ns: 0,
        run_since_ns: 0,
        run: RunState::Cpu as u32,
        block: 0,
        timeout_ns: FOREVER,
        woken_ns: 0,
        has_work: 0,
        was_off_cpu: 0,
        is_in_wait: 0,
        pattern: WaitPattern::NONE,
        waits: 0,
        events: 0,
        wait_ns: 0,
        gc_before_ns: GC_UNKNOWN,
        parts: [Part::NONE; PARTS],
        gc: Part::NONE,
        longest_block_ns: 0,
        longest_queue_ns: 0,
        longest_block_call: NO_CALL,
        longest_queue_after: 0,
        longest_work_for: Origin::NONE,
        longest_work_ns: 0,
        may_be_parked_ns: 0,
        parked_at: 0,
        contended_at: 0,
        frame_pointer: 0,
        call: NO_CALL,
        reserved: [0; 5],
    };
}

/// Value of `DURATIONS`, in the slot of the reactor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durations {
    /// Lengths of finished slices.
    pub slice: Histogram,
    /// Made runnable -> running, for wake-ups out of a wait.
    pub wakeup: Histogram,
    /// What ended a wait -> its thread on a CPU, one for each wait that blocked: from the moment the timeout was
    /// over if that ended it, else from being made runnable.
    pub wait_return_delay: Histogram,
}
crate::shared::shared!(Durations, 3 * size_of::<Histogram>());

impl Durations {
    /// None.
    pub const NONE: Self =
        Self { slice: Histogram::EMPTY, wakeup: Histogram::EMPTY, wait_return_delay: Histogram::EMPTY };
}

/// A slice that was longer than the threshold, sent through the ring `STALLS` when it ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// Its thread.
    pub tid: u32,
    /// The thread's process.
    pub tgid: u32,
    /// When it began, monotonic nanoseconds.
    pub start_ns: u64,
    /// How long it was, nanoseconds.
    pub length_ns: u64,
    /// What that went to, by part (see [`PARTS`]), nanoseconds.
    pub parts_ns: [u64; PARTS],
    /// Of its length, what went into garbage collections, nanoseconds.
    pub gc_ns: u64,
    /// The system call it was blocked in for longest at once; [`NO_CALL`] if there was none.
    pub longest_block_call: u32,
    /// The thread that had the CPU before it after its longest wait for one; 0 if there was none.
    pub longest_queue_after: u32,
    /// The request it worked for, longest at once; 0 if none is known.
    pub request: u64,
}
crate::shared::shared!(Stall, 48 + 8 * PARTS);

/// Slots for reactors; the first is nobody's.
pub const SLOTS: u32 = 1 + REACTORS;

/// Most reactors at a time.
pub const REACTORS: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const fn call(kind: Kind, set: u32, timeout_ns: u64) -> Call {
        Call { kind, set, is_single: false, timeout_ns }
    }

    const fn single(set: u32, timeout_ns: u64) -> Call {
        Call { is_single: true, ..call(Kind::Poll, set, timeout_ns) }
    }

    /// Which of these calls, one after another, are waits.
    fn waits<const N: usize>(calls: [Call; N]) -> [bool; N] {
        let mut pattern = WaitPattern::NONE;
        calls.map(|call| pattern.is_wait(call))
    }

    #[test]
    fn a_look_at_the_same_set_is_a_wait() {
        use Kind::Epoll;
        assert_eq!(waits([call(Epoll, 3, FOREVER), call(Epoll, 3, 0), call(Epoll, 3, 5)]), [true; 3]);
        assert_eq!(waits([call(Epoll, 3, 0), call(Epoll, 3, 0)]), [true; 2]);
    }

    #[test]
    fn nested_sets_are_one_loop_by_the_outer_one() {
        use Kind::Epoll;
        let outer = call(Epoll, 3, FOREVER);
        let [one, other] = [call(Epoll, 4, 0), call(Epoll, 5, 0)];
        assert_eq!(waits([outer, one, other, call(Epoll, 3, 0), one]), [true, false, false, true, false]);
        // Seen first in the middle of its work: what it looks at first has to do until it waits.
        assert_eq!(
            waits([one, other, call(Epoll, 3, 0), one, outer, one]),
            [true, false, false, true, true, false]
        );
    }

    #[test]
    fn an_epoll_loop_that_polls_is_blocked() {
        use Kind::{Epoll, IoUring, Poll};
        let epoll = call(Epoll, 3, FOREVER);
        assert_eq!(
            waits([epoll, call(Poll, 7, 100), single(7, 100), call(IoUring, 8, FOREVER), epoll]),
            [true, false, false, false, true]
        );
    }

    #[test]
    fn a_look_into_an_epoll_set_makes_no_epoll_loop() {
        use Kind::{Epoll, Poll};
        let poll = call(Poll, 4, FOREVER);
        assert_eq!(waits([poll, call(Epoll, 3, 0), poll]), [true, false, true]);
        // Seen first while it looks; its poll corrects that.
        assert_eq!(waits([call(Epoll, 3, 0), poll, call(Epoll, 3, 0), poll]), [true, true, false, true]);
        // A wait that may block does.
        assert_eq!(waits([poll, call(Epoll, 3, 100), poll]), [true, true, false]);
    }

    #[test]
    fn a_poll_on_one_descriptor_is_a_wait_of_a_loop_that_is_left_with_one() {
        let several = call(Kind::Poll, 4, FOREVER);
        assert_eq!(waits([single(4, FOREVER), single(4, 0)]), [false; 2]);
        assert_eq!(
            waits([several, single(4, FOREVER), single(9, FOREVER), single(9, 0), several]),
            [true, true, false, false, true]
        );
    }
}
