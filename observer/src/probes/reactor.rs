//! *reactor*: threads that wait for events, and what they do between two waits.

use observer_common::reactor::{Phase, Reactor as Raw, Run};

use super::{Events, Hook, Probe};
use crate::model::{
    histogram::{Histogram, seconds},
    snapshot::{Blocked, Reactor, Split},
};

pub(super) const PROBE: Probe = Probe {
    name: "reactor",
    purpose: "event loops: how long between two waits, on a CPU, waiting for one, or blocked; how late after a wake-up",
    since: "5.5",
    cost: "every wait for events, context switch and wake-up on the machine; one or two look-ups for a stranger's",
    hooks: &[
        Hook {
            program: "wait_enter",
            events: Events::Plain(&[
                ("syscalls", "sys_enter_epoll_pwait"),
                ("syscalls", "sys_enter_epoll_wait"),
                ("syscalls", "sys_enter_epoll_pwait2"),
            ]),
        },
        Hook {
            program: "wait_exit",
            events: Events::Plain(&[
                ("syscalls", "sys_exit_epoll_pwait"),
                ("syscalls", "sys_exit_epoll_wait"),
                ("syscalls", "sys_exit_epoll_pwait2"),
            ]),
        },
        Hook { program: "sched_switch", events: Events::Btf("sched_switch") },
        Hook { program: "sched_wakeup", events: Events::Btf("sched_wakeup") },
    ],
};

/// What the kernel would have written for a thread that was already waiting at `now`.
pub(crate) fn waiting(tgid: u32, now: u64) -> Raw {
    Raw {
        tgid,
        phase: Phase::Waiting as u32,
        phase_since_ns: now,
        run: Run::Blocked as u32,
        run_since_ns: now,
        ..Raw::EMPTY
    }
}

/// Whether the thread is gone and its figures are final.
pub(crate) fn is_final(raw: &Raw) -> bool {
    raw.phase == Phase::Exited as u32
}

/// A reactor's figures as of `now`; what is in progress counts up to then.
pub(crate) fn decode(tid: u32, name: String, raw: &Raw, now: u64) -> Reactor {
    let slice = Histogram::from(&raw.slice);
    let in_slice = raw.phase == Phase::Slice as u32;
    let in_phase = seconds(now.saturating_sub(raw.phase_since_ns));
    let busy_seconds = slice.sum() + if in_slice { in_phase } else { 0.0 };
    let waits_now = raw.phase == Phase::Waiting as u32 && raw.phase_since_ns != 0;
    let wait_seconds = seconds(raw.wait_ns) + if waits_now { in_phase } else { 0.0 };
    let observed = busy_seconds + wait_seconds;

    let mut split = raw.split_ns;
    if in_slice && let Some(running) = split.get_mut(raw.run as usize) {
        *running += now.saturating_sub(raw.run_since_ns);
    }
    let time = |run: Run| seconds(split[run as usize]);
    Reactor {
        tid,
        name,
        slices: slice.count(),
        waits: raw.waits,
        events: raw.events,
        wait_seconds,
        busy_seconds,
        utilization: (observed > 0.0).then(|| busy_seconds / observed),
        current_slice_seconds: in_slice.then_some(in_phase),
        slice,
        wakeup: Histogram::from(&raw.wakeup),
        split_seconds: Split {
            cpu: time(Run::Cpu),
            runqueue: time(Run::Woken) + time(Run::Preempted),
            blocked: Blocked { unknown: time(Run::Blocked) },
        },
        exited: is_final(raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_slice_in_progress_counts_at_its_present_age() {
        let raw = Raw {
            phase: Phase::Slice as u32,
            phase_since_ns: 10 * SECOND,
            run: Run::Blocked as u32,
            run_since_ns: 11 * SECOND,
            split_ns: [SECOND, 0, 0, 0],
            wait_ns: 2 * SECOND,
            ..Raw::EMPTY
        };
        let reactor = decode(1, String::new(), &raw, 12 * SECOND);
        assert_eq!(reactor.current_slice_seconds, Some(2.0));
        assert_eq!((reactor.busy_seconds, reactor.wait_seconds), (2.0, 2.0));
        assert_eq!(reactor.utilization, Some(0.5));
        assert_eq!((reactor.split_seconds.cpu, reactor.split_seconds.blocked.unknown), (1.0, 1.0));
        assert_eq!(reactor.slices, 0);
    }

    #[test]
    fn a_thread_that_has_waited_since_we_came_is_idle() {
        let reactor = decode(1, String::new(), &waiting(7, SECOND), 4 * SECOND);
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds), (3.0, 0.0));
        assert_eq!(reactor.utilization, Some(0.0));
        assert_eq!(reactor.current_slice_seconds, None);
    }

    #[test]
    fn an_exited_thread_no_longer_ages() {
        let raw = Raw { phase: Phase::Exited as u32, phase_since_ns: SECOND, ..Raw::EMPTY };
        let reactor = decode(1, String::new(), &raw, 100 * SECOND);
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds, reactor.utilization), (0.0, 0.0, None));
        assert!(reactor.exited);
    }
}
