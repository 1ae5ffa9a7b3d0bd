//! The first lines of the view: is it late, and whose fault is it? About the last seconds, unlike the report.

use super::{
    recent::{LoopWindow, WINDOW},
    state::{LoopRow, QueueRow, State},
    work,
};
use crate::{
    export::{
        live::finding::{Finding, age, rate},
        words::{named, percent, span},
    },
    model::{
        busy::Cause,
        frame::Look,
        lag::{LATE, PROBE_SECONDS},
        snapshot::{Listener, Reactor, Target},
        stall::Site,
    },
};

/// All that is late, the worst event loop first, the worst accept queue second, deferred work third; and, last, what is
/// never done.
pub(super) fn findings(state: &State) -> Vec<Finding> {
    let mut loops: Vec<_> = state
        .all_loops()
        .filter(|(row, _, reactor)| row.window.lag.max() >= LATE || age(reactor) >= LATE)
        .collect();
    let harm = |row: &LoopRow, reactor: &Reactor| row.window.lag.mean().max(age(reactor));
    loops.sort_by(|(a, _, of_a), (b, _, of_b)| harm(b, of_b).total_cmp(&harm(a, of_a)));
    let mut loops = loops.into_iter().map(|(row, target, reactor)| of_loop(row, target, reactor));
    let mut queues: Vec<_> = state
        .all_queues()
        .filter(|(row, _, listener)| longest_wait(row, listener) >= LATE || row.window.drops > 0)
        .collect();
    let harm = |row: &QueueRow, listener: &Listener| longest_wait(row, listener);
    queues.sort_by(|(a, _, of_a), (b, _, of_b)| harm(b, of_b).total_cmp(&harm(a, of_a)));
    let mut queues = queues.into_iter().map(|(row, target, listener)| of_queue(row, target, listener));
    let mut kinds = work::late(state).into_iter();
    let worst = loops.next().into_iter().chain(queues.next()).chain(kinds.next());
    worst.chain(loops).chain(queues).chain(kinds).chain(work::dropped(state)).collect()
}

/// Where nothing is late: that, and whether anything was.
pub(super) fn all_is_well(state: &State) -> Finding {
    let seconds = state.all_loops().map(|(row, ..)| row.window.seconds).fold(0.0, f64::max);
    let what =
        if seconds < WINDOW / 2.0 { "so far".to_owned() } else { format!("in the last {seconds:.0} s") };
    let what = format!("{what}: no loop was away for {} or more, no connection waited as long", span(LATE));
    let worst = state.all_loops().max_by(|(.., a), (.., b)| a.lag.max().total_cmp(&b.lag.max()));
    let why = worst.filter(|(.., reactor)| reactor.lag.count() > 0).map(|(_, target, reactor)| {
        format!("since the start up to {} ({})", span(reactor.lag.max()), loop_name(target, reactor))
    });
    Finding { is_late: false, what, why: why.unwrap_or_default() }
}

fn of_loop(row: &LoopRow, target: &Target, reactor: &Reactor) -> Finding {
    let who = loop_name(target, reactor);
    let lag = &row.window.lag;
    let stuck = reactor.current_slice_seconds.filter(|&age| age >= LATE);
    let culprit = culprit(reactor, &row.window);
    // What goes on now outweighs what is over if it has done more harm already.
    let is_worst = |age: f64| culprit.is_none_or(|(weight, _)| age * age / 2.0 > weight);
    if let Some(age) = stuck.filter(|&age| is_worst(age)) {
        let why = reactor.current_stack.as_ref().map(stack).unwrap_or_default();
        let what = format!("{who}: stuck for {} and still so", span(age));
        return Finding { is_late: true, what, why };
    }
    let what = format!("{who}: up to {}, mean {}", span(lag.max()), span(lag.mean()));
    let why = culprit.map_or_else(
        || without_stalls(reactor, &row.window),
        |(weight, site)| {
            let share = weight / (lag.sum() * PROBE_SECONDS).max(weight);
            format!("{} of that: {} {}", percent(share), cause(site), stack(&site.look))
        },
    );
    Finding { is_late: true, what, why }
}

fn of_queue(row: &QueueRow, target: &Target, listener: &Listener) -> Finding {
    let who = format!("{} of {} ({})", listener.name(), target.comm, target.pid);
    let mut what = format!("{who}: up to {} until accepted", span(longest_wait(row, listener)));
    if row.window.drops > 0 {
        what = format!("{what}, {} dropped", row.window.drops);
    }
    let oldest = listener.oldest_seconds.map(|age| {
        let at_least = if listener.oldest_is_lower_bound { "at least " } else { "" };
        format!(", the oldest for {at_least}{}", span(age))
    });
    let why = format!(
        "{} of {} wait now{}; {} arrive, {} are accepted",
        listener.depth,
        listener.limit,
        oldest.unwrap_or_default(),
        rate(row.window.arrivals, row.window.seconds),
        rate(row.window.accepts, row.window.seconds),
    );
    Finding { is_late: true, what, why }
}

/// How long the longest wait was, those that still wait included.
pub(super) fn longest_wait(row: &QueueRow, listener: &Listener) -> f64 {
    row.window.wait.max().max(listener.oldest_seconds.unwrap_or(0.0))
}

/// The place in the code that did most harm in the recent past, and how much, in seconds squared. Of very many stalls
/// the latest alone are known one by one.
fn culprit<'a>(reactor: &'a Reactor, window: &LoopWindow) -> Option<(f64, &'a Site)> {
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

/// `reactor (12) of app (10)`; `app (10)` for a process's main loop.
pub(super) fn loop_name(target: &Target, reactor: &Reactor) -> String {
    if reactor.tid == target.pid {
        format!("{} ({})", target.comm, target.pid)
    } else {
        format!("{} ({}) of {} ({})", reactor.name, reactor.tid, target.comm, target.pid)
    }
}

/// `asleep (clock_nanosleep)`.
pub(super) fn cause(site: &Site) -> String {
    let call = site.syscall.as_ref().filter(|_| matches!(site.cause, Cause::Blocked(_)));
    call.map_or_else(|| named(site.cause).into(), |call| format!("{} ({call})", named(site.cause)))
}

/// Functions innermost first on one line, `?` where they are not known further; or why none is.
pub(super) fn stack(look: &Look) -> String {
    let frames: Vec<String> = look.frames.iter().map(ToString::to_string).collect();
    match &look.missing {
        None => format!("in {}", frames.join(" < ")),
        Some(why) if frames.is_empty() => format!("(code not known: {why})"),
        Some(_) => format!("in {} < ?", frames.join(" < ")),
    }
}

/// What can be said of a loop in which no slice was a stall.
fn without_stalls(reactor: &Reactor, window: &LoopWindow) -> String {
    let wakeup = reactor.wakeup.max();
    let woken = (wakeup >= LATE).then(|| format!("woken up to {} late since the start; ", span(wakeup)));
    format!("{}{}", woken.unwrap_or_default(), main_causes(window))
}

/// The parts of busy time that matter, largest first.
fn main_causes(window: &LoopWindow) -> String {
    let total: f64 = window.parts.iter().sum();
    let mut shares: Vec<_> = Cause::PARTS.into_iter().zip(window.parts.map(|part| part / total)).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    let shares = shares.iter().filter(|(_, share)| *share >= 0.1);
    let shares: Vec<_> =
        shares.map(|(cause, share)| format!("{} {}", percent(*share), named(*cause))).collect();
    if shares.is_empty() { String::new() } else { format!("busy time: {}", shares.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};
    use crate::model::snapshot::Snapshot;

    fn of(snapshots: impl IntoIterator<Item = Snapshot>) -> State {
        let mut state = State::default();
        snapshots.into_iter().for_each(|snapshot| state.look(snapshot));
        state
    }

    #[test]
    fn a_late_loop_is_told_with_its_culprit() {
        let state = of([testing::snapshot(1.0, |reactor| testing::slept(reactor, 3))]);
        let found = findings(&state);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "reactor (11) of app (10): up to 120 ms, mean 64.3 ms");
        let why =
            "80.0 % of that: asleep (clock_nanosleep) in sleep (app/db.py:12) < handle (app/server.py:40)";
        assert_eq!(found[0].why, why);
    }

    #[test]
    fn what_was_late_long_ago_is_told_as_the_past() {
        let state =
            of((1..=20).map(|s| testing::snapshot(f64::from(s), |reactor| testing::slept(reactor, 3))));
        assert!(findings(&state).is_empty());
        let well = all_is_well(&state);
        assert!(well.what.starts_with("in the last 10 s: no loop was away for 50.0 ms"), "{well:?}");
        assert_eq!(well.why, "since the start up to 120 ms (reactor (11) of app (10))");
    }

    #[test]
    fn a_loop_that_is_stuck_now_comes_first() {
        let state = of([testing::snapshot(9.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.current_slice_seconds = Some(2.5);
            reactor.current_stack = Some(Look::missing("it ran away"));
        })]);
        let found = findings(&state);
        assert_eq!(found[0].what, "reactor (11) of app (10): stuck for 2.50 s and still so");
        assert_eq!(found[0].why, "(code not known: it ran away)");
    }

    #[test]
    fn queues_are_told_with_both_rates() {
        let mut snapshot = testing::snapshot(4.0, |_| {});
        let listener = &mut snapshot.targets[0].listeners[0];
        (listener.depth, listener.oldest_seconds, listener.drops) = (7, Some(0.3), 2);
        let found = findings(&of([snapshot]));
        assert_eq!(found[0].what, "127.0.0.1:8080 of app (10): up to 300 ms until accepted, 2 dropped");
        let why = "7 of 128 wait now, the oldest for 300 ms; 25.0/s arrive, 25.0/s are accepted";
        assert_eq!(found[0].why, why);
    }
}
