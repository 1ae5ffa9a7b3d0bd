//! The first lines of the view: is the server late, and whose fault is it? They are about the last ten seconds; those of
//! the report are about the whole observation.

use super::{
    recent::{LoopWindow, WINDOW},
    state::{LoopRow, QueueRow, State},
    tasks,
};
use crate::{
    export::{
        live::finding::{Finding, Verdict, age, rate},
        words::{self, cause_name, oldest, percent, site_cause, span, stack, unwatched},
    },
    model::{
        busy::Cause,
        lag::PROBE_SECONDS,
        late::{LATE, Lateness},
        snapshot::{Listener, Reactor, Target},
        stall::Site,
    },
};

/// All findings: the worst late event loop, the worst accept queue and the worst kind of deferred tasks first, then the
/// other late event loops, queues and kinds, then busy event loops, and dropped tasks last.
pub(super) fn findings(state: &State) -> Vec<Finding> {
    let mut loops: Vec<_> = state.all_loops().collect();
    let harm = |row: &LoopRow, reactor: &Reactor| row.window.lag.mean().max(age(reactor));
    loops.sort_by(|(a, _, of_a), (b, _, of_b)| harm(b, of_b).total_cmp(&harm(a, of_a)));
    let with = |wanted: Lateness| {
        loops.iter().filter_map(move |&(row, target, reactor)| {
            let window = &row.window;
            let has_waited = window.late_stalls > 0 || window.longest_wakeup >= LATE || reactor.is_awaited();
            let lateness = Lateness::of(window.lag.max().max(age(reactor)), has_waited);
            (lateness == wanted).then(|| of_loop(row, target, reactor, lateness))
        })
    };
    let (mut late, busy) = (with(Lateness::Late), with(Lateness::Busy));
    let mut queues: Vec<_> = state
        .all_queues()
        .filter(|(row, _, listener)| longest_wait(row, listener) >= LATE || row.window.drops > 0)
        .collect();
    let harm = |row: &QueueRow, listener: &Listener| longest_wait(row, listener);
    queues.sort_by(|(a, _, of_a), (b, _, of_b)| harm(b, of_b).total_cmp(&harm(a, of_a)));
    let mut queues = queues.into_iter().map(|(row, target, listener)| of_queue(row, target, listener));
    let mut kinds = tasks::late(state).into_iter();
    let worst = late.next().into_iter().chain(queues.next()).chain(kinds.next());
    let others = late.chain(queues).chain(kinds).chain(busy).chain(of_workers(state));
    worst.chain(others).chain(tasks::dropped(state)).collect()
}

/// The groups of workers that are running.
fn of_workers(state: &State) -> impl Iterator<Item = Finding> {
    let all = state.snapshot().map_or(&[][..], |snapshot| &snapshot.workers);
    all.iter().filter(|group| group.running > 0).map(|group| {
        let site = group.stalls.sites.first();
        let why = site.map(|site| {
            let stack = stack(&site.sample, usize::MAX);
            format!("{} of their stalls: {} {stack}", percent(site.lag_share), site_cause(site))
        });
        Finding { verdict: Verdict::Workers, what: words::workers(group), why: why.unwrap_or_default() }
    })
}

/// The verdict if nothing is late, with the highest lag since the start.
pub(super) fn not_late(state: &State) -> Finding {
    if let Some(what) = unwatched(state.targets()) {
        return Finding { verdict: Verdict::NotKnown, what, why: "nothing else is known to be late".into() };
    }
    let seconds = state.all_loops().map(|(row, ..)| row.window.seconds).fold(0.0, f64::max);
    let what =
        if seconds < WINDOW / 2.0 { "so far".to_owned() } else { format!("in the last {seconds:.0} s") };
    let what = format!("{what}: nothing is known to have waited for {} or longer", span(LATE));
    let worst = state.all_loops().max_by(|(.., a), (.., b)| a.lag.max().total_cmp(&b.lag.max()));
    let why = worst.filter(|(.., reactor)| reactor.lag.count() > 0).map(|(_, target, reactor)| {
        format!("highest lag since the start: {} ({})", span(reactor.lag.max()), loop_name(target, reactor))
    });
    Finding { verdict: Verdict::NotLate, what, why: why.unwrap_or_default() }
}

/// A loop that is late, or busy for long though nothing is known to have waited.
fn of_loop(row: &LoopRow, target: &Target, reactor: &Reactor, lateness: Lateness) -> Finding {
    let (verdict, waited) = match lateness {
        Lateness::Late => (Verdict::Late, ""),
        _ => (Verdict::Busy, "; nothing is known to have waited"),
    };
    let who = loop_name(target, reactor);
    let lag = &row.window.lag;
    let stuck = reactor.current_slice_seconds.filter(|&age| age >= LATE);
    let worst_site = worst_site(reactor, &row.window);
    // The current slice is the finding if it has already added more to the lag than the worst site of the window.
    let is_worst = |age: f64| worst_site.is_none_or(|(weight, _)| age * age / 2.0 > weight);
    if let Some(age) = stuck.filter(|&age| is_worst(age)) {
        let why = reactor.current_stack.as_ref().map(|sample| stack(sample, usize::MAX));
        let what = format!("{who}: stuck for {} so far{waited}", span(age));
        return Finding { verdict, what, why: why.unwrap_or_default() };
    }
    let what = format!("{who}: lag up to {}, mean {}{waited}", span(lag.max()), span(lag.mean()));
    let why = worst_site.map_or_else(
        || without_stalls(reactor, &row.window),
        |(weight, site)| {
            let share = weight / (lag.sum() * PROBE_SECONDS).max(weight);
            let stack = stack(&site.sample, usize::MAX);
            format!("{} of the lag: {} {stack}", percent(share), site_cause(site))
        },
    );
    Finding { verdict, what, why }
}

fn of_queue(row: &QueueRow, target: &Target, listener: &Listener) -> Finding {
    let who = format!("{} of {} ({})", listener.name(), target.comm, target.pid);
    let mut what = format!("{who}: connections waited up to {}", span(longest_wait(row, listener)));
    if row.window.drops > 0 {
        what = format!("{what}, {} dropped", row.window.drops);
    }
    let oldest = listener.oldest_seconds.map(|_| format!(", oldest {}", oldest(listener)));
    let why = format!(
        "depth {}, limit {}{}; {} arrived, {} accepted",
        listener.depth,
        listener.limit,
        oldest.unwrap_or_default(),
        rate(row.window.arrivals, row.window.seconds),
        rate(row.window.accepts, row.window.seconds),
    );
    Finding { verdict: Verdict::Late, what, why }
}

/// The longest wait in the window or of a connection that still waits, in seconds.
pub(super) fn longest_wait(row: &QueueRow, listener: &Listener) -> f64 {
    row.window.wait.max().max(listener.oldest_seconds.unwrap_or(0.0))
}

/// The site that added most to the lag in the window, and how much, in seconds squared. Only the latest stalls are kept
/// individually, so if there are very many, the earlier ones are not counted.
fn worst_site<'a>(reactor: &'a Reactor, window: &LoopWindow) -> Option<(f64, &'a Site)> {
    let recent =
        reactor.stalls.recent.iter().rev().take(usize::try_from(window.stalls).unwrap_or(usize::MAX));
    let mut weights = vec![0.0; reactor.stalls.sites.len()];
    for stall in recent {
        if let Some(weight) = weights.get_mut(stall.site) {
            *weight += stall.seconds * stall.seconds / 2.0;
        }
    }
    let worst = weights.into_iter().zip(&reactor.stalls.sites).max_by(|(a, _), (b, _)| a.total_cmp(b));
    worst.filter(|(weight, _)| *weight > 0.0)
}

/// `reactor (12) of app (10)`; `app (10)` for the loop of a process's main thread.
pub(super) fn loop_name(target: &Target, reactor: &Reactor) -> String {
    if reactor.tid == target.pid {
        format!("{} ({})", target.comm, target.pid)
    } else {
        format!("{} ({}) of {} ({})", reactor.name, reactor.tid, target.comm, target.pid)
    }
}

/// Why a loop without a stall in the window is late: its wake-ups, and where its busy time went.
fn without_stalls(reactor: &Reactor, window: &LoopWindow) -> String {
    let wakeup = reactor.wakeup.max();
    let woken = (wakeup >= LATE).then(|| format!("wake-ups took up to {} since the start; ", span(wakeup)));
    format!("{}{}", woken.unwrap_or_default(), main_causes(window))
}

/// The causes that take at least a tenth of the busy time, largest first.
fn main_causes(window: &LoopWindow) -> String {
    let total: f64 = window.parts.iter().sum();
    let mut shares: Vec<_> = Cause::PARTS.into_iter().zip(window.parts.map(|part| part / total)).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    let shares = shares.iter().filter(|(_, share)| *share >= 0.1);
    let shares: Vec<_> =
        shares.map(|(cause, share)| format!("{} {}", percent(*share), cause_name(*cause))).collect();
    if shares.is_empty() { String::new() } else { format!("busy time: {}", shares.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};
    use crate::model::{frame::StackSample, snapshot::Snapshot};

    fn of(snapshots: impl IntoIterator<Item = Snapshot>) -> State {
        let mut state = State::default();
        snapshots.into_iter().for_each(|snapshot| state.update(snapshot));
        state
    }

    #[test]
    fn a_late_loop_is_found_with_its_worst_site() {
        let state = of([testing::snapshot(1.0, |reactor| testing::slept(reactor, 3))]);
        let found = findings(&state);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "reactor (11) of app (10): lag up to 120 ms, mean 64.3 ms");
        let why =
            "80.0 % of the lag: asleep (clock_nanosleep) in sleep (app/db.py:12) < handle (app/server.py:40)";
        assert_eq!(found[0].why, why);
    }

    #[test]
    fn a_busy_loop_is_not_late_if_nothing_waited() {
        let state = of([testing::snapshot(1.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.stalls.late = 0;
        })]);
        let found = findings(&state);
        assert_eq!(found[0].verdict, Verdict::Busy);
        let what =
            "reactor (11) of app (10): lag up to 120 ms, mean 64.3 ms; nothing is known to have waited";
        assert_eq!(found[0].what, what);
    }

    #[test]
    fn a_lag_before_the_window_is_no_finding() {
        let state =
            of((1..=20).map(|s| testing::snapshot(f64::from(s), |reactor| testing::slept(reactor, 3))));
        assert!(findings(&state).is_empty());
        let well = not_late(&state);
        assert!(well.what.starts_with("in the last 10 s: "), "{well:?}");
        assert!(well.what.ends_with("waited for 50.0 ms or longer"), "{well:?}");
        assert_eq!(well.why, "highest lag since the start: 120 ms (reactor (11) of app (10))");
        let mut snapshot = testing::snapshot(21.0, |_| {});
        snapshot.targets[0].unwatched_waits = Some("poll");
        assert_eq!(not_late(&of([snapshot])).verdict, Verdict::NotKnown);
    }

    #[test]
    fn a_loop_that_is_stuck_now_comes_first() {
        let state = of([testing::snapshot(9.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.current_slice_seconds = Some(2.5);
            reactor.current_stack = Some(StackSample::missing("it ran away"));
        })]);
        let found = findings(&state);
        assert_eq!(found[0].what, "reactor (11) of app (10): stuck for 2.50 s so far");
        assert_eq!(found[0].why, "(stack unknown: it ran away)");
    }

    #[test]
    fn a_late_queue_is_found_with_both_rates() {
        let mut snapshot = testing::snapshot(4.0, |_| {});
        let listener = &mut snapshot.targets[0].listeners[0];
        (listener.depth, listener.oldest_seconds, listener.drops) = (7, Some(0.3), 2);
        let found = findings(&of([snapshot]));
        assert_eq!(found[0].what, "127.0.0.1:8080 of app (10): connections waited up to 300 ms, 2 dropped");
        let why = "depth 7, limit 128, oldest 300 ms; 25.0/s arrived, 25.0/s accepted";
        assert_eq!(found[0].why, why);
    }
}
