//! *reactor*: threads that wait for events, and what they do between two waits.

use std::fmt;

use clap::ValueEnum;
use observer_common::reactor::{Habit, Kind, Phase, Reactor as Raw, Run};

use super::{Events, Hook, Probe, When};
use crate::model::{
    histogram::{Histogram, seconds},
    lag::{Observed, Prober},
    snapshot::{Blocked, Reactor, Split},
};

/// Calls that event loops wait with, as people choose among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Calls {
    /// epoll_wait, epoll_pwait, epoll_pwait2
    Epoll,
    /// io_uring_enter, where it waits for completions
    #[value(name = "io_uring")]
    IoUring,
    /// poll, ppoll
    Poll,
    /// select, pselect6
    Select,
}

impl Calls {
    /// Those that hardly anything but an event loop uses.
    pub(crate) const DEFAULT: [Self; 2] = [Self::Epoll, Self::IoUring];
}

impl fmt::Display for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Epoll => "epoll",
            Self::IoUring => "io_uring",
            Self::Poll => "poll",
            Self::Select => "select",
        })
    }
}

pub(super) const PROBE: Probe = Probe {
    name: "reactor",
    purpose: "event loops: how late they are; how long between two waits, on a CPU, waiting for one, or blocked; how late after a wake-up",
    since: "5.5",
    when: When::Always,
    cost: "every wait for events, context switch and wake-up on the machine; one or two look-ups for a stranger's",
    hooks: &[
        Hook { program: "sched_switch", events: Events::Btf(&["sched_switch"]) },
        Hook { program: "sched_wakeup", events: Events::Btf(&["sched_wakeup"]) },
        Hook {
            program: "epoll_enter",
            events: Events::Waits(Calls::Epoll, &["sys_enter_epoll_pwait", "sys_enter_epoll_wait"]),
        },
        Hook { program: "pwait2_enter", events: Events::Waits(Calls::Epoll, &["sys_enter_epoll_pwait2"]) },
        Hook {
            program: "epoll_exit",
            events: Events::Waits(
                Calls::Epoll,
                &["sys_exit_epoll_pwait", "sys_exit_epoll_wait", "sys_exit_epoll_pwait2"],
            ),
        },
        Hook { program: "uring_enter", events: Events::Waits(Calls::IoUring, &["sys_enter_io_uring_enter"]) },
        Hook { program: "uring_exit", events: Events::Waits(Calls::IoUring, &["sys_exit_io_uring_enter"]) },
        Hook { program: "poll_enter", events: Events::Waits(Calls::Poll, &["sys_enter_poll"]) },
        Hook { program: "ppoll_enter", events: Events::Waits(Calls::Poll, &["sys_enter_ppoll"]) },
        Hook {
            program: "poll_exit",
            // The kernel goes on with an interrupted poll under another name.
            events: Events::Waits(
                Calls::Poll,
                &["sys_exit_poll", "sys_exit_ppoll", "sys_exit_restart_syscall"],
            ),
        },
        Hook { program: "select_enter", events: Events::Waits(Calls::Select, &["sys_enter_select"]) },
        Hook { program: "pselect_enter", events: Events::Waits(Calls::Select, &["sys_enter_pselect6"]) },
        Hook {
            program: "select_exit",
            events: Events::Waits(Calls::Select, &["sys_exit_select", "sys_exit_pselect6"]),
        },
    ],
};

/// What the kernel would have written for a thread that was already waiting at `now`, in this way.
pub(crate) fn waiting(tgid: u32, now: u64, kind: Kind, set: u32) -> Raw {
    Raw {
        tgid,
        habit: Habit { kind: kind as u32, set, is_firm: 1, reserved: 0 },
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

/// A reactor's lag as of `now`. To be asked now and then, so that waits are attributed to replies of their time.
pub(crate) fn lag(raw: &Raw, prober: &mut Prober, now: u64) -> Histogram {
    let waits = raw.phase == Phase::Waiting as u32 && raw.phase_since_ns != 0;
    let age = now.saturating_sub(raw.phase_since_ns);
    let (in_progress_ns, wait_ns) = if raw.phase == Phase::Slice as u32 {
        (age, 0)
    } else if waits && raw.run == Run::Woken as u32 {
        let due = now.saturating_sub(raw.woken_ns).min(age);
        (due, age - due)
    } else if waits {
        (0, age)
    } else {
        (0, 0)
    };
    let wait_ns = raw.wait_ns + wait_ns;
    prober.ask(Observed { slices: &raw.slice, replies: &raw.reply, in_progress_ns, wait_ns })
}

/// A reactor's figures as of `now`; what is in progress counts up to then.
pub(crate) fn decode(tid: u32, name: String, raw: &Raw, prober: &mut Prober, now: u64) -> Reactor {
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
        current_stack: None,
        lag: lag(raw, prober, now),
        slice,
        wakeup: Histogram::from(&raw.wakeup),
        split_seconds: Split {
            cpu: time(Run::Cpu),
            runqueue: time(Run::Woken) + time(Run::Preempted),
            blocked: Blocked { unknown: time(Run::Blocked) },
            gc: seconds(raw.gc_ns),
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
        let reactor = decode(1, String::new(), &raw, &mut Prober::default(), 12 * SECOND);
        assert_eq!(reactor.current_slice_seconds, Some(2.0));
        assert_eq!((reactor.busy_seconds, reactor.wait_seconds), (2.0, 2.0));
        assert_eq!(reactor.utilization, Some(0.5));
        assert_eq!((reactor.split_seconds.cpu, reactor.split_seconds.blocked.unknown), (1.0, 1.0));
        assert_eq!(reactor.slices, 0);
        // Four seconds were seen, in half of which something due would have waited for up to two.
        assert_eq!((reactor.lag.count(), reactor.lag.max()), (4000, 2.0));
    }

    #[test]
    fn a_reply_that_does_not_come_counts_at_its_present_age() {
        let raw =
            Raw { phase_since_ns: 10 * SECOND, run: Run::Woken as u32, woken_ns: 13 * SECOND, ..Raw::EMPTY };
        let lag = lag(&raw, &mut Prober::default(), 15 * SECOND);
        assert_eq!((lag.count(), lag.max()), (5000, 2.0));
        assert!((lag.sum() / 2000.0 - 1.0).abs() < 0.01, "{}", lag.sum());
    }

    #[test]
    fn a_thread_that_has_waited_since_we_came_is_idle() {
        let raw = waiting(7, SECOND, Kind::Epoll, 3);
        let reactor = decode(1, String::new(), &raw, &mut Prober::default(), 4 * SECOND);
        assert_eq!((reactor.lag.count(), reactor.lag.sum()), (3000, 0.0));
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds), (3.0, 0.0));
        assert_eq!(reactor.utilization, Some(0.0));
        assert_eq!(reactor.current_slice_seconds, None);
    }

    #[test]
    fn an_exited_thread_no_longer_ages() {
        let raw = Raw { phase: Phase::Exited as u32, phase_since_ns: SECOND, ..Raw::EMPTY };
        let reactor = decode(1, String::new(), &raw, &mut Prober::default(), 100 * SECOND);
        assert_eq!((reactor.wait_seconds, reactor.busy_seconds, reactor.utilization), (0.0, 0.0, None));
        assert!(reactor.exited);
    }
}
