//! The details of each process and of each group of workers.

use std::{cmp::Reverse, collections::BTreeSet};

use anyhow::Result;

use super::phrases::{of_which_gc, overflows, process_name, share_of, shares};
use crate::{
    export::words::{
        self, counted, for_requests, oldest, percent, reactor_name, request_name, site_cause, span,
    },
    model::{
        deferred::Deferred,
        frame::StackSample,
        histogram::Histogram,
        late::LATE,
        snapshot::{Gc, Listener, Reactor, Target, Workers},
        stall::Stalls,
    },
    sanitize::Lines,
};

/// Functions shown of the current stack, and of the stack of each stall site, innermost first.
const FRAMES: usize = 8;
const FRAMES_OF_SITE: usize = 4;

/// Functions shown of a stack if the function to blame is further out than the others that are shown.
const FRAMES_MAX: usize = 16;

/// Kinds of deferred tasks shown for each process.
const KINDS: usize = 6;

/// Stall sites shown for each event loop.
const SITES: usize = 4;

/// Unmatched starts from which on a mismatch between the hooks of a profile is no coincidence.
const MANY_UNMATCHED: u64 = 10;

pub(super) fn write_workers(workers: &Workers, out: &mut Lines<'_>) -> Result<()> {
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

pub(super) fn write_target(target: &Target, out: &mut Lines<'_>) -> Result<()> {
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
