//! Snapshots for tests: a process with an event loop, an accept queue and, if asked for, deferred tasks.

use std::sync::Arc;

use crate::model::{
    busy::{Cause, Split},
    deferred::Deferred,
    frame::{Frame, StackSample},
    histogram::Histogram,
    request::Request,
    snapshot::{Depths, Duty, Listener, Own, Reactor, SCHEMA, Snapshot, Target},
    stall::{Stall, Stalls},
    workload::Workload,
};
use observer_common::{block::Block, histogram as kernel, listener::DEPTHS};

/// A histogram of `(milliseconds, count)`.
pub(crate) fn histogram(durations: &[(u64, u64)]) -> Histogram {
    let mut raw = kernel::Histogram::EMPTY;
    for &(milliseconds, times) in durations {
        let ns = milliseconds * 1_000_000;
        let bucket = &mut raw.buckets[kernel::bucket_of(ns)];
        bucket.count += times;
        bucket.sum_ns += times * ns;
        raw.max_ns = raw.max_ns.max(if times > 0 { ns } else { 0 });
    }
    Histogram::from(&raw)
}

/// Changes a loop into one that slept for 120 ms, `times` times, while events waited.
pub(crate) fn slept(reactor: &mut Reactor, times: u32) {
    reactor.lag = histogram(&[(120, u64::from(times) * 10), (60, u64::from(times) * 130)]);
    reactor.slice = histogram(&[(120, u64::from(times))]);
    reactor.event_delay = reactor.slice.clone();
    reactor.events_delayed = u64::from(times);
    reactor.busy_seconds = f64::from(times) * 0.15;
    reactor.split_seconds = split(f64::from(times));
    let sample = StackSample {
        frames: vec![frame("sleep", "/app/db.py", 12), frame("handle", "/app/server.py", 40)],
        kernel: vec!["do_nanosleep".into()],
        ..StackSample::default()
    };
    let mut stalls = Stalls::over(0.05);
    for _ in 0..times {
        let stall = Stall {
            start: "2026-11-24T12:00:00Z".into(),
            seconds: 0.12,
            cause: Cause::Blocked(Block::Sleep),
            syscall: Some("clock_nanosleep".into()),
            behind: None,
            events_waited: Some(true),
            split_seconds: split(1.0),
            origin: Some(Arc::new(request())),
            site: 0,
        };
        stalls.add(stall, sample.clone());
    }
    reactor.stalls = stalls.ranked(reactor.lag.sum() * 0.001);
}

pub(crate) fn frame(function: &str, file: &str, line: u32) -> Frame {
    Frame { function: function.into(), module: None, file: Some(file.into()), line: Some(line) }
}

/// The request of all stalls.
fn request() -> Request {
    Request { id: 7, method: Some("GET".into()), path: Some("/job/7".into()), ..Request::default() }
}

fn split(times: f64) -> Split {
    let mut split = Split { cpu: 0.03 * times, ..Split::default() };
    split.blocked.sleep = 0.12 * times;
    split
}

/// A kind of which `started` tasks started, each after 2 ms, and a fifth as many were dropped.
pub(crate) fn kind(task: &str, started: u64) -> Deferred {
    Deferred {
        task: task.into(),
        is_kind_known: true,
        enqueued: started + started / 5,
        started,
        finished: started,
        orphaned: started / 5,
        pending: 0,
        oldest_seconds: None,
        wait: histogram(&[(2, started)]),
        run: histogram(&[(30, started)]),
        links: Vec::new(),
    }
}

/// An event loop that has waited for `seconds` seconds.
fn idle(seconds: f64) -> Reactor {
    Reactor {
        id: "11".into(),
        tid: 11,
        only_tid: Some(11),
        threads: 1,
        name: "reactor".into(),
        slices: 0,
        waits: 0,
        events: 0,
        events_delayed: 0,
        wait_seconds: seconds,
        busy_seconds: 0.0,
        utilization: Some(0.0),
        current_slice_seconds: None,
        current_slice_events_wait: None,
        current_stack: None,
        lag: Histogram::default(),
        slice: Histogram::default(),
        wakeup: Histogram::default(),
        event_delay: Histogram::default(),
        split_seconds: Split::default(),
        stalls: Stalls::over(0.05),
        exited: false,
        duty: Duty::default(),
        is_worker: false,
    }
}

/// The snapshot `seconds` seconds after the start, with `change` applied to the event loop.
pub(crate) fn snapshot(seconds: f64, change: impl FnOnce(&mut Reactor)) -> Snapshot {
    let mut reactor = idle(seconds);
    change(&mut reactor);
    let listener = Listener {
        protocol: "tcp",
        address: "127.0.0.1:8080".into(),
        member: None,
        limit: 128,
        depth: 0,
        peak: 9,
        half_open: 0,
        oldest_seconds: None,
        oldest_is_lower_bound: false,
        arrivals: 100,
        accepts: 100,
        accepts_unknown_wait: 0,
        aborted: 0,
        drops: 0,
        overflows: None,
        wait: histogram(&[(1, 100)]),
        depth_on_accept: Depths { counts: [0; DEPTHS], sum: 0 },
        closed: false,
    };
    let target = Target {
        pid: 10,
        comm: "app".into(),
        exe: "/usr/bin/app".into(),
        parent: 1,
        workload: Workload::default(),
        exited: false,
        listeners: vec![listener],
        reactors: vec![reactor],
        unwatched_waits: None,
        deferred: Vec::new(),
        unmatched: 0,
        hooks: Vec::new(),
        gc: None,
    };
    Snapshot {
        schema: SCHEMA,
        started: "2026-11-24T12:00:00Z".into(),
        duration_seconds: seconds,
        targets: vec![target],
        workers: Vec::new(),
        own: Own { version: "0", kernel: "6.1".into(), ..Own::default() },
    }
}
