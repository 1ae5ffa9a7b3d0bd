//! The text report. Its first lines answer: is the server late, and whose fault is it? The details follow.

mod phrases;
mod findings;
mod details;

use std::{collections::BTreeSet, io::Write};

use anyhow::Result;

use super::words::{self, span};
use crate::{
    model::{
        late::Lateness,
        snapshot::{Reactor, Snapshot, Target},
    },
    sanitize::Lines,
};

use details::{write_target, write_workers};
use findings::{Finding, busiest, dropped_tasks, late, not_late, write_busy};

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
    write_names("not late, beside the workers or gone within a second", &brief, out)?;
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
            !text.contains("event loop reactor") && text.contains("gone within a second: 1 (app)"),
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
