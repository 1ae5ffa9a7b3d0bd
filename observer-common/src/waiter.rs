//! Threads that wait for events: what they are doing, and the rule that distinguishes their waits from other calls that
//! block.

use crate::{
    block::{BLOCKS, NO_CALL},
    origin::Origin,
};

/// What a waiter is doing.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Inside a wait for events.
    Waiting = 0,
    /// In a slice: from the end of a wait, when the thread was back on a CPU, until it blocks in the next wait.
    Slice = 1,
}

/// Scheduler state of a waiter.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// On a CPU.
    Cpu = 0,
    /// Runnable after a wake-up, waiting for a CPU.
    Woken = 1,
    /// Runnable after it was preempted, waiting for a CPU.
    Preempted = 2,
    /// Blocked.
    Blocked = 3,
}

/// Number of parts that the time of a slice is divided into: one for each [`RunState`], of which the last is divided by
/// [`Block`](crate::block::Block). The index of a part is the sum of the two indices.
pub const PARTS: usize = RunState::Blocked as usize + BLOCKS;

/// Families of calls that wait for events. In a thread that uses several, a higher one takes precedence.
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

/// Timeout of a call that never times out.
pub const FOREVER: u64 = u64::MAX;

/// The runtime's GC totals are unknown.
pub const GC_UNKNOWN: u64 = u64::MAX;

/// A call that may be a wait for events.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The family of the call.
    pub kind: Kind,
    /// What the call waits on: the descriptor of the epoll set or of the ring, or the first of the polled descriptors.
    pub set: u32,
    /// Whether the call polls a single descriptor.
    pub is_single: bool,
    /// Timeout in nanoseconds: 0 if the call never blocks, [`FOREVER`] if it never times out.
    pub timeout_ns: u64,
}

/// No epoll set.
pub const NO_SET: u32 = u32::MAX;

/// State of the epoll set that a thread waits on, when the thread is about to wait on another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetState {
    /// It is open, and the thread has waited on it recently.
    InUse,
    /// It is open, and the thread has not waited on it for long.
    Abandoned,
    /// It is closed.
    Closed,
}

/// How a thread waits for events, learnt from its calls.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitPattern {
    /// The [`Kind`] of its waits; 0 before the first.
    pub kind: u32,
    /// What it waits on, as in [`Call`].
    pub set: u32,
    /// 1 once a wait that may block has confirmed the pattern.
    pub is_firm: u32,
    /// The epoll set that this one has displaced although it is open, because it seemed to be abandoned; [`NO_SET`] if
    /// there is none.
    pub displaced: u32,
}
crate::shared::shared!(WaitPattern, 16);

impl WaitPattern {
    /// Nothing known yet.
    pub const NONE: Self = Self { kind: 0, set: 0, is_firm: 0, displaced: NO_SET };

    /// Whether a call of this thread is the wait of its event loop, as opposed to a part of the slice. Updates the
    /// pattern.
    ///
    /// - A non-blocking call (a timeout of 0) on the set that the thread waits on is a wait that returns at once. A
    ///   non-blocking call on another set is part of the slice: loops that nest epoll sets wait on the outer set and
    ///   check the inner ones one after another, and a check of one inner set does not serve the events of another.
    /// - A call that may block is a wait, whatever it waits on, with two exceptions. If the thread is known to use a family
    ///   that takes precedence, the call blocks the slice, like the poll of a client library on its connection. If the
    ///   thread waits on another epoll set that is in use, it blocks the slice as well: a handler runs a loop of its own,
    ///   like libuv's `spawnSync` or a synchronous client with a completion queue, and the events of the first set wait
    ///   meanwhile. `state` is that of the first set. A set that seemed to be abandoned is returned to at once.
    /// - A poll of a single descriptor is a wait only if the thread is known to poll several descriptors with the same
    ///   one first (a server without clients). Any other poll of a single descriptor blocks the slice.
    #[inline(always)]
    pub fn is_wait(&mut self, call: Call, state: impl FnOnce(&Self) -> SetState) -> bool {
        let kind = call.kind as u32;
        let is_same = self.kind == kind && self.set == call.set;
        let blocks = call.timeout_ns != 0;
        if !is_same {
            if call.is_single || (self.kind != 0 && !blocks) {
                return false;
            }
            if self.is_firm != 0 && kind < self.kind {
                return false;
            }
            let mut displaced = NO_SET;
            if self.is_firm != 0
                && kind == Kind::Epoll as u32
                && kind == self.kind
                && call.set != self.displaced
            {
                match state(self) {
                    SetState::InUse => return false,
                    SetState::Abandoned => displaced = self.set,
                    SetState::Closed => {}
                }
            }
            *self = Self { kind, set: call.set, displaced, ..Self::NONE };
        }
        if blocks {
            self.is_firm = 1;
        }
        true
    }

    /// Whether a blocking call that polls this descriptor alone is the wait of the thread's event loop: it polls its epoll
    /// set, which it otherwise never blocks in, as EventMachine does to wait without Ruby's lock.
    #[inline(always)]
    pub const fn is_polled(&self, descriptor: u32) -> bool {
        self.kind == Kind::Epoll as u32 && self.is_firm == 0 && self.set == descriptor
    }
}

/// Value of `WAITERS`: a thread that waits for events, in a slot that is mapped into user space. The fields that every wait
/// writes are in the first two cache lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Thread ID in the initial PID namespace; 0 in a slot that has never been used.
    pub tid: u32,
    /// Its process.
    pub tgid: u32,
    /// Index of this slot.
    pub slot: u32,
    /// A [`Phase`].
    pub phase: u32,
    /// Start of the current phase, monotonic nanoseconds.
    pub phase_since_ns: u64,
    /// Start of the current [`RunState`], or of the slice if that is later, in monotonic nanoseconds.
    pub run_since_ns: u64,
    /// A [`RunState`].
    pub run: u32,
    /// The [`Block`](crate::block::Block) of a thread that is blocked in a slice; otherwise 0.
    pub block: u32,
    /// Timeout of the wait in progress, in nanoseconds; [`FOREVER`] if it has none.
    pub timeout_ns: u64,
    /// When the thread was last made runnable in the wait in progress, in monotonic nanoseconds; 0 if it was not.
    pub woken_ns: u64,
    /// Slot of the event loop that it belongs to; 0 if there is none.
    pub reactor: u32,
    /// 1 while it is counted as inside a wait of that loop.
    pub is_inside: u16,
    /// 1 once the thread has called its wait in the present slice. The slice continues until the thread blocks there or
    /// returns.
    pub is_in_wait: u16,
    /// 1 while the thread has known work, see [`Work`](crate::deferred::Work).
    pub has_work: u16,
    /// 1 if the present slice has fields to reset other than its time on a CPU: it was off its CPU, collected garbage,
    /// or did work.
    pub was_off_cpu: u16,
    /// 1 if other threads wait on the same set, as of its last wait.
    pub is_shared: u16,
    /// 1 if the set must be looked up at the next wait: user space sets it during a slice that is so long that the loop may
    /// be replaced, and for a thread whose file it has not found.
    pub is_stale: u16,
    /// Which of its calls are waits.
    pub pattern: WaitPattern,
    /// The runtime's own total of collection time when the slice began, in nanoseconds; [`GC_UNKNOWN`] if there is
    /// none.
    pub gc_before_ns: u64,
    /// Time in the present slice by part (see [`PARTS`]), up to `run_since_ns`.
    pub parts_ns: [u64; PARTS],
    /// Of that, time in garbage collections.
    pub gc_ns: u64,
    /// Longest uninterrupted block in the present slice, in nanoseconds.
    pub longest_block_ns: u64,
    /// Longest uninterrupted wait for a CPU in the present slice, in nanoseconds.
    pub longest_queue_ns: u64,
    /// System call of the longest block; [`NO_CALL`] if there was none.
    pub longest_block_call: u32,
    /// Thread that had the CPU before this one at the end of the longest wait for a CPU; 0 if there was none.
    pub longest_queue_after: u32,
    /// Origin of the longest uninterrupted work in the present slice; [`Origin::NONE`] if unknown.
    pub longest_work_for: Origin,
    /// Duration of that work, in nanoseconds.
    pub longest_work_ns: u64,
    /// Frame pointer of the thread when it last blocked in a slice; 0 if unknown.
    pub frame_pointer: u64,
    /// System call in which the thread is blocked in a slice; [`NO_CALL`] if there is none.
    pub call: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
    /// Start of the present slice, or of the last one during a wait, in monotonic nanoseconds. `parts_ns` and what follows are
    /// those of this slice.
    pub slice_since_ns: u64,
}
crate::shared::shared!(Waiter, 256);

impl Waiter {
    /// A waiter without any activity.
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
        reactor: 0,
        is_inside: 0,
        is_in_wait: 0,
        has_work: 0,
        was_off_cpu: 0,
        is_shared: 0,
        is_stale: 0,
        pattern: WaitPattern::NONE,
        gc_before_ns: GC_UNKNOWN,
        parts_ns: [0; PARTS],
        gc_ns: 0,
        longest_block_ns: 0,
        longest_queue_ns: 0,
        longest_block_call: NO_CALL,
        longest_queue_after: 0,
        longest_work_for: Origin::NONE,
        longest_work_ns: 0,
        frame_pointer: 0,
        call: NO_CALL,
        reserved: 0,
        slice_since_ns: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn call(kind: Kind, set: u32, timeout_ns: u64) -> Call {
        Call { kind, set, is_single: false, timeout_ns }
    }

    const fn single(set: u32, timeout_ns: u64) -> Call {
        Call { is_single: true, ..call(Kind::Poll, set, timeout_ns) }
    }

    /// Which of these consecutive calls are waits, if no set is closed.
    fn waits<const N: usize>(calls: [Call; N]) -> [bool; N] {
        let mut pattern = WaitPattern::NONE;
        calls.map(|call| pattern.is_wait(call, |_| SetState::InUse))
    }

    #[test]
    fn a_nonblocking_call_on_the_same_set_is_a_wait() {
        use Kind::Epoll;
        assert_eq!(waits([call(Epoll, 3, FOREVER), call(Epoll, 3, 0), call(Epoll, 3, 5)]), [true; 3]);
        assert_eq!(waits([call(Epoll, 3, 0), call(Epoll, 3, 0)]), [true; 2]);
    }

    #[test]
    fn nested_sets_are_one_loop_that_waits_on_the_outer_set() {
        use Kind::Epoll;
        let outer = call(Epoll, 3, FOREVER);
        let [inner, other] = [call(Epoll, 4, 0), call(Epoll, 5, 0)];
        assert_eq!(waits([outer, inner, other, call(Epoll, 3, 0), inner]), [true, false, false, true, false]);
        // First seen in the middle of a slice: the first set counts as the wait until the thread blocks on another.
        assert_eq!(
            waits([inner, other, call(Epoll, 3, 0), inner, outer, inner]),
            [true, false, false, true, true, false]
        );
    }

    #[test]
    fn a_wait_on_another_set_blocks_the_slice_while_the_first_is_in_use() {
        let [outer, inner] = [call(Kind::Epoll, 3, FOREVER), call(Kind::Epoll, 9, FOREVER)];
        assert_eq!(waits([outer, inner, inner, outer]), [true, false, false, true]);
        let after = |state| {
            let mut pattern = WaitPattern::NONE;
            assert!(pattern.is_wait(outer, |_| state));
            // One loop after another, or a handler that takes very long.
            assert!(pattern.is_wait(inner, |before| if before.set == 3 { state } else { SetState::InUse }));
            (pattern.set, pattern.is_wait(outer, |_| SetState::InUse), pattern.set)
        };
        assert_eq!(after(SetState::Closed), (9, false, 9));
        assert_eq!(after(SetState::Abandoned), (9, true, 3));
    }

    #[test]
    fn a_poll_blocks_the_slice_of_an_epoll_loop() {
        use Kind::{Epoll, IoUring, Poll};
        let epoll = call(Epoll, 3, FOREVER);
        assert_eq!(
            waits([epoll, call(Poll, 7, 100), single(7, 100), call(IoUring, 8, FOREVER), epoll]),
            [true, false, false, false, true]
        );
    }

    #[test]
    fn a_nonblocking_epoll_call_makes_no_epoll_loop() {
        use Kind::{Epoll, Poll};
        let poll = call(Poll, 4, FOREVER);
        assert_eq!(waits([poll, call(Epoll, 3, 0), poll]), [true, false, true]);
        // First seen in a non-blocking epoll call; the poll corrects that.
        assert_eq!(waits([call(Epoll, 3, 0), poll, call(Epoll, 3, 0), poll]), [true, true, false, true]);
        // An epoll call that may block makes it an epoll loop.
        assert_eq!(waits([poll, call(Epoll, 3, 100), poll]), [true, true, false]);
    }

    #[test]
    fn a_poll_of_a_set_that_the_thread_never_blocks_in_is_a_wait() {
        use Kind::{Epoll, Poll};
        let mut pattern = WaitPattern::NONE;
        assert!(!pattern.is_polled(0));
        assert!(pattern.is_wait(call(Epoll, 3, 0), |_| SetState::InUse));
        assert!(pattern.is_polled(3));
        assert!(!pattern.is_polled(4) && !pattern.is_polled(NO_SET));
        assert!(pattern.is_wait(call(Epoll, 3, 10), |_| SetState::InUse));
        assert!(!pattern.is_polled(3));
        let mut polls = WaitPattern::NONE;
        assert!(polls.is_wait(call(Poll, 3, 0), |_| SetState::InUse));
        assert!(!polls.is_polled(3));
    }

    #[test]
    fn a_single_descriptor_poll_is_a_wait_of_a_loop_that_polled_several() {
        let several = call(Kind::Poll, 4, FOREVER);
        assert_eq!(waits([single(4, FOREVER), single(4, 0)]), [false; 2]);
        assert_eq!(
            waits([several, single(4, FOREVER), single(9, FOREVER), single(9, 0), several]),
            [true, true, false, false, true]
        );
    }
}
