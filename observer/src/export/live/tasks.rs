//! Findings about deferred tasks. Timers wait on purpose, and cancelled timers are dropped on purpose: tasks are late only
//! if their kind usually starts soon, and dropped tasks are reported only of kinds that are known.

use std::cmp::Reverse;

use super::{
    finding::{Finding, Verdict, age, rate},
    state::{KindRow, State},
};
use crate::{
    export::words::span,
    model::{
        deferred::{Deferred, is_held_up},
        snapshot::Target,
    },
};

/// Kinds of deferred tasks that start later than they usually do, the longest wait first.
pub(super) fn late(state: &State) -> Vec<Finding> {
    let mut late: Vec<_> = state
        .all_kinds()
        .filter_map(|(row, target, kind)| {
            if kind.is_overdue() {
                return Some((kind.oldest_seconds.unwrap_or(0.0), overdue(row, target, kind)));
            }
            let lag = max_lag(state, target.pid);
            let is_late = is_held_up(&row.window.wait, lag);
            is_late.then(|| (row.window.wait.max(), held_up(row, target, kind, lag)))
        })
        .collect();
    late.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    late.into_iter().map(|(_, finding)| finding).collect()
}

/// The highest lag of the event loops of a process in the window, in seconds.
fn max_lag(state: &State, pid: u32) -> f64 {
    let of_process = state.all_loops().filter(|(_, target, _)| target.pid == pid);
    of_process.map(|(row, _, reactor)| row.window.lag.max().max(age(reactor))).fold(0.0, f64::max)
}

/// `tasks mail of app (10)`.
fn kind_name(target: &Target, kind: &Deferred) -> String {
    format!("tasks {} of {} ({})", kind.task, target.comm, target.pid)
}

fn overdue(row: &KindRow, target: &Target, kind: &Deferred) -> Finding {
    let oldest = span(kind.oldest_seconds.unwrap_or(0.0));
    let what = format!("{}: oldest pending task enqueued {oldest} ago", kind_name(target, kind));
    let why = format!(
        "tasks that started had waited at most {}; {} pending, {} started",
        span(kind.wait.max()),
        kind.pending,
        rate(row.window.started, row.window.seconds)
    );
    Finding { verdict: Verdict::Late, what, why }
}

fn held_up(row: &KindRow, target: &Target, kind: &Deferred, lag: f64) -> Finding {
    let wait = &row.window.wait;
    let what = format!("{}: waited up to {} to start", kind_name(target, kind), span(wait.max()));
    let why = format!(
        "median wait {}; the event loops of the process had a lag of up to {}",
        span(wait.quantile(0.5).unwrap_or(0.0)),
        span(lag)
    );
    Finding { verdict: Verdict::Late, what, why }
}

/// Kinds with tasks that were dropped in the window, most first.
pub(super) fn dropped(state: &State) -> Vec<Finding> {
    let mut kinds: Vec<_> = state
        .all_kinds()
        .map(|(row, target, kind)| (kind.dropped(row.window.orphaned), row, target, kind))
        .filter(|(dropped, ..)| *dropped > 0)
        .collect();
    kinds.sort_by_key(|(dropped, ..)| Reverse(*dropped));
    let findings = kinds.into_iter().map(|(dropped, row, target, kind)| {
        let what = format!("{}: {dropped} dropped before they started", kind_name(target, kind));
        let (started, seconds) = (row.window.started, row.window.seconds);
        let why = format!("{started} started in the last {seconds:.0} s; {} pending", kind.pending);
        Finding { verdict: Verdict::Lost, what, why }
    });
    findings.collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{testing, verdict::findings},
        *,
    };
    use crate::model::snapshot::Snapshot;

    fn of(snapshot: Snapshot) -> State {
        let mut state = State::default();
        state.update(snapshot);
        state
    }

    /// A snapshot with an event loop that had a lag of up to 120 ms, and this kind of tasks.
    fn with_kind(kind: Deferred) -> Snapshot {
        let mut snapshot = testing::snapshot(1.0, |reactor| testing::slept(reactor, 3));
        snapshot.targets[0].deferred = vec![kind];
        snapshot
    }

    #[test]
    fn tasks_that_a_late_loop_held_up_are_late() {
        let mut kind = testing::kind("mail", 0);
        kind.wait = testing::histogram(&[(1, 90), (110, 10)]);
        let found = findings(&of(with_kind(kind.clone())));
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].what, "tasks mail of app (10): waited up to 110 ms to start");
        assert!(found[1].why.ends_with("lag of up to 120 ms"), "{found:?}");
        // Timers, alone or with tasks of their kind that start soon, and tasks of loops that are not late.
        for waits in [&[(110, 100)][..], &[(1, 90), (5000, 10)]] {
            kind.wait = testing::histogram(waits);
            assert_eq!(findings(&of(with_kind(kind.clone()))).len(), 1, "{waits:?}");
        }
        let mut snapshot = testing::snapshot(1.0, |_| {});
        kind.wait = testing::histogram(&[(1, 90), (110, 10)]);
        snapshot.targets[0].deferred = vec![kind];
        assert!(findings(&of(snapshot)).is_empty());
    }

    #[test]
    fn a_task_is_late_if_it_waits_far_longer_than_its_kind() {
        let mut kind = testing::kind("mail", 50);
        (kind.orphaned, kind.pending, kind.oldest_seconds) = (0, 3, Some(4.0));
        let found = findings(&of(with_kind(kind.clone())));
        assert_eq!(found[1].what, "tasks mail of app (10): oldest pending task enqueued 4.00 s ago");
        assert_eq!(found[1].why, "tasks that started had waited at most 2.00 ms; 3 pending, 50.0/s started");
        // A timer that waits as long as others of its kind, and a kind whose usual wait is not known yet.
        kind.wait = testing::histogram(&[(3000, 50)]);
        assert_eq!(findings(&of(with_kind(kind.clone()))).len(), 1);
        kind.wait = testing::histogram(&[(1, 3)]);
        assert_eq!(findings(&of(with_kind(kind))).len(), 1);
    }

    #[test]
    fn dropped_tasks_are_found_and_cancelled_timers_are_not() {
        let mut kind = testing::kind("mail", 50);
        let found = findings(&of(with_kind(kind.clone())));
        assert_eq!(
            found.iter().map(|finding| finding.verdict).collect::<Vec<_>>(),
            [Verdict::Late, Verdict::Lost]
        );
        assert_eq!(found[1].what, "tasks mail of app (10): 10 dropped before they started");
        assert_eq!(found[1].why, "50 started in the last 1 s; 0 pending");
        (kind.task, kind.is_kind_known) = ("asyncio work".into(), false);
        assert_eq!(findings(&of(with_kind(kind))).len(), 1);
    }
}
