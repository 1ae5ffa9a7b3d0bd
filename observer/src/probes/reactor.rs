//! *reactor*: event loops: sets that threads wait on for events, and the slices between two waits. Decodes their entries,
//! from which `model/lag.rs` computes the lag.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use nix::libc;
use observer_common::{
    block::{Block, NO_CALL},
    reactor::{Evidence, Stall as RawStall},
    waiter::{PARTS, RunState},
};

use super::probe::{Events, Hook, Probe, When};
use crate::{
    kernel::{clock, syscalls},
    model::{
        busy::{Blocked, Cause, Split},
        histogram::{Histogram, seconds},
        lag::{Observed, Prober},
        request::Request,
        snapshot::{Duty, Reactor},
        stall::{Stall, Stalls},
    },
    process::{self, wait_call::WaitCall},
    read::reactors::Raw,
};

const FIND_REGISTERS: &str = "find_registers";

pub(super) const PROBE: Probe = Probe {
    name: "reactor",
    purpose: "event loops: their lag; the time between two waits, split into CPU, run queue and blocked time by cause; stalls; the delay after wake-ups",
    since: "5.5",
    when: When::Always,
    cost: "every wait for events, context switch and wake-up on the machine; one or two lookups for threads of other processes; about 60 ns for every other system call, because the kernel takes a slower path for all calls as soon as one is hooked",
    hooks: &[
        Hook { program: FIND_REGISTERS, events: Events::OnDemand },
        Hook { program: "sched_switch", events: Events::Btf(&["sched_switch"]) },
        Hook { program: "sched_wakeup", events: Events::Btf(&["sched_wakeup"]) },
        // Exits are attached before entries, so that no wait begins whose end is missed, however long attaching takes.
        Hook {
            program: "epoll_exit",
            events: Events::Waits(
                WaitCall::Epoll,
                &["sys_exit_epoll_pwait", "sys_exit_epoll_wait", "sys_exit_epoll_pwait2"],
            ),
        },
        Hook {
            program: "uring_exit",
            events: Events::Waits(WaitCall::IoUring, &["sys_exit_io_uring_enter"]),
        },
        Hook {
            program: "poll_exit",
            // An interrupted poll is resumed by the kernel as restart_syscall.
            events: Events::Waits(
                WaitCall::Poll,
                &["sys_exit_poll", "sys_exit_ppoll", "sys_exit_restart_syscall"],
            ),
        },
        Hook {
            program: "select_exit",
            events: Events::Waits(WaitCall::Select, &["sys_exit_select", "sys_exit_pselect6"]),
        },
        Hook {
            program: "epoll_enter",
            events: Events::Waits(WaitCall::Epoll, &["sys_enter_epoll_pwait", "sys_enter_epoll_wait"]),
        },
        Hook { program: "pwait2_enter", events: Events::Waits(WaitCall::Epoll, &["sys_enter_epoll_pwait2"]) },
        Hook {
            program: "uring_enter",
            events: Events::Waits(WaitCall::IoUring, &["sys_enter_io_uring_enter"]),
        },
        Hook { program: "poll_enter", events: Events::Waits(WaitCall::Poll, &["sys_enter_poll"]) },
        Hook { program: "ppoll_enter", events: Events::Waits(WaitCall::Poll, &["sys_enter_ppoll"]) },
        Hook { program: "select_enter", events: Events::Waits(WaitCall::Select, &["sys_enter_select"]) },
        Hook { program: "pselect_enter", events: Events::Waits(WaitCall::Select, &["sys_enter_pselect6"]) },
    ],
};

/// Lets the programs locate the saved registers of a thread in a system call, with this thread as the example. Returns
/// whether they did.
pub(crate) fn find_registers(ebpf: &mut Ebpf, place: &Array<MapData, u32>) -> Result<bool> {
    /// `BPF_PROG_TEST_RUN`: the first argument of the `bpf` call that runs the program.
    const TEST_RUN: u64 = 10;
    let program =
        ebpf.program_mut(FIND_REGISTERS).context("the eBPF object has no program find_registers")?;
    let program: &mut RawTracePoint = program.try_into()?;
    let mut options = RawTracePointRunOptions::new();
    options.args[0] = u64::try_from(libc::SYS_bpf)?;
    options.args[1] = TEST_RUN;
    program.test_run(options).context("cannot locate the registers of a thread")?;
    Ok(place.get(&0, 0)? != 0)
}

/// The lag of an event loop up to `now`. Must be called regularly, so that waits are attributed to return delays of the
/// same time.
pub(crate) fn lag(raw: &Raw, prober: &mut Prober, now: u64) -> Histogram {
    let wait_ns = wait_ns(raw, now);
    let (in_progress_ns, wait_ns) = match (raw.slice_since_ns(), raw.wait_since_ns()) {
        (Some(since), _) => (now.saturating_sub(since), wait_ns),
        (None, Some(since)) if raw.waiter.run == RunState::Woken as u32 => {
            let delay = now.saturating_sub(raw.waiter.woken_ns.max(since));
            (delay, wait_ns.saturating_sub(delay))
        }
        (None, _) => (0, wait_ns),
    };
    prober.ask(Observed {
        slices: &raw.durations.slice,
        replies: &raw.durations.wait_return_delay,
        in_progress_ns,
        wait_ns,
    })
}

/// Time up to `now` in which a thread waited in the loop, in nanoseconds.
pub(crate) fn wait_ns(raw: &Raw, now: u64) -> u64 {
    let now = if raw.now.members == 0 { raw.now.left_ns } else { now };
    let since = |start: u64| now.saturating_sub(start);
    let present = if raw.now.is_shared == 0 {
        raw.wait_since_ns().map_or(0, since)
    } else {
        let gap_ns = raw.slice_since_ns().map_or(0, since);
        since(raw.now.shared_since_ns).saturating_sub(raw.now.gaps_ns).saturating_sub(gap_ns)
    };
    raw.now.wait_ns + present
}

/// Metrics of an event loop as of `now`, with its lag up to then. The slice or wait in progress counts up to then.
pub(crate) fn decode(id: String, name: String, raw: &Raw, lag: Histogram, now: u64) -> Reactor {
    let slice = Histogram::from(&raw.durations.slice);
    let slice_age = raw.slice_since_ns().map(|since| now.saturating_sub(since));
    let busy_seconds = slice.sum() + seconds(slice_age.unwrap_or(0));
    let wait_seconds = seconds(wait_ns(raw, now));
    let observed = busy_seconds + wait_seconds;

    let mut parts_ns = raw.now.parts_ns;
    let of_slice = parts_in_progress(raw, now);
    for (part, of_slice) in parts_ns.iter_mut().zip(of_slice) {
        *part += of_slice;
    }
    let gc_ns = if raw.present_part().is_some() { raw.waiter.gc_ns } else { 0 };
    Reactor {
        id,
        tid: raw.now.tid,
        only_tid: (raw.now.is_shared == 0).then_some(raw.now.tid),
        threads: raw.now.members,
        name,
        slices: slice.count(),
        waits: raw.now.waits,
        events: raw.now.events,
        events_delayed: raw.now.events_delayed,
        wait_seconds,
        busy_seconds,
        utilization: (observed > 0.0).then(|| busy_seconds / observed),
        current_slice_seconds: slice_age.map(seconds),
        current_slice_events_wait: None,
        current_stack: None,
        lag,
        slice,
        wakeup: Histogram::from(&raw.durations.wakeup),
        event_delay: Histogram::from(&raw.durations.event_delay),
        split_seconds: split(&parts_ns, raw.now.gc_ns + gc_ns),
        stalls: Stalls::default(),
        exited: false,
        duty: Duty::default(),
        is_worker: false,
    }
}

/// The slice in progress by part, in nanoseconds. If its thread has left the loop, the cause is unknown.
fn parts_in_progress(raw: &Raw, now: u64) -> [u64; PARTS] {
    let Some(since) = raw.slice_since_ns() else { return [0; PARTS] };
    let Some(present) = raw.present_part() else {
        let mut parts = [0; PARTS];
        parts[RunState::Blocked as usize + Block::Other as usize] = now.saturating_sub(since);
        return parts;
    };
    let mut parts = raw.waiter.parts_ns;
    if let Some(part) = parts.get_mut(present) {
        *part += now.saturating_sub(raw.waiter.run_since_ns);
    }
    parts
}

/// Converts times by part, as the programs keep them, and the time of these that collections took.
fn split(parts_ns: &[u64; PARTS], gc_ns: u64) -> Split {
    let time = |run: RunState| seconds(parts_ns[run as usize]);
    let blocked = |block: Block| seconds(parts_ns[RunState::Blocked as usize + block as usize]);
    Split {
        cpu: time(RunState::Cpu),
        runqueue: time(RunState::Woken) + time(RunState::Preempted),
        blocked: Blocked {
            lock: blocked(Block::Lock),
            disk: blocked(Block::Disk),
            network: blocked(Block::Network),
            sleep: blocked(Block::Sleep),
            page_fault: blocked(Block::PageFault),
            other: blocked(Block::Other),
        },
        gc: seconds(gc_ns),
    }
}

/// Decodes a stall that has ended. `origin` is the request that it worked on for the longest uninterrupted time.
/// `events_seen` says whether events were seen to wait during the stall.
pub(crate) fn stall(raw: &RawStall, origin: Option<Arc<Request>>, events_seen: bool) -> Stall {
    let split_seconds = split(&raw.parts_ns, raw.gc_ns);
    Stall {
        start: clock::written(raw.start_ns),
        seconds: seconds(raw.length_ns),
        cause: Cause::of(&split_seconds),
        syscall: call_name(raw.longest_block_call),
        behind: (raw.longest_queue_after != 0).then(|| process::described(raw.longest_queue_after)),
        events_waited: match Evidence::of(raw.evidence) {
            // Events that were seen and are gone have been taken by another process that shares a listener, or were
            // returned by the wait before.
            Evidence::NothingWaited => (!events_seen).then_some(false),
            // At the end alone, an event may be the reaction to the response with which the slice ended.
            Evidence::EventsWaited => events_seen.then_some(true),
            Evidence::Unknown => None,
        },
        split_seconds,
        origin,
        site: 0,
    }
}

/// The slice in progress since `since_ns`, as a stall that ends at `now`.
pub(crate) fn stall_in_progress(raw: &Raw, since_ns: u64, now: u64, events_seen: bool) -> Stall {
    let waiter = &raw.waiter;
    let present_ns = now.saturating_sub(waiter.run_since_ns);
    let is_longest = waiter.run == RunState::Blocked as u32 && present_ns > waiter.longest_block_ns;
    let raw = RawStall {
        reactor: raw.now.slot,
        tgid: raw.now.tgid,
        created_ns: raw.now.created_ns,
        start_ns: since_ns,
        length_ns: now.saturating_sub(since_ns),
        parts_ns: parts_in_progress(raw, now),
        gc_ns: waiter.gc_ns,
        longest_block_call: if is_longest { waiter.call } else { waiter.longest_block_call },
        longest_queue_after: waiter.longest_queue_after,
        request: 0,
        // It has not ended: events that are there now have waited.
        evidence: if events_seen { Evidence::EventsWaited } else { Evidence::Unknown } as u32,
        tid: waiter.tid,
    };
    // Its origin is known only when it ends.
    stall(&raw, None, events_seen)
}

fn call_name(number: u32) -> Option<String> {
    (number != NO_CALL).then(|| syscalls::name(number))
}

#[cfg(test)]
mod tests {
    use observer_common::{
        reactor::{Durations, Reactor as Entry},
        waiter::{Phase, Waiter},
    };

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// A loop with one thread, which does this.
    const fn raw(waiter: Waiter) -> Raw {
        let now = Entry { created_ns: 1, tid: 7, tgid: 7, slot: 1, members: 1, waiter: 1, ..Entry::EMPTY };
        let waiter = Waiter { tid: 7, tgid: 7, slot: 1, reactor: 1, ..waiter };
        Raw { now, waiter, durations: Durations::NONE }
    }

    fn decoded(raw: &Raw, now: u64) -> Reactor {
        decode(String::new(), String::new(), raw, lag(raw, &mut Prober::default(), now), now)
    }

    /// Its thread works for two seconds at 12 s, the second of them asleep.
    const fn busy() -> Waiter {
        let mut parts_ns = [0; PARTS];
        parts_ns[RunState::Cpu as usize] = SECOND;
        Waiter {
            phase: Phase::Slice as u32,
            phase_since_ns: 10 * SECOND,
            run: RunState::Blocked as u32,
            run_since_ns: 11 * SECOND,
            block: Block::Sleep as u32,
            parts_ns,
            ..Waiter::EMPTY
        }
    }

    #[test]
    fn a_slice_in_progress_counts_up_to_now() {
        let mut raw = raw(busy());
        raw.now.wait_ns = 2 * SECOND;
        let reactor = decoded(&raw, 12 * SECOND);
        assert_eq!(reactor.current_slice_seconds, Some(2.0));
        assert_eq!((reactor.busy_seconds, reactor.wait_seconds), (2.0, 2.0));
        assert_eq!(reactor.utilization, Some(0.5));
        assert_eq!((reactor.split_seconds.cpu, reactor.split_seconds.blocked.sleep), (1.0, 1.0));
        assert_eq!((reactor.slices, reactor.threads, reactor.only_tid), (0, 1, Some(7)));
        // Four seconds were observed; an event due in half of them would have waited for up to two seconds.
        assert_eq!((reactor.lag.count(), reactor.lag.max()), (4000, 2.0));
    }

    #[test]
    fn a_shared_loop_is_busy_only_while_no_thread_waits() {
        let mut raw = raw(busy());
        raw.now = Entry { is_shared: 1, members: 3, shared_since_ns: 2 * SECOND, gaps_ns: SECOND, ..raw.now };
        let reactor = decoded(&raw, 12 * SECOND);
        assert_eq!((reactor.busy_seconds, reactor.wait_seconds), (0.0, 9.0));
        assert_eq!((reactor.current_slice_seconds, reactor.split_seconds.total()), (None, 0.0));
        assert_eq!((reactor.threads, reactor.only_tid), (3, None));

        raw.now.gap_since_ns = 10 * SECOND;
        let reactor = decoded(&raw, 12 * SECOND);
        assert_eq!((reactor.busy_seconds, reactor.wait_seconds), (2.0, 7.0));
        assert_eq!((reactor.split_seconds.cpu, reactor.split_seconds.blocked.sleep), (1.0, 1.0));
        assert_eq!((reactor.lag.count(), reactor.lag.max()), (9000, 2.0));

        // The thread with which the gap began has exited.
        raw.waiter = Waiter::EMPTY;
        let reactor = decoded(&raw, 12 * SECOND);
        assert_eq!((reactor.busy_seconds, reactor.split_seconds.blocked.other), (2.0, 2.0));
    }

    #[test]
    fn a_pending_return_from_a_wait_counts_up_to_now() {
        let raw = raw(Waiter {
            phase_since_ns: 10 * SECOND,
            run: RunState::Woken as u32,
            woken_ns: 13 * SECOND,
            ..Waiter::EMPTY
        });
        let lag = lag(&raw, &mut Prober::default(), 15 * SECOND);
        assert_eq!((lag.count(), lag.max()), (5000, 2.0));
        assert!((lag.sum() / 2000.0 - 1.0).abs() < 0.01, "{}", lag.sum());
    }

    #[test]
    fn a_thread_that_waits_since_the_start_is_idle() {
        let raw = raw(Waiter { phase_since_ns: SECOND, run: RunState::Blocked as u32, ..Waiter::EMPTY });
        let reactor = decoded(&raw, 4 * SECOND);
        assert_eq!((reactor.lag.count(), reactor.lag.sum()), (3000, 0.0));
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds), (3.0, 0.0));
        assert_eq!(reactor.utilization, Some(0.0));
        assert_eq!(reactor.current_slice_seconds, None);
    }

    #[test]
    fn times_of_a_loop_without_threads_are_final() {
        let mut raw = raw(Waiter::EMPTY);
        (raw.now.members, raw.waiter) = (0, Waiter::EMPTY);
        let reactor = decoded(&raw, 100 * SECOND);
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds, reactor.utilization), (0.0, 0.0, None));

        // With its last return, the last thread of a shared loop opened a gap.
        raw.now = Entry {
            is_shared: 1,
            shared_since_ns: SECOND,
            left_ns: 5 * SECOND,
            gaps_ns: SECOND,
            gap_since_ns: 5 * SECOND,
            ..raw.now
        };
        let reactor = decoded(&raw, 100 * SECOND);
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds, reactor.lag.max()), (3.0, 0.0, 0.0));
    }
}
