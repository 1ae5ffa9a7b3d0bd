//! What the first lines say of deferred work: that it is late only where it was to be done soon, for timers are put off on
//! purpose; and that it was forgotten only where that is no cancelled timer.

use std::cmp::Reverse;

use super::{
    finding::{Finding, age, rate},
    state::{KindRow, State},
};
use crate::{
    export::words::span,
    model::{
        deferred::{Deferred, is_held_up},
        snapshot::Target,
    },
};

/// Deferred work that starts later than it should, worst first.
pub(super) fn late(state: &State) -> Vec<Finding> {
    let mut late: Vec<_> = state
        .all_kinds()
        .filter_map(|(row, target, kind)| {
            if kind.is_overdue() {
                return Some((kind.oldest_seconds.unwrap_or(0.0), overdue(row, target, kind)));
            }
            let lag = lag_of(state, target.pid);
            let is_late = is_held_up(&row.window.wait, lag);
            is_late.then(|| (row.window.wait.max(), held_up(row, target, kind, lag)))
        })
        .collect();
    late.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    late.into_iter().map(|(_, finding)| finding).collect()
}

/// How late the event loops of a process were of late, at most.
fn lag_of(state: &State, pid: u32) -> f64 {
    let of_process = state.all_loops().filter(|(_, target, _)| target.pid == pid);
    of_process.map(|(row, _, reactor)| row.window.lag.max().max(age(reactor))).fold(0.0, f64::max)
}

/// `mail of app (10)`.
fn kind_name(target: &Target, kind: &Deferred) -> String {
    format!("{} of {} ({})", kind.task, target.comm, target.pid)
}

fn overdue(row: &KindRow, target: &Target, kind: &Deferred) -> Finding {
    let oldest = span(kind.oldest_seconds.unwrap_or(0.0));
    let what = format!("{}: put off {oldest} ago and not started", kind_name(target, kind));
    let why = format!(
        "no other waited for more than {}; {} are pending, {} start",
        span(kind.wait.max()),
        kind.pending,
        rate(row.window.started, row.window.seconds)
    );
    Finding { is_late: true, what, why }
}

fn held_up(row: &KindRow, target: &Target, kind: &Deferred, lag: f64) -> Finding {
    let wait = &row.window.wait;
    let what = format!("{}: up to {} until started", kind_name(target, kind), span(wait.max()));
    let why = format!(
        "half of it starts within {}; event loops of its process were up to {} late",
        span(wait.quantile(0.5).unwrap_or(0.0)),
        span(lag)
    );
    Finding { is_late: true, what, why }
}

/// Deferred work that was forgotten, most first.
pub(super) fn dropped(state: &State) -> Vec<Finding> {
    let mut kinds: Vec<_> = state
        .all_kinds()
        .map(|(row, target, kind)| (kind.dropped(row.window.orphaned), row, target, kind))
        .filter(|(dropped, ..)| *dropped > 0)
        .collect();
    kinds.sort_by_key(|(dropped, ..)| Reverse(*dropped));
    let told = kinds.into_iter().map(|(dropped, row, target, kind)| {
        let what = format!("{}: {dropped} forgotten before they started", kind_name(target, kind));
        let (started, seconds) = (row.window.started, row.window.seconds);
        let why = format!("{started} started in the last {seconds:.0} s; {} are pending", kind.pending);
        Finding { is_late: false, what, why }
    });
    told.collect()
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
        state.look(snapshot);
        state
    }

    /// A snapshot whose loop was up to 120 ms late, with this kind of work.
    fn with_kind(kind: Deferred) -> Snapshot {
        let mut snapshot = testing::snapshot(1.0, |reactor| testing::slept(reactor, 3));
        snapshot.targets[0].deferred = vec![kind];
        snapshot
    }

    #[test]
    fn work_that_a_late_loop_holds_up_is_late() {
        let mut kind = testing::kind("mail", 0);
        kind.wait = testing::histogram(&[(1, 90), (110, 10)]);
        let found = findings(&of(with_kind(kind.clone())));
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].what, "mail of app (10): up to 110 ms until started");
        assert!(found[1].why.ends_with("event loops of its process were up to 120 ms late"), "{found:?}");
        // Timers, with or without others of their kind that are not to wait, and work of loops that are not late.
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
    fn the_oldest_is_late_where_no_other_waits_as_long() {
        let mut kind = testing::kind("mail", 50);
        (kind.orphaned, kind.pending, kind.oldest_seconds) = (0, 3, Some(4.0));
        let found = findings(&of(with_kind(kind.clone())));
        assert_eq!(found[1].what, "mail of app (10): put off 4.00 s ago and not started");
        assert_eq!(found[1].why, "no other waited for more than 2.00 ms; 3 are pending, 50.0/s start");
        // A timer that waits as others of its kind do; and what nobody knows the usual wait of.
        kind.wait = testing::histogram(&[(3000, 50)]);
        assert_eq!(findings(&of(with_kind(kind.clone()))).len(), 1);
        kind.wait = testing::histogram(&[(1, 3)]);
        assert_eq!(findings(&of(with_kind(kind))).len(), 1);
    }

    #[test]
    fn forgotten_work_is_told_and_cancelled_timers_are_not() {
        let mut kind = testing::kind("mail", 50);
        let found = findings(&of(with_kind(kind.clone())));
        assert!(found[0].is_late && !found[1].is_late);
        assert_eq!(found[1].what, "mail of app (10): 10 forgotten before they started");
        assert_eq!(found[1].why, "50 started in the last 1 s; 0 are pending");
        (kind.task, kind.is_kind_known) = ("asyncio work".into(), false);
        assert_eq!(findings(&of(with_kind(kind))).len(), 1);
    }
}
