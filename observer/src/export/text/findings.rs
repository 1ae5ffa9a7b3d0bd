//! The first lines: what is late, busy or lost, and whose fault it is. What is LATE is decided in `model/late.rs`; the first
//! screen of the live view is in `live/verdict.rs`.

use anyhow::Result;

use super::phrases::{of_which_gc, overflows, process_name, share_of, shares};
use crate::{
    export::words::{
        counted, main_culprit, oldest, percent, reactor_name, site_cause, span, stack, unwatched,
    },
    model::{
        deferred::is_held_up,
        late::{LATE, Lateness},
        snapshot::{Listener, Reactor, Target, Workers},
        stall::Stalls,
    },
    sanitize::Lines,
};

/// Functions shown of the stack that a finding blames, innermost first.
const FRAMES_OF_FINDING: usize = 3;

/// Busy event loops shown among the findings.
const BUSY_LOOPS: usize = 4;

/// A line that begins with `LATE: `, `BUSY: ` or `LOST: `, and the indented lines below it.
pub(super) struct Finding {
    summary: String,
    details: Vec<String>,
}

impl Finding {
    fn new(summary: String) -> Self {
        Self { summary, details: Vec::new() }
    }

    pub(super) fn write(&self, head: &str, out: &mut Lines<'_>) -> Result<()> {
        writeln!(out, "{head} {}", self.summary)?;
        for detail in &self.details {
            writeln!(out, "      {detail}")?;
        }
        Ok(())
    }
}

/// The first line of a report without a `LATE: ` line. That nothing was measured is not reported as good news.
pub(super) fn not_late(targets: &[Target]) -> String {
    if targets.is_empty() {
        "No process was observed: none matched the selection.".into()
    } else if let Some(unwatched) = unwatched(targets) {
        format!("Not known: {unwatched}. Nothing else is known to have waited for {} or longer.", span(LATE))
    } else if targets.iter().all(Target::is_silent) {
        "No lag was measured: the observed processes have no listener and no event loop (see --reactor-calls).".into()
    } else {
        let late = span(LATE);
        let nothing = if targets.iter().all(|target| target.reactors.is_empty()) {
            "no event loop was seen, and no connection"
        } else {
            "no event and no connection"
        };
        format!("Not late: {nothing} is known to have waited for {late} or longer.")
    }
}

/// Writes the event loops that did not look for events for long, though nothing is known to have waited for them: those
/// with the highest mean lag first.
pub(super) fn write_busy(targets: &[Target], out: &mut Lines<'_>) -> Result<()> {
    let all = targets.iter().flat_map(|target| target.reactors.iter().map(move |reactor| (target, reactor)));
    let mut busy: Vec<_> = all.filter(|(_, reactor)| reactor.lateness() == Lateness::Busy).collect();
    busy.sort_by(|(_, a), (_, b)| b.lag.mean().total_cmp(&a.lag.mean()));
    for (target, reactor) in busy.iter().take(BUSY_LOOPS) {
        let summary = format!(
            "event loop {} of {}: lag up to {}, mean {}{}; nothing is known to have waited",
            reactor_name(reactor),
            process_name(target),
            span(reactor.lag.max()),
            span(reactor.lag.mean()),
            main_culprit(&reactor.stalls),
        );
        Finding { summary, details: reasons(reactor) }.write("BUSY:", out)?;
    }
    let more = busy.len().saturating_sub(BUSY_LOOPS);
    if more > 0 {
        writeln!(out, "BUSY: {more} more event loops")?;
    }
    Ok(())
}

/// The groups of workers with the highest utilization, highest first.
pub(super) fn busiest(workers: &[Workers]) -> impl Iterator<Item = &Workers> {
    let mut workers: Vec<_> = workers.iter().collect();
    workers.sort_by(|a, b| b.utilization.unwrap_or(0.0).total_cmp(&a.utilization.unwrap_or(0.0)));
    workers.into_iter().take(BUSY_LOOPS)
}

/// What is late in a target: event loops, listeners, deferred tasks.
pub(super) fn late(target: &Target) -> Vec<Finding> {
    let reactors = target.reactors.iter().filter(|reactor| reactor.lateness() == Lateness::Late);
    let reactors = reactors.map(|reactor| late_loop(target, reactor));
    let listeners = target.listeners.iter().flat_map(|listener| late_listener(target, listener));
    reactors.chain(listeners).chain(late_tasks(target)).collect()
}

fn late_loop(target: &Target, reactor: &Reactor) -> Finding {
    let summary = format!(
        "event loop {} of {}: lag up to {}, mean {}{}",
        reactor_name(reactor),
        process_name(target),
        span(reactor.lag.max()),
        span(reactor.lag.mean()),
        main_culprit(&reactor.stalls),
    );
    Finding { summary, details: reasons(reactor) }
}

/// Why an event loop has a lag: its worst stall site, its wake-ups, and where its busy time went.
fn reasons(reactor: &Reactor) -> Vec<String> {
    let wakeup = reactor.wakeup.max();
    let woken = (reactor.stalls.sites.is_empty() && wakeup >= LATE)
        .then(|| format!("wake-ups took up to {}", span(wakeup)));
    let causes = main_causes(reactor);
    let busy = (!causes.is_empty()).then(|| format!("busy time: {causes}{}", of_which_gc(reactor)));
    main_site(&reactor.stalls).into_iter().chain(woken).chain(busy).collect()
}

fn late_listener(target: &Target, listener: &Listener) -> impl Iterator<Item = Finding> {
    let name = format!("listener {} of {}", listener.name(), process_name(target));
    let waited = (listener.wait.max() >= LATE)
        .then(|| format!("{name}: connections waited up to {} to be accepted", span(listener.wait.max())));
    let is_waiting = !listener.closed && listener.oldest_seconds.is_some_and(|age| age >= LATE);
    let waiting = is_waiting.then(|| {
        let depth = counted(listener.depth.into(), "connection");
        format!("{name}: {depth} in the accept queue now, the oldest has waited {}", oldest(listener))
    });
    let dropped = (listener.drops > 0).then(|| {
        format!(
            "{name}: the kernel dropped {} connections or segments{}",
            listener.drops,
            overflows(listener)
        )
    });
    [waited, waiting, dropped].into_iter().flatten().map(Finding::new)
}

/// Deferred tasks that started late or have not started: one finding for all kinds that late event loops held up, and
/// one for each kind whose oldest task is overdue.
fn late_tasks(target: &Target) -> impl Iterator<Item = Finding> + '_ {
    let process = process_name(target);
    let lag = target.reactors.iter().map(|reactor| reactor.lag.max()).fold(0.0, f64::max);
    let (overdue, others): (Vec<_>, Vec<_>) = target.deferred.iter().partition(|kind| kind.is_overdue());
    let held_up: Vec<_> = others.into_iter().filter(|kind| is_held_up(&kind.wait, lag)).collect();
    let longest = held_up.iter().max_by(|a, b| a.wait.max().total_cmp(&b.wait.max()));
    let held_up = longest.map(|longest| {
        let others = match held_up.len() - 1 {
            0 => String::new(),
            1 => " and 1 more kind".into(),
            more => format!(" and {more} more kinds"),
        };
        let summary = format!(
            "deferred tasks {}{others} of {process}: waited up to {} to start, median {}",
            longest.task,
            span(longest.wait.max()),
            span(longest.wait.quantile(0.5).unwrap_or(0.0)),
        );
        Finding {
            summary,
            details: vec![format!("the event loops of the process had a lag of up to {}", span(lag))],
        }
    });
    let overdue = overdue.into_iter().map(move |kind| {
        let summary = format!(
            "deferred tasks {} of {process}: {} pending, the oldest enqueued {} ago",
            kind.task,
            kind.pending,
            span(kind.oldest_seconds.unwrap_or(0.0)),
        );
        let usual = format!("tasks of this kind that started had waited at most {}", span(kind.wait.max()));
        Finding { summary, details: vec![usual] }
    });
    held_up.into_iter().chain(overdue)
}

/// Deferred tasks that will never run, one finding for each kind.
pub(super) fn dropped_tasks(target: &Target) -> impl Iterator<Item = Finding> + '_ {
    let kinds = target.deferred.iter().filter(|kind| kind.dropped(kind.orphaned) > 0);
    let exited = if target.exited { ", exited" } else { "" };
    kinds.map(move |kind| {
        Finding::new(format!(
            "deferred tasks {} of {}{exited}: {} of {} were dropped before they started",
            kind.task,
            process_name(target),
            kind.orphaned,
            kind.enqueued
        ))
    })
}

/// The causes that take at least a tenth of the busy time, largest first.
fn main_causes(reactor: &Reactor) -> String {
    let mut parts = shares(&reactor.split_seconds);
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let parts: Vec<_> = parts.into_iter().filter(|(_, share)| *share >= 0.1).map(share_of).collect();
    parts.join(", ")
}

/// `62.0 % of the lag: asleep (clock_nanosleep) in sleep (app/db.py:12) < handle (app/server.py:40)`, of the site with
/// the largest share of the lag.
fn main_site(stalls: &Stalls) -> Option<String> {
    let site = stalls.sites.first()?;
    let stack = stack(&site.sample, FRAMES_OF_FINDING);
    Some(format!("{} of the lag: {} {stack}", percent(site.lag_share), site_cause(site)))
}
