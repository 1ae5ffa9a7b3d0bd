//! The text report. Its first lines answer: is the server late, and whose fault is it? The details follow.
//! What is LATE is decided in `model/late.rs`; the first screen of the live view is in `live/verdict.rs`.

use std::{cmp::Reverse, collections::BTreeSet, io::Write};

use anyhow::Result;

use super::words::{
    self, cause_name, counted, for_requests, main_culprit, oldest, percent, reactor_name, request_name,
    site_cause, span, stack, unwatched,
};
use crate::{
    model::{
        busy::{Cause, Split},
        deferred::{Deferred, is_held_up},
        frame::StackSample,
        histogram::Histogram,
        late::{LATE, Lateness},
        snapshot::{Gc, Listener, Reactor, Snapshot, Target, Workers},
        stall::Stalls,
    },
    sanitize::Lines,
};

/// Functions shown of the current stack, and of the stack of each stall site, innermost first.
const FRAMES: usize = 8;
const FRAMES_OF_SITE: usize = 4;

/// Functions shown of a stack if the function to blame is further out than the others that are shown.
const FRAMES_MAX: usize = 16;

/// Functions shown of the stack that a finding blames, innermost first.
const FRAMES_OF_FINDING: usize = 3;

/// Kinds of deferred tasks shown for each process.
const KINDS: usize = 6;

/// Stall sites shown for each event loop.
const SITES: usize = 4;

/// Unmatched starts from which on a mismatch between the hooks of a profile is no coincidence.
const MANY_UNMATCHED: u64 = 10;

/// Busy event loops shown among the findings.
const BUSY_LOOPS: usize = 4;

/// A line that begins with `LATE: `, `BUSY: ` or `LOST: `, and the indented lines below it.
struct Finding {
    summary: String,
    details: Vec<String>,
}

impl Finding {
    fn new(summary: String) -> Self {
        Self { summary, details: Vec::new() }
    }

    fn write(&self, head: &str, out: &mut Lines<'_>) -> Result<()> {
        writeln!(out, "{head} {}", self.summary)?;
        for detail in &self.details {
            writeln!(out, "      {detail}")?;
        }
        Ok(())
    }
}

/// Writes the report.
pub(crate) fn write(snapshot: &Snapshot, out: &mut impl Write) -> Result<()> {
    let out = &mut Lines(out);
    let own = &snapshot.own;
    writeln!(
        out,
        "observer {} on Linux {}, observed for {} from {}",
        own.version,
        own.kernel,
        span(snapshot.duration_seconds),
        snapshot.started
    )?;
    writeln!(out)?;
    let late: Vec<Finding> = snapshot.targets.iter().flat_map(late).collect();
    if late.is_empty() {
        writeln!(out, "{}", not_late(&snapshot.targets))?;
    }
    for finding in &late {
        finding.write("LATE:", out)?;
    }
    write_busy(&snapshot.targets, out)?;
    for group in busiest(&snapshot.workers) {
        writeln!(out, "WORKERS: {}", words::workers(group))?;
    }
    for finding in snapshot.targets.iter().flat_map(dropped_tasks) {
        finding.write("LOST:", out)?;
    }
    for group in &snapshot.workers {
        write_workers(group, out)?;
    }
    let others = snapshot.targets.iter().filter(|target| !target.is_only_worker());
    let (brief, others): (Vec<_>, Vec<_>) = others.partition(|target| is_folded(target, snapshot));
    let (silent, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|target| target.is_silent());
    for target in others {
        write_target(target, out)?;
    }
    write_names("without an event loop or a listener", &silent, out)?;
    write_names(
        "not late, of the programs of the workers or with a life of less than a second",
        &brief,
        out,
    )?;
    for lost in own.lost.iter().filter(|lost| lost.count > 0) {
        writeln!(out)?;
        writeln!(out, "Incomplete data: {} ({} times)", lost.cause, lost.count)?;
    }
    for missing in &own.missing {
        writeln!(out)?;
        writeln!(out, "Not observed: {} ({})", missing.source, missing.reason)?;
    }
    Ok(())
}

/// Life of a process in seconds below which it is not reported by itself.
const BRIEF: f64 = 1.0;

/// Whether a process is only counted: another process of a group of workers, or a child that exited at once. Nothing
/// that was late or dropped is left out.
fn is_folded(target: &Target, snapshot: &Snapshot) -> bool {
    let is_calm = target.loops().all(|reactor| reactor.lateness() == Lateness::InTime);
    let is_child = || snapshot.targets.iter().any(|other| other.pid == target.parent);
    let was_brief = |reactor: &Reactor| reactor.busy_seconds + reactor.wait_seconds < BRIEF;
    let is_of_workers = snapshot.workers.iter().any(|workers| workers.has(target));
    let is_brief = target.exited && target.reactors.iter().all(was_brief) && is_child();
    is_calm && target.listeners.is_empty() && target.deferred.is_empty() && (is_of_workers || is_brief)
}

/// Writes how many processes there are that have no part of their own, and the names of some.
fn write_names(which: &str, targets: &[&Target], out: &mut Lines<'_>) -> Result<()> {
    if targets.is_empty() {
        return Ok(());
    }
    let names: BTreeSet<&str> = targets.iter().map(|target| target.comm.as_str()).collect();
    let names: Vec<&str> = names.into_iter().take(4).collect();
    writeln!(out)?;
    writeln!(out, "Also observed, {which}: {} ({})", targets.len(), names.join(", "))?;
    Ok(())
}

/// The first line of a report without a `LATE: ` line. That nothing was measured is not reported as good news.
fn not_late(targets: &[Target]) -> String {
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
fn write_busy(targets: &[Target], out: &mut Lines<'_>) -> Result<()> {
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
fn busiest(workers: &[Workers]) -> impl Iterator<Item = &Workers> {
    let mut workers: Vec<_> = workers.iter().collect();
    workers.sort_by(|a, b| b.utilization.unwrap_or(0.0).total_cmp(&a.utilization.unwrap_or(0.0)));
    workers.into_iter().take(BUSY_LOOPS)
}

/// What is late in a target: event loops, listeners, deferred tasks.
fn late(target: &Target) -> Vec<Finding> {
    let reactors = target.reactors.iter().filter(|reactor| reactor.lateness() == Lateness::Late);
    let reactors = reactors.map(|reactor| late_loop(target, reactor));
    let listeners = target.listeners.iter().flat_map(|listener| late_listener(target, listener));
    reactors.chain(listeners).chain(late_tasks(target)).collect()
}

/// `app (10)`.
fn process_name(target: &Target) -> String {
    format!("{} ({})", target.comm, target.pid)
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
fn dropped_tasks(target: &Target) -> impl Iterator<Item = Finding> + '_ {
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

fn write_workers(workers: &Workers, out: &mut Lines<'_>) -> Result<()> {
    writeln!(out)?;
    writeln!(out, "workers of {} ({})  {}", workers.comm, workers.parent, workers.exe)?;
    let exited = if workers.exited > 0 { format!("; {} exited", workers.exited) } else { String::new() };
    writeln!(out, "    processes   {} running, {} busy{exited}", workers.running, workers.busy)?;
    if let Some(utilization) = workers.utilization {
        let shares: Vec<_> = shares(&workers.split_seconds).into_iter().map(share_of).collect();
        writeln!(out, "    busy        {} of their time: {}", percent(utilization), shares.join(", "))?;
    }
    writeln!(out, "    slices      {}", count_and_quantiles(&workers.slice))?;
    write_stalls(&workers.stalls, "their stalls", out)
}

fn write_target(target: &Target, out: &mut Lines<'_>) -> Result<()> {
    let exited = if target.exited { ", exited" } else { "" };
    let workload = words::workload(&target.workload);
    writeln!(out)?;
    writeln!(out, "process {}{workload}{exited}  {}", process_name(target), target.exe)?;
    for reactor in target.loops() {
        write_reactor(reactor, out)?;
    }
    if let Some(gc) = target.gc.as_ref().filter(|gc| gc.count > 0) {
        write_gc(gc, out)?;
    }
    for listener in &target.listeners {
        write_listener(listener, out)?;
    }
    write_deferred(target, out)
}

/// Writes the most important kinds of deferred tasks: those with dropped tasks, with known origins, with most tasks.
fn write_deferred(target: &Target, out: &mut Lines<'_>) -> Result<()> {
    let mut kinds: Vec<&Deferred> = target.deferred.iter().collect();
    kinds.sort_by_key(|kind| Reverse((kind.orphaned.min(1), kind.links.len(), kind.enqueued + kind.pending)));
    for kind in kinds.iter().take(KINDS) {
        writeln!(out, "  deferred tasks {}", kind.task)?;
        let oldest = kind.oldest_seconds.map(|age| format!(", the oldest enqueued {} ago", span(age)));
        writeln!(
            out,
            "    tasks       {} enqueued, {} started, {} finished; {} pending{}",
            kind.enqueued,
            kind.started,
            kind.finished,
            kind.pending,
            oldest.unwrap_or_default()
        )?;
        if kind.orphaned > 0 {
            let timers = if kind.is_kind_known { "" } else { "; cancelled timers are counted here" };
            writeln!(out, "                {} dropped before they started{timers}", kind.orphaned)?;
        }
        if kind.wait.count() > 0 {
            writeln!(out, "    waits       {}", count_and_quantiles(&kind.wait))?;
        }
        if kind.run.count() > 0 {
            writeln!(out, "    runs        {}", count_and_quantiles(&kind.run))?;
        }
        if let Some(slowest) = kind.links.iter().max_by(|a, b| a.wait_seconds.total_cmp(&b.wait_seconds)) {
            writeln!(
                out,
                "    origins     {}; the longest wait was {}, for {}",
                counted(requests(kind), "request"),
                span(slowest.wait_seconds),
                request_name(&slowest.origin)
            )?;
        }
    }
    match kinds.len().saturating_sub(KINDS) {
        0 => {}
        1 => writeln!(out, "  deferred tasks of 1 more kind")?,
        more => writeln!(out, "  deferred tasks of {more} more kinds")?,
    }
    write_unmatched(target, out)
}

/// Writes how many tasks started without having been enqueued, and why that can be.
fn write_unmatched(target: &Target, out: &mut Lines<'_>) -> Result<()> {
    if target.unmatched == 0 {
        return Ok(());
    }
    let has_started = target.deferred.iter().any(|kind| kind.started > 0);
    let has_enqueued = target.deferred.iter().any(|kind| kind.enqueued > 0);
    writeln!(out, "  unmatched     {} task starts, origin unknown", target.unmatched)?;
    let reason = if target.unmatched >= MANY_UNMATCHED && !has_started && has_enqueued {
        ["no enqueued task has started: the keys of the profile's", "snapshot and restore hooks do not match"]
    } else {
        [
            "the tasks were enqueued before observer attached, or are repeated callbacks that were",
            "registered before, such as those of listeners and of connections that were open",
        ]
    };
    for line in reason {
        writeln!(out, "                {line}")?;
    }
    Ok(())
}

/// Number of distinct origins of the latest tasks of a kind.
fn requests(kind: &Deferred) -> u64 {
    let ids: BTreeSet<_> = kind.links.iter().map(|link| link.origin.id).collect();
    ids.len() as u64
}

fn write_reactor(reactor: &Reactor, out: &mut Lines<'_>) -> Result<()> {
    let exited = if reactor.exited { ", exited" } else { "" };
    writeln!(out, "  event loop {}{exited}", reactor_name(reactor))?;
    let quantiles = quantiles(&reactor.lag).map(|text| format!(", {text}")).unwrap_or_default();
    writeln!(out, "    lag         mean {}{quantiles}", span(reactor.lag.mean()))?;
    writeln!(out, "    slices      {}", count_and_quantiles(&reactor.slice))?;
    if let Some(age) = reactor.current_slice_seconds.filter(|&age| age >= LATE) {
        writeln!(out, "                the current slice has lasted {} so far", span(age))?;
    }
    if let Some(sample) = &reactor.current_stack {
        write_stack(sample, FRAMES, out)?;
    }
    write_stalls(&reactor.stalls, "the lag", out)?;
    if let Some(utilization) = reactor.utilization {
        let shares: Vec<_> = shares(&reactor.split_seconds).into_iter().map(share_of).collect();
        writeln!(
            out,
            "    busy        {} of the time: {}{}",
            percent(utilization),
            shares.join(", "),
            of_which_gc(reactor)
        )?;
    }
    writeln!(out, "    waits       {}, {}", reactor.waits, counted(reactor.events, "event"))?;
    if reactor.event_delay.count() > 0 {
        writeln!(out, "    delays      {} (upper bounds)", count_and_quantiles(&reactor.event_delay))?;
    }
    if reactor.events_delayed > 0 {
        let waited = counted(reactor.events_delayed, "event");
        writeln!(out, "                {waited} had waited when the loop looked for them")?;
    }
    if reactor.wakeup.count() > 0 {
        writeln!(out, "    wake-ups    {}", count_and_quantiles(&reactor.wakeup))?;
    }
    Ok(())
}

fn write_gc(gc: &Gc, out: &mut Lines<'_>) -> Result<()> {
    match (&gc.pause, gc.seconds) {
        (Some(pause), _) => {
            let quantiles = quantiles(pause).map(|text| format!(": {text}")).unwrap_or_default();
            writeln!(out, "  gc            {} pauses{quantiles}", gc.count)?;
        }
        (None, Some(seconds)) => {
            writeln!(out, "  gc            {}, {} in total", counted(gc.count, "collection"), span(seconds))?;
        }
        (None, None) => {
            writeln!(out, "  gc            {} of unknown length", counted(gc.count, "collection"))?;
        }
    }
    Ok(())
}

/// Writes a stack, one function a line, at most `limit` of them.
fn write_stack(sample: &StackSample, limit: usize, out: &mut Lines<'_>) -> Result<()> {
    let culprit = sample.culprit().unwrap_or(0);
    let shown = limit.max(culprit + 1).min(FRAMES_MAX);
    for (n, frame) in sample.frames.iter().take(shown).enumerate() {
        let relation = if n == 0 { "in " } else { "by " };
        writeln!(out, "                {relation} {frame}")?;
    }
    if culprit > shown {
        writeln!(out, "                ...")?;
    }
    if let Some(frame) = sample.frames.get(culprit).filter(|_| culprit >= shown) {
        writeln!(out, "                by  {frame}")?;
    }
    let more = sample.frames.len().saturating_sub(shown.max(culprit + 1));
    if more > 0 {
        writeln!(out, "                and {more} more")?;
    }
    if let Some(reason) = words::missing_stack(sample) {
        writeln!(out, "                {reason}")?;
    }
    Ok(())
}

fn write_listener(listener: &Listener, out: &mut Lines<'_>) -> Result<()> {
    let closed = if listener.closed { ", closed" } else { "" };
    writeln!(out, "  listener {}{closed}", listener.name())?;
    writeln!(out, "    queue       {}", words::queue(listener))?;
    if listener.oldest_seconds.is_some() {
        writeln!(out, "    oldest      has waited {}", oldest(listener))?;
    }
    if listener.half_open > 0 {
        writeln!(out, "    handshakes  {} in progress", listener.half_open)?;
    }
    write!(out, "    connections {} arrived, {} accepted", listener.arrivals, listener.accepts)?;
    if listener.aborted > 0 {
        write!(out, ", {} reset while they waited", listener.aborted)?;
    }
    if listener.drops > 0 {
        write!(out, ", {} dropped{}", listener.drops, overflows(listener))?;
    }
    writeln!(out)?;
    if listener.wait.count() > 0 {
        writeln!(out, "    waits       {}", count_and_quantiles(&listener.wait))?;
    }
    if listener.accepts_unknown_wait > 0 {
        writeln!(out, "                and {} of unknown length", listener.accepts_unknown_wait)?;
    }
    Ok(())
}

/// ` (42 because the queue was full)`; empty if there were no overflows or their number is unknown.
fn overflows(listener: &Listener) -> String {
    let overflows = listener.overflows.filter(|&overflows| overflows > 0);
    overflows.map(|overflows| format!(" ({overflows} because the queue was full)")).unwrap_or_default()
}

/// Shares of busy time, in the order in which they are shown. Causes of blocking with no time are left out.
fn shares(split: &Split) -> Vec<(Cause, f64)> {
    let total = split.total().max(f64::MIN_POSITIVE);
    let all = Cause::PARTS.into_iter().map(|cause| (cause, split.of(cause) / total));
    all.filter(|(cause, share)| *share >= 0.0005 || !matches!(cause, Cause::Blocked(_))).collect()
}

/// `62.0 % asleep`.
fn share_of((cause, share): (Cause, f64)) -> String {
    format!("{} {}", percent(share), cause_name(cause))
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

/// `; of which GC 12.0 %`, a share of busy time; empty if there was no collection in it.
fn of_which_gc(reactor: &Reactor) -> String {
    let gc = reactor.split_seconds.gc;
    if gc > 0.0 { format!("; of which GC {}", percent(gc / reactor.busy_seconds)) } else { String::new() }
}

/// Writes the sites with the largest shares of `whole`, each with its stack.
fn write_stalls(stalls: &Stalls, whole: &str, out: &mut Lines<'_>) -> Result<()> {
    if stalls.count > 0 {
        writeln!(
            out,
            "    stalls      {} of {} or longer, {} in total",
            stalls.count,
            span(stalls.threshold_seconds),
            span(stalls.seconds)
        )?;
    }
    for (index, site) in stalls.sites.iter().enumerate().take(SITES) {
        writeln!(
            out,
            "      {} of {whole}: {}, {} in total, {}{}",
            percent(site.lag_share),
            counted(site.count, "stall"),
            span(site.seconds),
            site_cause(site),
            for_requests(&stalls.requests_of(index))
        )?;
        write_stack(&site.sample, FRAMES_OF_SITE, out)?;
    }
    let others = stalls.sites.iter().skip(SITES);
    let (count, share) = others.fold((0, 0.0), |sum, site| (sum.0 + site.count, sum.1 + site.lag_share));
    if count > 0 {
        writeln!(out, "      {} of {whole}: {} at other sites", percent(share), counted(count, "stall"))?;
    }
    Ok(())
}

/// `360: p50 1.20 ms, p99 80.0 ms, max 121 ms`.
fn count_and_quantiles(histogram: &Histogram) -> String {
    let quantiles = quantiles(histogram).map(|text| format!(": {text}")).unwrap_or_default();
    format!("{}{quantiles}", histogram.count())
}

/// `p50 1.20 ms, p99 80.0 ms, max 121 ms`; `None` if the histogram is empty.
fn quantiles(histogram: &Histogram) -> Option<String> {
    let (p50, p99) = (histogram.quantile(0.5)?, histogram.quantile(0.99)?);
    Some(format!("p50 {}, p99 {}, max {}", span(p50), span(p99), span(histogram.max())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::live::testing,
        model::{
            snapshot::{Duty, Missing},
            workers,
        },
        sanitize::is_shown,
    };

    fn report(snapshot: &Snapshot) -> String {
        let mut text = Vec::new();
        write(snapshot, &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_stall_shows_its_cause_and_request() {
        let text = report(&testing::snapshot(5.0, |reactor| testing::slept(reactor, 3)));
        assert!(
            text.contains("3 stalls, 360 ms in total, asleep (clock_nanosleep) for GET /job/7\n"),
            "{text}"
        );
    }

    #[test]
    fn workers_are_one_group_and_brief_processes_one_line() {
        let mut snapshot = testing::snapshot(5.0, |reactor| testing::slept(reactor, 3));
        let mut worker = snapshot.targets.remove(0);
        worker.listeners.clear();
        worker.parent = 7;
        worker.reactors[0].duty = Duty::OneConnection;
        let mut idle = worker.clone();
        idle.reactors = testing::snapshot(5.0, |_| {}).targets.remove(0).reactors;
        let processes = [(10, &worker), (11, &worker), (12, &idle)];
        snapshot.targets = processes.map(|(pid, target)| Target { pid, ..target.clone() }).into();
        snapshot.workers = workers::group(&mut snapshot.targets);
        let text = report(&snapshot);
        assert!(text.contains("\nNot late: "), "{text}");
        assert!(text.contains("\nWORKERS: app (7): 0 of 2 busy now; busy 8.3 % of the time\n"), "{text}");
        assert!(
            text.contains("\nworkers of app (7)  /usr/bin/app\n    processes   2 running, 0 busy\n"),
            "{text}"
        );
        assert!(text.contains(" of their stalls: 6 stalls, 720 ms in total, asleep"), "{text}");
        assert!(
            !text.contains("event loop reactor") && text.contains("less than a second: 1 (app)"),
            "{text}"
        );
    }

    #[test]
    fn a_busy_loop_is_late_only_if_something_waited() {
        let head = "event loop reactor (thread 11) of app (10): lag up to 120 ms, mean 64.3 ms";
        let late = report(&testing::snapshot(5.0, |reactor| testing::slept(reactor, 3)));
        assert!(
            late.contains(&format!("\nLATE: {head}, 80.0 % in sleep (app/db.py:12)\n"))
                && !late.contains("Not late"),
            "{late}"
        );
        let busy = report(&testing::snapshot(5.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.stalls.late = 0;
        }));
        assert!(busy.contains("\nNot late: ") && !busy.contains("LATE: "), "{busy}");
        let lines = format!(
            "\nBUSY: {head}, 80.0 % in sleep (app/db.py:12); nothing is known to have waited\n      80.0 % of the lag: asleep"
        );
        assert!(busy.contains(&lines), "{busy}");
    }

    #[test]
    fn names_cannot_steer_the_terminal_or_forge_lines() {
        const EVIL: &str = "\u{1b}]0;x\u{7}\u{9b}2J\nLATE: \u{202e}all";
        let mut snapshot = testing::snapshot(5.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.name = EVIL.into();
            let site = &mut reactor.stalls.sites[0];
            site.syscall = Some(EVIL.into());
            site.sample.frames[0].function = EVIL.into();
        });
        let target = &mut snapshot.targets[0];
        (target.comm, target.exe, target.workload.unit) = (EVIL.into(), EVIL.into(), Some(EVIL.into()));
        target.deferred = vec![testing::kind(EVIL, 50)];
        let missing = Missing { source: EVIL.into(), reason: EVIL.into() };
        snapshot.own.missing.push(missing);
        let harmless =
            |text: &str| EVIL.chars().filter(|c| !is_shown(*c)).all(|c| c == '\n' || !text.contains(c));
        let text = report(&snapshot);
        assert!(harmless(&text), "{text:?}");
        assert!(text.contains("\u{fffd}]0;x\u{fffd}\u{fffd}2J\u{fffd}LATE: \u{fffd}all"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("LATE: \u{fffd}")).count(), 0, "{text}");
    }

    #[test]
    fn late_and_dropped_tasks_are_found_and_cancelled_timers_are_not() {
        let mut snapshot = testing::snapshot(5.0, |reactor| testing::slept(reactor, 3));
        let mut mail = testing::kind("mail", 50);
        mail.wait = testing::histogram(&[(1, 90), (110, 10)]);
        let mut sweep = testing::kind("sweep", 0);
        (sweep.wait, sweep.oldest_seconds) = (testing::histogram(&[(110, 100)]), Some(3600.0));
        let mut any = testing::kind("asyncio work", 500);
        (any.is_kind_known, any.started, any.wait) = (false, 0, testing::histogram(&[]));
        snapshot.targets[0].deferred = vec![mail, sweep, any];
        let text = report(&snapshot);
        let found = |head: &str| {
            let mut lines = text.lines().peekable();
            let mut found = Vec::new();
            while let Some(line) = lines.next() {
                if line.starts_with(head) {
                    let details = std::iter::from_fn(|| lines.next_if(|line| line.starts_with("      ")));
                    found.push(std::iter::once(line).chain(details).collect::<Vec<_>>().join("\n"));
                }
            }
            found
        };
        let all_of = |finding: &str, parts: &[&str]| {
            parts.iter().for_each(|part| assert!(finding.contains(part), "{part} is missing: {text}"));
        };
        let (late, lost) = (found("LATE: "), found("LOST: "));
        assert_eq!((late.len(), lost.len()), (3, 1), "{text}");
        all_of(&late[0], &["event loop reactor (thread 11) of app (10)", "120 ms", "64.3 ms"]);
        all_of(&late[0], &["80.0 % of the lag", "asleep (clock_nanosleep) in sleep (app/db.py:12) < handle"]);
        all_of(&late[0], &["80.0 % asleep, 20.0 % on a CPU"]);
        all_of(&late[1], &["deferred tasks mail of app (10)", "110 ms", "1.02 ms", "lag of up to 120 ms"]);
        all_of(&late[2], &["deferred tasks sweep of app (10)", "0 pending", "3600 s ago", "at most 110 ms"]);
        all_of(&lost[0], &["deferred tasks mail of app (10)", "10 of 60 were dropped"]);
        assert!(text.contains("100 dropped before they started; cancelled timers"), "{text}");
        assert!(!text.contains("unmatched"), "{text}");
        (snapshot.targets[0].unmatched, snapshot.targets[0].exited) = (7, true);
        let text = report(&snapshot);
        assert!(text.contains("  unmatched     7 task starts") && text.contains("before observer attached"));
        assert!(text.contains("LOST: deferred tasks mail of app (10), exited: "), "{text}");
        // No enqueued task has started, though many starts were seen.
        snapshot.targets[0].unmatched = 20;
        snapshot.targets[0].deferred.iter_mut().for_each(|kind| kind.started = 0);
        assert!(report(&snapshot).contains("snapshot and restore hooks do not match"));
    }

    #[test]
    fn a_late_listener_shows_its_queue_and_drops() {
        let mut snapshot = testing::snapshot(5.0, |_| {});
        assert!(report(&snapshot).contains("Not late: "));
        snapshot.targets[0].unwatched_waits = Some("select");
        let unwatched = report(&snapshot);
        assert!(!unwatched.contains("Not late"), "{unwatched}");
        assert!(unwatched.contains("Not known: app (10) waits for events with select"), "{unwatched}");
        snapshot.targets[0].unwatched_waits = None;
        let listener = &mut snapshot.targets[0].listeners[0];
        (listener.limit, listener.depth, listener.oldest_seconds) = (4, 5, Some(5.5));
        (listener.drops, listener.overflows, listener.oldest_is_lower_bound) = (43, Some(42), true);
        let text = report(&snapshot);
        for line in [
            "LATE: listener 127.0.0.1:8080 of app (10): 5 connections in the accept queue now, the oldest has waited at least 5.50 s\n",
            "LATE: listener 127.0.0.1:8080 of app (10): the kernel dropped 43 connections or segments (42 because the queue was full)\n",
            "    queue       depth 5, limit 4 (FULL), peak 9\n",
            "    connections 100 arrived, 100 accepted, 43 dropped (42 because the queue was full)\n",
        ] {
            assert!(text.contains(line), "{line} is missing: {text}");
        }
        snapshot.targets.clear();
        assert!(report(&snapshot).contains("No process was observed"));
    }
}
