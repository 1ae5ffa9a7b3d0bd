//! The report for people. The first lines answer: is it late, and whose fault is it?

use std::{cmp::Reverse, collections::BTreeSet, io::Write};

use anyhow::Result;

use super::words::{self, due_to, named, percent, reactor_name, request_name, span};
use crate::{
    model::{
        busy::Cause,
        deferred::{Deferred, is_held_up},
        frame::Look,
        histogram::Histogram,
        lag::LATE,
        snapshot::{Gc, Listener, Reactor, Snapshot, Target},
        stall::Stalls,
    },
    sanitize::Lines,
};

/// Functions of a stack that are shown, innermost first: of one that is stuck now, and of one that was.
const FRAMES: usize = 8;
const FRAMES_OF_SITE: usize = 4;

/// Kinds of deferred work that are shown of each process.
const KINDS: usize = 6;

/// Places in the code that are shown of each event loop.
const SITES: usize = 4;

/// Writes the report.
pub(crate) fn write(snapshot: &Snapshot, out: &mut impl Write) -> Result<()> {
    let out = &mut Lines(out);
    let own = &snapshot.own;
    writeln!(
        out,
        "observer {} on Linux {}, {} observed from {}",
        own.version,
        own.kernel,
        span(snapshot.duration_seconds),
        snapshot.started
    )?;
    writeln!(out)?;
    let findings: Vec<String> = snapshot.targets.iter().flat_map(findings).collect();
    if findings.is_empty() {
        writeln!(out, "{}", not_late(&snapshot.targets))?;
    }
    for finding in &findings {
        writeln!(out, "LATE: {finding}")?;
    }
    for dropped in snapshot.targets.iter().flat_map(dropped) {
        writeln!(out, "LOST: {dropped}")?;
    }
    let (silent, telling): (Vec<_>, Vec<_>) = snapshot.targets.iter().partition(|target| target.is_silent());
    for target in telling {
        write_target(target, out)?;
    }
    if !silent.is_empty() {
        let names: BTreeSet<&str> = silent.iter().map(|target| target.comm.as_str()).collect();
        let names: Vec<&str> = names.into_iter().take(4).collect();
        writeln!(out)?;
        writeln!(
            out,
            "Also observed, without an event loop or a listener: {} ({})",
            silent.len(),
            names.join(", ")
        )?;
    }
    for lost in own.lost.iter().filter(|lost| lost.count > 0) {
        writeln!(out)?;
        writeln!(out, "Not everything could be kept: {} ({} times)", lost.cause, lost.count)?;
    }
    for missing in &own.missing {
        writeln!(out)?;
        writeln!(out, "Not seen here: {} ({})", missing.source, missing.reason)?;
    }
    Ok(())
}

/// What is said where nothing is late: that nothing was there to be late is no good news.
fn not_late(targets: &[Target]) -> String {
    if targets.is_empty() {
        "Nobody was observed: no process that fits what was asked for was there, or came.".into()
    } else if targets.iter().all(Target::is_silent) {
        "Nothing that could be late was seen: no event loop and no listener.".into()
    } else {
        let late = span(LATE);
        format!("Not late: no event loop was away for {late} or more, no connection waited that long.")
    }
}

/// What is late about a target, one sentence each.
fn findings(target: &Target) -> Vec<String> {
    let who = format!("{} ({})", target.comm, target.pid);
    let reactors = target.reactors.iter().filter(|r| r.lag.max() >= LATE).map(|r| {
        format!(
            "event loop {} of {who} was up to {} late, {} on average; its busy time went {}{}",
            reactor_name(r),
            span(r.lag.max()),
            span(r.lag.mean()),
            main_cause(r) + &of_which_gc(r),
            culprit(r)
        )
    });
    let waits = target.listeners.iter().filter(|l| l.wait.max() >= LATE).map(|l| {
        format!("connections to {} of {who} waited up to {} to be accepted", l.name(), span(l.wait.max()))
    });
    let open = target.listeners.iter().filter(|l| !l.closed);
    let stuck = open.filter(|l| l.oldest_seconds.is_some_and(|age| age >= LATE)).map(|l| {
        format!("{} of {who} has {} connections waiting, the oldest for {}", l.name(), l.depth, oldest(l))
    });
    let dropped = target.listeners.iter().filter(|l| l.drops > 0);
    let dropped = dropped.map(|l| format!("{} of {who} had {} connections dropped", l.name(), l.drops));
    reactors.chain(waits).chain(stuck).chain(dropped).chain(late_work(target)).collect()
}

/// Which deferred work of a target started later than it should: in one sentence what late event loops held up, and one for
/// each kind that has not started at all.
fn late_work(target: &Target) -> impl Iterator<Item = String> + '_ {
    let who = format!("{} ({})", target.comm, target.pid);
    let lag = target.reactors.iter().map(|reactor| reactor.lag.max()).fold(0.0, f64::max);
    let (overdue, others): (Vec<_>, Vec<_>) = target.deferred.iter().partition(|kind| kind.is_overdue());
    let held_up: Vec<_> = others.into_iter().filter(|kind| is_held_up(&kind.wait, lag)).collect();
    let longest = held_up.iter().max_by(|a, b| a.wait.max().total_cmp(&b.wait.max()));
    let held_up = longest.map(|longest| {
        let others = match held_up.len() - 1 {
            0 => String::new(),
            1 => " and one more kind".into(),
            more => format!(" and {more} more kinds"),
        };
        format!(
            "deferred work {}{others} of {who} started up to {} after it was put off, half of it within {}; event loops were up to {} late",
            longest.task,
            span(longest.wait.max()),
            span(longest.wait.quantile(0.5).unwrap_or(0.0)),
            span(lag)
        )
    });
    let overdue = overdue.into_iter().map(move |kind| {
        let (oldest, most) = (span(kind.oldest_seconds.unwrap_or(0.0)), span(kind.wait.max()));
        let pending = kind.pending;
        format!(
            "deferred work {} of {who} has {pending} pending, the oldest for {oldest}; no other waited for more than {most}",
            kind.task
        )
    });
    held_up.into_iter().chain(overdue)
}

/// What a target was to do and never will, one sentence each.
fn dropped(target: &Target) -> impl Iterator<Item = String> + '_ {
    let kinds = target.deferred.iter().filter(|kind| kind.dropped(kind.orphaned) > 0);
    let because = if target.exited { ", which has ended," } else { "" };
    kinds.map(move |kind| {
        let count = format!("{} of {} pieces", kind.orphaned, kind.enqueued);
        let who = format!("{} ({}){because}", target.comm, target.pid);
        format!("{count} of deferred work {} of {who} were forgotten before they started", kind.task)
    })
}

fn write_target(target: &Target, out: &mut Lines<'_>) -> Result<()> {
    let gone = if target.exited { ", exited" } else { "" };
    let place = words::place(&target.place);
    writeln!(out)?;
    writeln!(out, "{}, process {}{place}{gone}  {}", target.comm, target.pid, target.exe)?;
    for reactor in &target.reactors {
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

/// What matters most of deferred work: the kinds of which most waits, or has run.
fn write_deferred(target: &Target, out: &mut Lines<'_>) -> Result<()> {
    let mut kinds: Vec<&Deferred> = target.deferred.iter().collect();
    kinds.sort_by_key(|kind| Reverse((kind.orphaned.min(1), kind.links.len(), kind.enqueued + kind.pending)));
    for kind in kinds.iter().take(KINDS) {
        writeln!(out, "  deferred work {}", kind.task)?;
        let oldest =
            kind.oldest_seconds.map(|age| format!(", the oldest for {}", span(age))).unwrap_or_default();
        writeln!(
            out,
            "    pieces      {} put off, {} started, {} ended; {} pending{oldest}",
            kind.enqueued, kind.started, kind.finished, kind.pending
        )?;
        if kind.orphaned > 0 {
            let timers = if kind.is_kind_known { "" } else { ", as timers are that are cancelled" };
            writeln!(out, "                {} were forgotten before they started{timers}", kind.orphaned)?;
        }
        if kind.wait.count() > 0 {
            writeln!(out, "    waits       {}{}", kind.wait.count(), quantiles(&kind.wait))?;
        }
        if kind.run.count() > 0 {
            writeln!(out, "    runs        {}{}", kind.run.count(), quantiles(&kind.run))?;
        }
        if let Some(slowest) = kind.links.iter().max_by(|a, b| a.wait_seconds.total_cmp(&b.wait_seconds)) {
            writeln!(
                out,
                "    for         {} requests; longest waited {} after {}",
                requests(kind),
                span(slowest.wait_seconds),
                request_name(&slowest.origin)
            )?;
        }
    }
    let more = kinds.len().saturating_sub(KINDS);
    if more > 0 {
        let kinds = if more == 1 { "kind" } else { "kinds" };
        writeln!(out, "  deferred work of {more} more {kinds}")?;
    }
    /// Times, from which on it is no coincidence.
    const ENOUGH: u64 = 10;
    let has_started = target.deferred.iter().any(|kind| kind.started > 0);
    if target.unmatched >= ENOUGH && !has_started && target.deferred.iter().any(|kind| kind.enqueued > 0) {
        writeln!(
            out,
            "  deferred work went on {} times, and none of what was put off ever did: what a snapshot and a restore of the profile are known by does not meet",
            target.unmatched
        )?;
    } else if target.unmatched > 0 {
        writeln!(
            out,
            "  deferred work went on {} times without being known: it was put off before observer came, perhaps to be called again and again, as callbacks of listeners and of older connections are; for whom is not known either",
            target.unmatched
        )?;
    }
    Ok(())
}

/// How many requests the latest pieces are due to.
fn requests(kind: &Deferred) -> usize {
    kind.links.iter().map(|link| link.origin.id).collect::<BTreeSet<_>>().len()
}

fn write_reactor(reactor: &Reactor, out: &mut Lines<'_>) -> Result<()> {
    let gone = if reactor.exited { ", exited" } else { "" };
    writeln!(out, "  event loop {}{gone}", reactor_name(reactor))?;
    writeln!(out, "    late        {} on average{}", span(reactor.lag.mean()), quantiles(&reactor.lag))?;
    writeln!(out, "    slices      {}{}", reactor.slices, quantiles(&reactor.slice))?;
    if let Some(age) = reactor.current_slice_seconds.filter(|&age| age >= LATE) {
        writeln!(out, "                and one that has gone on for {}", span(age))?;
    }
    if let Some(look) = &reactor.current_stack {
        write_look(look, FRAMES, out)?;
    }
    write_stalls(&reactor.stalls, out)?;
    if let Some(utilization) = reactor.utilization {
        let parts = shares(reactor);
        let parts: Vec<_> =
            parts.iter().map(|(cause, share)| format!("{} {}", named(*cause), percent(*share))).collect();
        writeln!(
            out,
            "    busy        {} of the time: {}{}",
            percent(utilization),
            parts.join(", "),
            of_which_gc(reactor)
        )?;
    }
    writeln!(out, "    waits       {}, {} events", reactor.waits, reactor.events)?;
    if reactor.wakeup.count() > 0 {
        writeln!(out, "    wake-ups    {}{}", reactor.wakeup.count(), quantiles(&reactor.wakeup))?;
    }
    Ok(())
}

fn write_gc(gc: &Gc, out: &mut Lines<'_>) -> Result<()> {
    match (&gc.pause, gc.seconds) {
        (Some(pause), _) => writeln!(out, "  gc            {} pauses{}", gc.count, quantiles(pause))?,
        (None, Some(seconds)) => {
            writeln!(out, "  gc            {} runs: {} together", gc.count, span(seconds))?
        }
        (None, None) => writeln!(out, "  gc            {} runs of unknown length", gc.count)?,
    }
    Ok(())
}

fn write_look(look: &Look, most: usize, out: &mut Lines<'_>) -> Result<()> {
    for (n, frame) in look.frames.iter().take(most).enumerate() {
        let relation = if n == 0 { "in " } else { "by " };
        writeln!(out, "                {relation} {frame}")?;
    }
    let more = look.frames.len().saturating_sub(most);
    if more > 0 {
        writeln!(out, "                and {more} more")?;
    }
    if let Some(why) = &look.missing {
        writeln!(out, "                not all is known: {why}")?;
    }
    Ok(())
}

fn write_listener(listener: &Listener, out: &mut Lines<'_>) -> Result<()> {
    let gone = if listener.closed { ", closed" } else { "" };
    writeln!(out, "  listener {}{gone}", listener.name())?;
    let full = if listener.limit > 0 && listener.depth >= listener.limit { " (FULL)" } else { "" };
    writeln!(
        out,
        "    queue       {} of {} now{full}, {} at most",
        listener.depth, listener.limit, listener.peak
    )?;
    if listener.oldest_seconds.is_some() {
        writeln!(out, "                the oldest has waited {}", oldest(listener))?;
    }
    if listener.half_open > 0 {
        writeln!(out, "    handshakes  {} not done", listener.half_open)?;
    }
    write!(out, "    connections {} arrived, {} accepted", listener.arrivals, listener.accepts)?;
    if listener.aborted > 0 {
        write!(out, ", {} reset while they waited", listener.aborted)?;
    }
    if listener.drops > 0 {
        write!(out, ", {} dropped", listener.drops)?;
    }
    if let Some(overflows) = listener.overflows.filter(|&overflows| overflows > 0) {
        write!(out, " ({overflows} by a full queue)")?;
    }
    writeln!(out)?;
    if listener.wait.count() > 0 {
        writeln!(out, "    waits       {}{}", listener.wait.count(), quantiles(&listener.wait))?;
    }
    if listener.accepts_unknown_wait > 0 {
        writeln!(out, "                and {} of unknown length", listener.accepts_unknown_wait)?;
    }
    Ok(())
}

fn oldest(listener: &Listener) -> String {
    let at_least = if listener.oldest_is_lower_bound { "at least " } else { "" };
    format!("{at_least}{}", span(listener.oldest_seconds.unwrap_or(0.0)))
}

/// Shares of busy time, in the order in which they are shown. What nothing was blocked in is left out.
fn shares(reactor: &Reactor) -> Vec<(Cause, f64)> {
    let split = &reactor.split_seconds;
    let total = split.total().max(f64::MIN_POSITIVE);
    let all = Cause::PARTS.into_iter().map(|cause| (cause, split.of(cause) / total));
    all.filter(|(cause, share)| *share >= 0.0005 || !matches!(cause, Cause::Blocked(_))).collect()
}

/// The parts of busy time that matter, largest first.
fn main_cause(reactor: &Reactor) -> String {
    let mut parts = shares(reactor);
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let parts: Vec<_> = parts
        .iter()
        .filter(|(_, share)| *share >= 0.1)
        .map(|(cause, share)| format!("{} {}", percent(*share), named(*cause)))
        .collect();
    parts.join(", ")
}

/// `; 62.0 % of the lag is in cause_sleep (app/server.py:12)`, where the code is known that has the largest share.
fn culprit(reactor: &Reactor) -> String {
    let first =
        reactor.stalls.sites.first().and_then(|site| Some((site.lag_share, site.look.frames.first()?)));
    first.map_or_else(String::new, |(share, frame)| format!("; {} of the lag is in {frame}", percent(share)))
}

/// `; of which GC 12.0 %`, a share of busy time; empty if there was no collection in it.
fn of_which_gc(reactor: &Reactor) -> String {
    let gc = reactor.split_seconds.gc;
    if gc > 0.0 { format!("; of which GC {}", percent(gc / reactor.busy_seconds)) } else { String::new() }
}

/// The places that account for most of the lag, with what was seen there.
fn write_stalls(stalls: &Stalls, out: &mut Lines<'_>) -> Result<()> {
    if stalls.count > 0 {
        writeln!(
            out,
            "    stalls      {} of {} or more, {} together",
            stalls.count,
            span(stalls.threshold_seconds),
            span(stalls.seconds)
        )?;
    }
    for (place, site) in stalls.sites.iter().enumerate().take(SITES) {
        let detail = match site.cause {
            Cause::Blocked(_) => &site.syscall,
            Cause::Runqueue => &site.behind.as_ref().map(|thread| format!("behind {thread}")),
            Cause::Cpu | Cause::Gc => &None,
        };
        let detail = detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
        writeln!(
            out,
            "      {} of the lag: {} times, {} together, {}{detail}{}",
            percent(site.lag_share),
            site.count,
            span(site.seconds),
            named(site.cause),
            due_to(&stalls.requests_of(place))
        )?;
        write_look(&site.look, FRAMES_OF_SITE, out)?;
    }
    let others = stalls.sites.iter().skip(SITES);
    let (count, share) = others.fold((0, 0.0), |sum, site| (sum.0 + site.count, sum.1 + site.lag_share));
    if count > 0 {
        writeln!(out, "      {} of the lag: {count} times, elsewhere", percent(share))?;
    }
    Ok(())
}

/// `: p50 1.2 ms, p99 80 ms, longest 121 ms`; empty if there is nothing to tell.
fn quantiles(histogram: &Histogram) -> String {
    match (histogram.quantile(0.5), histogram.quantile(0.99)) {
        (Some(p50), Some(p99)) => {
            format!(": p50 {}, p99 {}, longest {}", span(p50), span(p99), span(histogram.max()))
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{export::live::testing, model::snapshot::Missing, sanitize::is_shown};

    fn report(snapshot: &Snapshot) -> String {
        let mut text = Vec::new();
        write(snapshot, &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn stalls_are_told_with_the_request_they_were_for() {
        let text = report(&testing::snapshot(5.0, |reactor| testing::slept(reactor, 3)));
        assert!(text.contains("360 ms together, asleep (clock_nanosleep) for GET /job/7\n"), "{text}");
    }

    #[test]
    fn names_do_not_steer_the_terminal_and_are_no_lines_of_the_report() {
        const EVIL: &str = "\u{1b}]0;x\u{7}\u{9b}2J\nLATE: \u{202e}all";
        let mut snapshot = testing::snapshot(5.0, |reactor| {
            testing::slept(reactor, 3);
            reactor.name = EVIL.into();
            let site = &mut reactor.stalls.sites[0];
            site.syscall = Some(EVIL.into());
            site.look.frames[0].function = EVIL.into();
        });
        let target = &mut snapshot.targets[0];
        (target.comm, target.exe, target.place.unit) = (EVIL.into(), EVIL.into(), Some(EVIL.into()));
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
    fn late_and_forgotten_work_is_found_and_timers_are_no_fault() {
        let mut snapshot = testing::snapshot(5.0, |reactor| testing::slept(reactor, 3));
        let mut mail = testing::kind("mail", 50);
        mail.wait = testing::histogram(&[(1, 90), (110, 10)]);
        let mut sweep = testing::kind("sweep", 0);
        (sweep.wait, sweep.oldest_seconds) = (testing::histogram(&[(110, 100)]), Some(3600.0));
        let mut any = testing::kind("asyncio work", 500);
        (any.is_kind_known, any.started, any.wait) = (false, 0, testing::histogram(&[]));
        snapshot.targets[0].deferred = vec![mail, sweep, any];
        let text = report(&snapshot);
        let found = |head: &str| text.lines().filter(|line| line.starts_with(head)).collect::<Vec<_>>();
        let (late, lost) = (found("LATE: "), found("LOST: "));
        assert_eq!(late.len(), 3, "{text}");
        assert!(
            late[1].starts_with("LATE: deferred work mail of app (10) started up to 110 ms after"),
            "{text}"
        );
        assert!(late[2].contains("work sweep of app (10) has 0 pending, the oldest for 3600 s"), "{text}");
        assert_eq!(
            lost,
            ["LOST: 10 of 60 pieces of deferred work mail of app (10) were forgotten before they started"]
        );
        assert!(text.contains("100 were forgotten before they started, as timers are that are cancelled"));
        assert!(!text.contains("without being known"), "{text}");
        (snapshot.targets[0].unmatched, snapshot.targets[0].exited) = (7, true);
        assert!(report(&snapshot).contains("went on 7 times without being known: it was put off before"));
        assert!(report(&snapshot).contains("of app (10), which has ended, were forgotten"));
    }
}
