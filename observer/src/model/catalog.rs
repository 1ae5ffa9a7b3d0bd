//! The metric catalog: name, help, unit and labels of every metric, and where in a snapshot its samples are. Metrics
//! about observer itself are in `own.rs`. All exporters and the reference page read this table. A new value also needs
//! a field in `snapshot.rs`, and a decoder in the file of its probe.

use super::{
    busy::Cause,
    deferred::{Deferred, HookCounters},
    own::OWN,
    snapshot::{Gc, Listener, Reactor, Snapshot, Workers},
    subject::{Subject, SubjectKind, live, live_listeners, live_reactors, live_workers},
};
use crate::model::family::{Aggregation, Family, Kind, Sink, Value, count};

/// All metric families, in the order of the reference page: those of targets, then observer's own.
pub(crate) fn families() -> impl Iterator<Item = &'static Family> {
    CATALOG.iter().chain(OWN)
}

const CATALOG: &[Family] = &[
    Family {
        name: "observer_accept_queue_depth",
        otlp: "observer.accept_queue.depth",
        unit: "{connection}",
        help: "Number of connections in the accept queue.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.depth.into())),
    },
    Family {
        name: "observer_accept_queue_limit",
        otlp: "observer.accept_queue.limit",
        unit: "{connection}",
        help: "Maximum number of connections in the accept queue: the smaller of the backlog of listen and somaxconn.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.limit.into())),
    },
    Family {
        name: "observer_accept_queue_peak",
        otlp: "observer.accept_queue.peak",
        unit: "{connection}",
        help: "Highest number of connections seen in the accept queue.",
        kind: Kind::Gauge(Aggregation::Max),
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.peak.into())),
    },
    Family {
        name: "observer_accept_queue_oldest_seconds",
        otlp: "observer.accept_queue.oldest",
        unit: "s",
        help: "Seconds that the first connection in the accept queue has waited; 0 if there is none. A lower bound if it was queued before observer attached.",
        kind: Kind::Gauge(Aggregation::Max),
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.oldest_seconds.unwrap_or(0.0))),
    },
    Family {
        name: "observer_accept_queue_half_open",
        otlp: "observer.accept_queue.half_open",
        unit: "{handshake}",
        help: "Number of handshakes in progress.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.half_open.into())),
    },
    Family {
        name: "observer_accept_queue_arrivals_total",
        otlp: "observer.accept_queue.arrivals",
        unit: "{connection}",
        help: "Number of connections that were added to the accept queue.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| count(l.arrivals)),
    },
    Family {
        name: "observer_accept_queue_accepts_total",
        otlp: "observer.accept_queue.accepts",
        unit: "{connection}",
        help: "Number of connections that were accepted.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| count(l.accepts)),
    },
    Family {
        name: "observer_accept_queue_accepts_unknown_wait_total",
        otlp: "observer.accept_queue.accepts_unknown_wait",
        unit: "{connection}",
        help: "Number of accepted connections that were queued before observer attached. Their wait is unknown and not in the histogram of waits.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| count(l.accepts_unknown_wait)),
    },
    Family {
        name: "observer_accept_queue_aborted_total",
        otlp: "observer.accept_queue.aborted",
        unit: "{connection}",
        help: "Number of connections that their clients reset while they were in the accept queue.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| count(l.aborted)),
    },
    Family {
        name: "observer_accept_queue_drops_total",
        otlp: "observer.accept_queue.drops",
        unit: "{segment}",
        help: "Number of connections and segments that the kernel dropped because of this listener, for any reason, without those that TCP_DEFER_ACCEPT sets aside.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.drops.into())),
    },
    Family {
        name: "observer_accept_queue_overflows_total",
        otlp: "observer.accept_queue.overflows",
        unit: "{connection}",
        help: "Number of connections that were dropped because the accept queue was full. Absent where another listener may have dropped them.",
        kind: Kind::Counter,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, mut sink| {
            for (target, listener) in live_listeners(s) {
                if let Some(overflows) = listener.overflows {
                    sink.add(Subject::Listener(target, listener), count(overflows));
                }
            }
        },
    },
    Family {
        name: "observer_accept_queue_depth_on_accept",
        otlp: "observer.accept_queue.depth_on_accept",
        unit: "{connection}",
        help: "Number of connections in the accept queue when one was accepted, including that one.",
        kind: Kind::Histogram,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Depths(&l.depth_on_accept)),
    },
    Family {
        name: "observer_accept_queue_wait_seconds",
        otlp: "observer.accept_queue.wait",
        unit: "s",
        help: "Seconds from the end of a connection's handshake until accept returned it.",
        kind: Kind::Histogram,
        subject: SubjectKind::Listener,
        own_labels: &[],
        collect: |s, sink| listeners(s, sink, |l| Value::Histogram(&l.wait)),
    },
    Family {
        name: "observer_reactor_lag_seconds",
        otlp: "observer.reactor.lag",
        unit: "s",
        help: "Delay in seconds that an event arriving at a random moment would see, with one count for each millisecond observed.",
        kind: Kind::Histogram,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.lag)),
    },
    Family {
        name: "observer_reactor_slice_seconds",
        otlp: "observer.reactor.slice",
        unit: "s",
        help: "Length of slices in seconds: the time between two waits for events, from being back on a CPU until blocking again. Nothing else runs on the event loop meanwhile.",
        kind: Kind::Histogram,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.slice)),
    },
    Family {
        name: "observer_reactor_wakeup_seconds",
        otlp: "observer.reactor.wakeup",
        unit: "s",
        help: "Seconds from when a waiting event loop became runnable until it ran.",
        kind: Kind::Histogram,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.wakeup)),
    },
    Family {
        name: "observer_reactor_wait_seconds_total",
        otlp: "observer.reactor.wait",
        unit: "s",
        help: "Seconds in which at least one thread of the event loop waited for events.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Number(r.wait_seconds)),
    },
    Family {
        name: "observer_reactor_busy_seconds_total",
        otlp: "observer.reactor.busy",
        unit: "s",
        help: "Seconds spent in slices, by state of the thread (on a CPU, in the run queue or blocked) and by cause.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &["state", "cause"],
        collect: |s, mut sink| {
            for (target, reactor) in live_reactors(s) {
                for cause in Cause::PARTS {
                    let labels = [("state", cause.state()), ("cause", cause.name())];
                    let seconds = reactor.split_seconds.of(cause);
                    sink.add_with(Subject::Reactor(target, reactor), labels, Value::Number(seconds));
                }
            }
        },
    },
    Family {
        name: "observer_reactor_stalls_total",
        otlp: "observer.reactor.stalls",
        unit: "{stall}",
        help: "Number of slices of the stall threshold or more, by the cause that took most of their time.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &["cause"],
        collect: |s, mut sink| {
            for (target, reactor) in live_reactors(s) {
                for cause in Cause::all() {
                    let stalls = count(reactor.stalls.count_of(cause));
                    sink.add_with(Subject::Reactor(target, reactor), [("cause", cause.name())], stalls);
                }
            }
        },
    },
    Family {
        name: "observer_reactor_late_stalls_total",
        otlp: "observer.reactor.late_stalls",
        unit: "{stall}",
        help: "Number of stalls of 50 ms or longer during which events are known to have waited for the event loop.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| count(r.stalls.late)),
    },
    Family {
        name: "observer_reactor_gc_seconds_total",
        otlp: "observer.reactor.gc",
        unit: "s",
        help: "Seconds of slices that were spent in garbage collections. They are part of the busy time, in any state.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Number(r.split_seconds.gc)),
    },
    Family {
        name: "observer_reactor_waits_total",
        otlp: "observer.reactor.waits",
        unit: "{wait}",
        help: "Number of waits for events.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| count(r.waits)),
    },
    Family {
        name: "observer_reactor_events_total",
        otlp: "observer.reactor.events",
        unit: "{event}",
        help: "Number of events that waits returned. Not counted for io_uring, which does not report it.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| count(r.events)),
    },
    Family {
        name: "observer_reactor_events_delayed_total",
        otlp: "observer.reactor.events_delayed",
        unit: "{event}",
        help: "Number of events that were already waiting when the event loop looked for them. Not counted for io_uring.",
        kind: Kind::Counter,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| count(r.events_delayed)),
    },
    Family {
        name: "observer_reactor_event_delay_seconds",
        otlp: "observer.reactor.event_delay",
        unit: "s",
        help: "Length in seconds of the slices at whose end events were waiting: an upper bound of their delays, unless more events were ready than one wait returns.",
        kind: Kind::Histogram,
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.event_delay)),
    },
    Family {
        name: "observer_reactor_utilization_ratio",
        otlp: "observer.reactor.utilization",
        unit: "1",
        help: "Busy time divided by busy and waiting time since observer attached, from 0 to 1.",
        kind: Kind::Gauge(Aggregation::Max),
        subject: SubjectKind::Reactor,
        own_labels: &[],
        collect: |s, mut sink| {
            for (target, reactor) in live_reactors(s) {
                if let Some(utilization) = reactor.utilization {
                    sink.add(Subject::Reactor(target, reactor), Value::Number(utilization));
                }
            }
        },
    },
    Family {
        name: "observer_workers",
        otlp: "observer.workers",
        unit: "{process}",
        help: "Number of processes with the same parent and program that serve one connection at a time each. Their loops have no series of their own.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Workers,
        own_labels: &[],
        collect: |s, sink| workers(s, sink, |w| count(w.running as u64)),
    },
    Family {
        name: "observer_workers_busy",
        otlp: "observer.workers.busy",
        unit: "{process}",
        help: "Number of these workers that serve a connection now, rather than wait for one or for the next request.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Workers,
        own_labels: &[],
        collect: |s, sink| workers(s, sink, |w| count(w.busy as u64)),
    },
    Family {
        name: "observer_deferred_enqueued_total",
        otlp: "observer.deferred.enqueued",
        unit: "{task}",
        help: "Number of tasks that were enqueued. Tasks whose kind is known only at their start are counted when they start.",
        kind: Kind::Counter,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| count(d.enqueued)),
    },
    Family {
        name: "observer_deferred_started_total",
        otlp: "observer.deferred.started",
        unit: "{task}",
        help: "Number of tasks that were started.",
        kind: Kind::Counter,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| count(d.started)),
    },
    Family {
        name: "observer_deferred_finished_total",
        otlp: "observer.deferred.finished",
        unit: "{task}",
        help: "Number of tasks that were finished.",
        kind: Kind::Counter,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| count(d.finished)),
    },
    Family {
        name: "observer_deferred_orphaned_total",
        otlp: "observer.deferred.orphaned",
        unit: "{task}",
        help: "Number of tasks that were dropped, or whose process exited, before they started.",
        kind: Kind::Counter,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| count(d.orphaned)),
    },
    Family {
        name: "observer_deferred_pending",
        otlp: "observer.deferred.pending",
        unit: "{task}",
        help: "Number of tasks that are enqueued and have not started.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| count(d.pending)),
    },
    Family {
        name: "observer_deferred_oldest_seconds",
        otlp: "observer.deferred.oldest",
        unit: "s",
        help: "Seconds that the longest waiting task has waited to start; 0 if none waits.",
        kind: Kind::Gauge(Aggregation::Max),
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| Value::Number(d.oldest_seconds.unwrap_or(0.0))),
    },
    Family {
        name: "observer_deferred_wait_seconds",
        otlp: "observer.deferred.wait",
        unit: "s",
        help: "Seconds from the enqueue of a task to its start.",
        kind: Kind::Histogram,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| Value::Histogram(&d.wait)),
    },
    Family {
        name: "observer_deferred_run_seconds",
        otlp: "observer.deferred.run",
        unit: "s",
        help: "Seconds from the start of a finished task until it last ran, including pauses.",
        kind: Kind::Histogram,
        subject: SubjectKind::Task,
        own_labels: &[],
        collect: |s, sink| tasks(s, sink, |d| Value::Histogram(&d.run)),
    },
    Family {
        name: "observer_deferred_unmatched_total",
        otlp: "observer.deferred.unmatched",
        unit: "{time}",
        help: "Number of times that a task ran without a known enqueue. Its origin is unknown.",
        kind: Kind::Counter,
        subject: SubjectKind::Target,
        own_labels: &[],
        collect: |s, mut sink| {
            for target in live(s).filter(|target| !target.hooks.is_empty()) {
                sink.add(Subject::Target(target), count(target.unmatched));
            }
        },
    },
    Family {
        name: "observer_deferred_hook_hits_total",
        otlp: "observer.deferred.hook_hits",
        unit: "{hit}",
        help: "Number of times that a hook of the profile fired.",
        kind: Kind::Counter,
        subject: SubjectKind::Hook,
        own_labels: &[],
        collect: |s, sink| hooks(s, sink, |hook| hook.hits),
    },
    Family {
        name: "observer_deferred_hook_matches_total",
        otlp: "observer.deferred.hook_matches",
        unit: "{hit}",
        help: "Number of times that a hook matched: a snapshot recorded a task, or another hook fired for a known task.",
        kind: Kind::Counter,
        subject: SubjectKind::Hook,
        own_labels: &[],
        collect: |s, sink| hooks(s, sink, |hook| hook.matches),
    },
    Family {
        name: "observer_gc_pause_seconds",
        otlp: "observer.gc.pause",
        unit: "s",
        help: "Seconds that each garbage collection occupied its thread. Absent for runtimes that report only totals.",
        kind: Kind::Histogram,
        subject: SubjectKind::Target,
        own_labels: &[],
        collect: |s, sink| collectors(s, sink, |gc| gc.pause.as_ref().map(Value::Histogram)),
    },
    Family {
        name: "observer_gc_total",
        otlp: "observer.gc",
        unit: "{collection}",
        help: "Number of garbage collections.",
        kind: Kind::Counter,
        subject: SubjectKind::Target,
        own_labels: &[],
        collect: |s, sink| collectors(s, sink, |gc| Some(count(gc.count))),
    },
    Family {
        name: "observer_gc_seconds_total",
        otlp: "observer.gc.seconds",
        unit: "s",
        help: "Seconds that garbage collections took. Absent for runtimes that only count them.",
        kind: Kind::Counter,
        subject: SubjectKind::Target,
        own_labels: &[],
        collect: |s, sink| collectors(s, sink, |gc| gc.seconds.map(Value::Number)),
    },
    Family {
        name: "observer_target_info",
        otlp: "observer.target.info",
        unit: "",
        help: "A process under observation. The value is 1, or the number of processes where several are aggregated.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Program,
        own_labels: &[],
        collect: |s, mut sink| {
            for target in live(s) {
                sink.add(Subject::Program(target), Value::Number(1.0));
            }
        },
    },
];

fn collectors<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, value: fn(&'s Gc) -> Option<Value<'s>>) {
    for target in live(snapshot) {
        if let Some(value) = target.gc.as_ref().and_then(value) {
            sink.add(Subject::Target(target), value);
        }
    }
}

fn tasks<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, value: fn(&'s Deferred) -> Value<'s>) {
    for target in live(snapshot) {
        for deferred in &target.deferred {
            sink.add(Subject::Task(target, deferred), value(deferred));
        }
    }
}

fn hooks<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, counter: fn(&HookCounters) -> u64) {
    for target in live(snapshot) {
        for hook in &target.hooks {
            sink.add(Subject::Hook(target, hook), count(counter(hook)));
        }
    }
}

fn reactors<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, value: fn(&'s Reactor) -> Value<'s>) {
    for (target, reactor) in live_reactors(snapshot) {
        sink.add(Subject::Reactor(target, reactor), value(reactor));
    }
}

fn workers<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, value: fn(&'s Workers) -> Value<'s>) {
    for (target, workers) in live_workers(snapshot) {
        sink.add(Subject::Workers(target, workers), value(workers));
    }
}

fn listeners<'s>(snapshot: &'s Snapshot, mut sink: Sink<'_, 's>, value: fn(&'s Listener) -> Value<'s>) {
    for (target, listener) in live_listeners(snapshot) {
        sink.add(Subject::Listener(target, listener), value(listener));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name that Prometheus derives from that of an OTLP metric.
    fn in_prometheus(family: &Family) -> String {
        let unit = match (family.unit, family.kind) {
            ("s", _) => "_seconds",
            ("By", _) => "_bytes",
            ("1", Kind::Gauge(_)) => "_ratio",
            _ => "",
        };
        let name = family.otlp.replace('.', "_");
        let name = if name.ends_with(unit) { name } else { name + unit };
        if family.kind == Kind::Counter { name + "_total" } else { name }
    }

    #[test]
    fn otlp_names_become_the_prometheus_names() {
        for family in families() {
            assert_eq!(in_prometheus(family), family.name);
        }
    }
}
