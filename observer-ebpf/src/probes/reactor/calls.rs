//! Calls that wait for events. There is one program for each signature, because the arguments differ.

use aya_ebpf::{helpers::bpf_get_current_pid_tgid, macros::tracepoint, programs::TracePointContext};
use observer_common::{
    reactor::{EXAMINED_NS, Evidence},
    waiter::{Call, FOREVER, Kind, NO_SET},
};

use super::wait::{Thread, return_from_call};
use crate::{
    kernel,
    state::{system_call::call_in_progress, waiters::find},
};

/// `IORING_ENTER_GETEVENTS`, `IORING_ENTER_EXT_ARG` and `IORING_ENTER_REGISTERED_RING`, and the result of a ring's wait that timed out.
const GETEVENTS: u32 = 1 << 0;
const EXT_ARG: u32 = 1 << 3;
const REGISTERED_RING: u32 = 1 << 4;
const ETIME: i64 = -62;
/// Result of an interrupted `poll` that the kernel will restart: the wait is not over.
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Number of words of an `fd_set` that are read: its size in C libraries.
const SET_WORDS: u32 = 16;

#[tracepoint]
fn epoll_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(epoll(&ctx));
    }
    0
}

#[inline(always)]
fn epoll(ctx: &TracePointContext) -> Option<Call> {
    let [set, _, _, timeout] = kernel::arguments(ctx)?;
    Some(Call { kind: Kind::Epoll, set: low_half(set), is_single: false, timeout_ns: milliseconds(timeout) })
}

#[tracepoint]
fn pwait2_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(pwait2(&ctx));
    }
    0
}

#[inline(always)]
fn pwait2(ctx: &TracePointContext) -> Option<Call> {
    let [set, _, _, timeout] = kernel::arguments(ctx)?;
    Some(Call { kind: Kind::Epoll, set: low_half(set), is_single: false, timeout_ns: timespec(timeout) })
}

#[tracepoint]
fn uring_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(uring(&ctx));
    }
    0
}

/// Only a call that asks for completions is a wait. A call that only submits is part of the slice.
#[inline(always)]
fn uring(ctx: &TracePointContext) -> Option<Call> {
    let [ring, _, completions, flags, argument] = kernel::arguments(ctx)?;
    if low_half(completions) == 0 || low_half(flags) & GETEVENTS == 0 {
        return None;
    }
    // `struct io_uring_getevents_arg`: a signal mask, its size, padding, and a pointer to a timespec.
    let timeout = if low_half(flags) & EXT_ARG == 0 { None } else { kernel::read_user::<[u64; 3]>(argument) };
    let timeout_ns = timeout.map_or(FOREVER, |[_, _, timeout]| timespec(timeout));
    // The number of a registered ring is not a descriptor.
    let set = if low_half(flags) & REGISTERED_RING == 0 { low_half(ring) } else { NO_SET };
    Some(Call { kind: Kind::IoUring, set, is_single: false, timeout_ns })
}

#[tracepoint]
fn poll_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(poll(&ctx));
    }
    0
}

#[inline(always)]
fn poll(ctx: &TracePointContext) -> Option<Call> {
    let [descriptors, count, timeout] = kernel::arguments(ctx)?;
    poll_call(descriptors, low_half(count), milliseconds(timeout))
}

#[tracepoint]
fn ppoll_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(ppoll(&ctx));
    }
    0
}

#[inline(always)]
fn ppoll(ctx: &TracePointContext) -> Option<Call> {
    let [descriptors, count, timeout] = kernel::arguments(ctx)?;
    poll_call(descriptors, low_half(count), timespec(timeout))
}

#[tracepoint]
fn select_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(select(&ctx));
    }
    0
}

#[inline(always)]
fn select(ctx: &TracePointContext) -> Option<Call> {
    let [limit, read, write, except, timeout] = kernel::arguments(ctx)?;
    // A `timeval` is a `timespec` of microseconds.
    select_call(low_half(limit), [read, write, except], read_timeout(timeout, 1_000))
}

#[tracepoint]
fn pselect_enter(ctx: TracePointContext) -> u32 {
    if let Some(thread) = Thread::current() {
        thread.enter(pselect(&ctx));
    }
    0
}

#[inline(always)]
fn pselect(ctx: &TracePointContext) -> Option<Call> {
    let [limit, read, write, except, timeout] = kernel::arguments(ctx)?;
    select_call(low_half(limit), [read, write, except], timespec(timeout))
}

/// The loader has made an entry for each thread that was already in a call when the programs were attached.
#[tracepoint]
fn epoll_exit(ctx: TracePointContext) -> u32 {
    let tid = kernel::current().1;
    if let Some(waiter) = find(tid) {
        let events = kernel::return_value(&ctx).unwrap_or(0);
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            return_from_call(waiter, tid, events, events == 0, |length| epoll_evidence(events, length))
        };
    }
    0
}

/// Whether the events that an epoll wait has returned at once had waited for it. A single event that only reports room
/// for output does not show that a client waits.
#[inline(always)]
fn epoll_evidence(events: i64, length: u64) -> Evidence {
    const EPOLLOUT: u32 = 4;
    if events != 1 || length < EXAMINED_NS {
        return wait_evidence(events);
    }
    // `struct epoll_event` begins with the events.
    let event = call_in_progress().and_then(|call| call.second()).and_then(kernel::read_user::<u32>);
    if event == Some(EPOLLOUT) { Evidence::Unknown } else { Evidence::EventsWaited }
}

/// The result of `io_uring_enter` is the number of submitted requests, not of completions.
#[tracepoint]
fn uring_exit(ctx: TracePointContext) -> u32 {
    let tid = kernel::current().1;
    if let Some(waiter) = find(tid) {
        let result = kernel::return_value(&ctx).unwrap_or(0);
        // SAFETY: as above.
        unsafe { return_from_call(waiter, tid, 0, result == ETIME, |_| ring_evidence(result)) };
    }
    0
}

/// Whether completions had waited before a call that has returned at once. If the call submitted requests, these may
/// have completed at once.
#[inline(always)]
const fn ring_evidence(result: i64) -> Evidence {
    if result == 0 { Evidence::EventsWaited } else { Evidence::Unknown }
}

#[tracepoint]
fn poll_exit(ctx: TracePointContext) -> u32 {
    return_from_poll_or_select(&ctx)
}

#[tracepoint]
fn select_exit(ctx: TracePointContext) -> u32 {
    return_from_poll_or_select(&ctx)
}

#[inline(always)]
fn return_from_poll_or_select(ctx: &TracePointContext) -> u32 {
    let tid = kernel::current().1;
    if let Some(waiter) = find(tid) {
        let events = kernel::return_value(ctx).unwrap_or(0);
        if events != ERESTART_RESTARTBLOCK {
            // SAFETY: as above.
            unsafe { return_from_call(waiter, tid, events, events == 0, |_| wait_evidence(events)) };
        }
    }
    0
}

/// Whether the events that a wait other than of a ring has returned at once had waited for it.
#[inline(always)]
const fn wait_evidence(events: i64) -> Evidence {
    if events > 0 { Evidence::EventsWaited } else { Evidence::Unknown }
}

/// A call of the `poll` family; `None` if it polls no descriptor and so only sleeps.
#[inline(always)]
fn poll_call(descriptors: u64, count: u32, timeout_ns: u64) -> Option<Call> {
    if count == 0 {
        return None;
    }
    Some(Call { kind: Kind::Poll, set: kernel::read_user(descriptors)?, is_single: count == 1, timeout_ns })
}

/// A call of the `select` family; `None` if it selects no descriptor and so only sleeps.
#[inline(always)]
fn select_call(limit: u32, sets: [u64; 3], timeout_ns: u64) -> Option<Call> {
    // Always zero, but unknown to the verifier, which would otherwise analyse the following code once for each value
    // that the numbers may have.
    let opaque_zero = bpf_get_current_pid_tgid() ^ bpf_get_current_pid_tgid();
    let (mut first, mut count) = (0, 0);
    for word in 0..SET_WORDS {
        if word * u64::BITS >= limit {
            break;
        }
        let mut members = 0;
        for set in sets {
            if set != 0 {
                members |= kernel::read_user::<u64>(set + u64::from(word) * 8).unwrap_or(0);
            }
        }
        if members != 0 {
            if count == 0 {
                first = u64::from(word * u64::BITS + members.trailing_zeros());
            }
            count += if members & (members - 1) == 0 { 1 } else { 2 };
        }
        first ^= opaque_zero;
        count ^= opaque_zero;
    }
    if count == 0 {
        return None;
    }
    Some(Call { kind: Kind::Poll, set: low_half(first), is_single: count == 1, timeout_ns })
}

/// An `int` argument: the upper half of its register is undefined.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "drops the upper half on purpose")]
const fn low_half(argument: u64) -> u32 {
    argument as u32
}

/// Converts a timeout in milliseconds to nanoseconds; a negative one is [`FOREVER`].
#[inline(always)]
const fn milliseconds(argument: u64) -> u64 {
    let timeout = low_half(argument);
    if timeout.cast_signed() < 0 { FOREVER } else { timeout as u64 * 1_000_000 }
}

/// Reads a timeout from a pointer to a `timespec`, in nanoseconds.
#[inline(always)]
fn timespec(argument: u64) -> u64 {
    read_timeout(argument, 1)
}

/// Reads a timeout from a pointer to seconds and units of `unit` nanoseconds, in nanoseconds; [`FOREVER`] if the
/// pointer is null or unreadable.
#[inline(always)]
fn read_timeout(argument: u64, unit: u64) -> u64 {
    match kernel::read_user::<[u64; 2]>(argument) {
        // A timeout of 2^32 seconds or more, which is over a century, counts as none.
        Some([seconds, units]) if seconds < 1 << 32 => seconds * 1_000_000_000 + units * unit,
        _ => FOREVER,
    }
}
