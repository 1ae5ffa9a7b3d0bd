//! Names, causes and numbers in the wording that the text report and the live view share.

use observer_common::block::Block;

use crate::model::{
    busy::Cause,
    frame::{RuntimeLock, StackSample},
    request::Request,
    snapshot::{Listener, Reactor, Target, Workers},
    stall::{Site, Stalls},
    workload::Workload,
};

/// Digits of a container id that are shown, as many as `docker ps` shows.
const SHORT_ID: usize = 12;

/// `reactor (thread 16451)`, or `in thread 16451` if the thread has no name; `reactor (3 threads, first 16451)`.
pub(crate) fn reactor_name(reactor: &Reactor) -> String {
    let (name, tid) = (&reactor.name, reactor.tid);
    if reactor.only_tid.is_none() {
        let threads =
            if reactor.threads == 1 { "1 thread".into() } else { format!("{} threads", reactor.threads) };
        format!("{name} ({threads}, first {tid})")
    } else if name.is_empty() {
        format!("in thread {tid}")
    } else {
        format!("{name} (thread {tid})")
    }
}

/// `uwsgi (10): 3 of 4 busy now; busy 48.0 % of the time`.
pub(crate) fn workers(workers: &Workers) -> String {
    let Workers { comm, parent, running, busy, exited, .. } = workers;
    let now =
        if *running == 0 { format!("{exited} exited") } else { format!("{busy} of {running} busy now") };
    let share = workers.utilization.map(|share| format!("; busy {} of the time", percent(share)));
    format!("{comm} ({parent}): {now}{}", share.unwrap_or_default())
}

/// What is unknown because some processes wait for events unwatched: `web (10) and 2 more wait for events with select,
/// which is not watched …`. `None` if there are no such processes.
pub(crate) fn unwatched(targets: &[Target]) -> Option<String> {
    let mut unwatched = targets.iter().filter_map(|target| Some((target, target.unwatched_waits?)));
    let (first, call) = unwatched.next()?;
    let (more, wait) = match unwatched.count() {
        0 => (String::new(), "waits"),
        more => (format!(" and {more} more"), "wait"),
    };
    Some(format!(
        "{} ({}){more} {wait} for events with {call}, which is not watched; --reactor-calls epoll,io_uring,poll,select watches it",
        first.comm, first.pid
    ))
}

/// The container, pod or systemd unit of a process, with a leading comma: `, container 0123456789ab`,
/// `, container web (0123456789ab) of pod shop/web-0`, `, nginx.service`. Empty if it has none.
pub(crate) fn workload(workload: &Workload) -> String {
    let Workload { container, kubernetes, unit } = workload;
    let id = container.as_deref().map(|id| format!("{id:.SHORT_ID$}"));
    let Some(pod) = kubernetes else {
        let container = id.map(|id| format!(", container {id}"));
        return container.or_else(|| Some(format!(", {}", unit.as_ref()?))).unwrap_or_default();
    };
    let pod_name = match (&pod.namespace, &pod.name) {
        (Some(namespace), Some(name)) => format!("pod {namespace}/{name}"),
        _ => format!("pod {}", pod.uid),
    };
    match (&pod.container, id) {
        (Some(name), Some(id)) => format!(", container {name} ({id}) of {pod_name}"),
        (None, Some(id)) => format!(", container {id} of {pod_name}"),
        (_, None) => format!(", {pod_name}"),
    }
}

/// `GET /job/7`, or the time of the request if its method and path are unknown.
pub(crate) fn request_name(request: &Request) -> String {
    match (&request.method, &request.path) {
        (Some(method), Some(path)) => format!("{method} {path}"),
        _ => format!("a request at {}", request.time),
    }
}

/// ` for GET /job/7, GET /job/3 and others`: the latest of `requests` first, each name once. Empty if there are none.
pub(crate) fn for_requests(requests: &[&Request]) -> String {
    /// Number of different requests that are named.
    const NAMED: usize = 3;
    let mut names = Vec::new();
    for name in requests.iter().rev().map(|request| request_name(request)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return String::new();
    }
    let others = if names.len() > NAMED { " and others" } else { "" };
    names.truncate(NAMED);
    format!(" for {}{others}", names.join(", "))
}

/// `asleep (clock_nanosleep)`, `waiting for a CPU (behind stress (thread 4242))`: the cause of a site's stalls, with the
/// system call or the thread that had the CPU, where it is known. `blocked by a lock (GIL, held in crunch (app/jobs.py:7))`.
pub(crate) fn site_cause(site: &Site) -> String {
    let name = cause_name(site.cause);
    if let (Cause::Blocked(Block::Lock), Some(lock)) = (site.cause, &site.sample.lock) {
        return format!("{name} ({})", runtime_lock(lock));
    }
    let detail = match site.cause {
        Cause::Blocked(_) => site.syscall.clone(),
        Cause::Runqueue => site.behind.as_ref().map(|thread| format!("behind {thread}")),
        Cause::Cpu | Cause::Gc => None,
    };
    detail.map_or_else(|| name.into(), |detail| format!("{name} ({detail})"))
}

/// `GIL, held in crunch (app/jobs.py:7)`; `GIL` if the holder is unknown.
fn runtime_lock(lock: &RuntimeLock) -> String {
    let holder = lock.holder.as_ref().map(|frame| format!(", held in {frame}"));
    format!("{}{}", lock.name, holder.unwrap_or_default())
}

/// What is to blame for most of the lag of an event loop, to follow its lag: `, 80.0 % in handle (app/server.py:40)` or
/// `, 91.0 % waiting for the GIL, held in crunch (app/jobs.py:7)`. Empty if it is unknown, or no code of the user's own.
pub(crate) fn main_culprit(stalls: &Stalls) -> String {
    let Some(site) = stalls.sites.first() else { return String::new() };
    let share = percent(site.lag_share);
    match (&site.sample.lock, site.sample.own_culprit()) {
        (Some(lock), _) if site.cause == Cause::Blocked(Block::Lock) => {
            format!(", {share} waiting for the {}", runtime_lock(lock))
        }
        (_, Some(culprit)) => format!(", {share} in {culprit}"),
        _ => String::new(),
    }
}

/// A stack on one line, innermost function first: `in sleep (app/db.py:12) < handle (app/server.py:40)`. Shows at most
/// `limit` functions, and the one to blame if it is not among them, `...` for those left out, and `?` where the rest of the
/// stack is unknown. Without any function it says why the stack is unknown.
pub(crate) fn stack(sample: &StackSample, limit: usize) -> String {
    let mut frames: Vec<String> = sample.frames.iter().take(limit).map(ToString::to_string).collect();
    match &sample.missing {
        Some(why) if frames.is_empty() => return format!("(stack unknown: {why})"),
        _ if let Some(culprit) = sample.culprit().filter(|&culprit| culprit >= limit) => {
            if culprit > limit {
                frames.push("...".into());
            }
            frames.push(sample.frames[culprit].to_string());
            if culprit + 1 < sample.frames.len() {
                frames.push("...".into());
            }
        }
        _ if sample.frames.len() > limit => frames.push("...".into()),
        Some(_) => frames.push("?".into()),
        None => {}
    }
    format!("in {}", frames.join(" < "))
}

/// `stack unknown: it exited`, or `stack incomplete: ...` if some functions are known; `None` if the stack is complete.
pub(crate) fn missing_stack(sample: &StackSample) -> Option<String> {
    let extent = if sample.frames.is_empty() { "unknown" } else { "incomplete" };
    sample.missing.as_ref().map(|why| format!("stack {extent}: {why}"))
}

/// `depth 5, limit 4 (FULL), peak 5`.
pub(crate) fn queue(listener: &Listener) -> String {
    let Listener { depth, limit, peak, .. } = listener;
    let full = if *limit > 0 && depth >= limit { " (FULL)" } else { "" };
    format!("depth {depth}, limit {limit}{full}, peak {peak}")
}

/// How long the oldest connection in the queue has waited: `5.50 s`, `at least 5.50 s` if it was there before observer.
pub(crate) fn oldest(listener: &Listener) -> String {
    let at_least = if listener.oldest_is_lower_bound { "at least " } else { "" };
    format!("{at_least}{}", span(listener.oldest_seconds.unwrap_or(0.0)))
}

/// `1 stall`, `3 stalls`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// The cause of busy time, as a state of the thread.
pub(crate) const fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Cpu => "on a CPU",
        Cause::Runqueue => "waiting for a CPU",
        Cause::Blocked(Block::Lock) => "blocked by a lock",
        Cause::Blocked(Block::Disk) => "blocked by file I/O",
        Cause::Blocked(Block::Network) => "blocked by the network",
        Cause::Blocked(Block::Sleep) => "asleep",
        Cause::Blocked(Block::PageFault) => "blocked by page faults",
        Cause::Blocked(Block::Other) => "blocked by something else",
        Cause::Gc => "collecting garbage",
    }
}

/// A share between 0 and 1 as `12.5 %`.
pub(crate) fn percent(ratio: f64) -> String {
    format!("{:.1} %", ratio * 100.0)
}

/// A duration with three significant digits, in us, ms or s.
pub(crate) fn span(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "us"),
    };
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{frame::Frame, workload::Pod};

    #[test]
    fn the_latest_requests_are_named() {
        let request = |path: &str| Request {
            method: Some("GET".into()),
            path: Some(path.into()),
            ..Request::default()
        };
        let (one, other, more, last) = (request("/1"), request("/2"), request("/3"), request("/4"));
        assert_eq!(for_requests(&[]), "");
        assert_eq!(for_requests(&[&one, &one]), " for GET /1");
        assert_eq!(for_requests(&[&one, &other, &one]), " for GET /1, GET /2");
        assert_eq!(for_requests(&[&one, &other, &more, &last]), " for GET /4, GET /3, GET /2 and others");
        let unknown = Request { time: "2026-11-24T12:00:00Z".into(), ..Request::default() };
        assert_eq!(for_requests(&[&unknown]), " for a request at 2026-11-24T12:00:00Z");
    }

    #[test]
    fn stacks_say_what_is_left_out_and_what_is_unknown() {
        let frame =
            |function: &str| Frame { function: function.into(), module: None, file: None, line: None };
        let mut sample = StackSample {
            frames: vec![frame("a"), frame("b"), frame("c")],
            ..StackSample::missing("no reason")
        };
        assert_eq!(stack(&sample, 3), "in a < b < c < ?");
        assert_eq!(stack(&sample, 2), "in a < b < ...");
        sample.missing = None;
        assert_eq!(stack(&sample, 3), "in a < b < c");
        assert_eq!(stack(&StackSample::missing("it exited"), 3), "(stack unknown: it exited)");
    }

    #[test]
    fn containers_pods_and_units_are_named() {
        assert_eq!(workload(&Workload::default()), "");
        let unit = Workload { unit: Some("nginx.service".into()), ..Workload::default() };
        assert_eq!(workload(&unit), ", nginx.service");
        let mut container = Workload { container: Some("0123456789abcdef".into()), ..Workload::default() };
        assert_eq!(workload(&container), ", container 0123456789ab");
        let mut pod = Pod { uid: "8f2d".into(), ..Pod::default() };
        container.kubernetes = Some(pod.clone());
        assert_eq!(workload(&container), ", container 0123456789ab of pod 8f2d");
        (pod.namespace, pod.name) = (Some("shop".into()), Some("web-0".into()));
        container.kubernetes = Some(pod.clone());
        assert_eq!(workload(&container), ", container 0123456789ab of pod shop/web-0");
        pod.container = Some("web".into());
        container.kubernetes = Some(pod);
        assert_eq!(workload(&container), ", container web (0123456789ab) of pod shop/web-0");
        container.container = None;
        assert_eq!(workload(&container), ", pod shop/web-0");
    }

    #[test]
    fn durations_are_short_and_have_a_unit() {
        assert_eq!(span(0.0), "0.00 us");
        assert_eq!(span(0.000_001_5), "1.50 us");
        assert_eq!(span(0.012_34), "12.3 ms");
        assert_eq!(span(0.120_4), "120 ms");
        assert_eq!(span(15.02), "15.0 s");
        assert_eq!(span(900.0), "900 s");
    }
}
