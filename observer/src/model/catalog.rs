//! Every metric there is: name, meaning, unit, labels and where in a snapshot it stands; those of observer itself are in
//! `own.rs`. All exporters and the reference page read this one table.

use super::{
    busy::Cause,
    deferred::{Deferred, HookFigures},
    own::OWN,
    place::Place,
    snapshot::{Gc, Listener, Reactor, Snapshot},
    subject::{
        HOOK, LISTENER, PROGRAM, REACTOR, TARGET, TASK, hook_labels, listener_labels, live, live_listeners,
        live_reactors, reactor_labels, target_labels, task_labels,
    },
};
use crate::model::family::{Aggregation, Family, Kind, Sink, Value, count};

/// All families, in the order of the reference page: those of what is observed, then observer's own.
pub(crate) fn families() -> impl Iterator<Item = &'static Family> {
    CATALOG.iter().chain(OWN)
}

const CATALOG: &[Family] = &[
    Family {
        name: "observer_accept_queue_depth",
        otlp: "observer.accept_queue.depth",
        unit: "{connection}",
        help: "Connections that wait to be accepted.",
        kind: Kind::Gauge(Aggregation::Sum),
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.depth.into())),
    },
    Family {
        name: "observer_accept_queue_limit",
        otlp: "observer.accept_queue.limit",
        unit: "{connection}",
        help: "Most connections that may wait to be accepted.",
        kind: Kind::Gauge(Aggregation::Sum),
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.limit.into())),
    },
    Family {
        name: "observer_accept_queue_peak",
        otlp: "observer.accept_queue.peak",
        unit: "{connection}",
        help: "Most connections seen to wait to be accepted.",
        kind: Kind::Gauge(Aggregation::Max),
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.peak.into())),
    },
    Family {
        name: "observer_accept_queue_oldest_seconds",
        otlp: "observer.accept_queue.oldest",
        unit: "s",
        help: "How long the connection that waits longest has waited; at least, if it waited before observer came.",
        kind: Kind::Gauge(Aggregation::Max),
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.oldest_seconds.unwrap_or(0.0))),
    },
    Family {
        name: "observer_accept_queue_half_open",
        otlp: "observer.accept_queue.half_open",
        unit: "{handshake}",
        help: "Handshakes that have begun and are not done.",
        kind: Kind::Gauge(Aggregation::Sum),
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.half_open.into())),
    },
    Family {
        name: "observer_accept_queue_arrivals_total",
        otlp: "observer.accept_queue.arrivals",
        unit: "{connection}",
        help: "Connections that joined the accept queue.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| count(l.arrivals)),
    },
    Family {
        name: "observer_accept_queue_accepts_total",
        otlp: "observer.accept_queue.accepts",
        unit: "{connection}",
        help: "Connections accepted.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| count(l.accepts)),
    },
    Family {
        name: "observer_accept_queue_accepts_unknown_wait_total",
        otlp: "observer.accept_queue.accepts_unknown_wait",
        unit: "{connection}",
        help: "Accepted connections that were queued before observer looked; not in the wait histogram.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| count(l.accepts_unknown_wait)),
    },
    Family {
        name: "observer_accept_queue_aborted_total",
        otlp: "observer.accept_queue.aborted",
        unit: "{connection}",
        help: "Connections that their clients reset while they waited to be accepted.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| count(l.aborted)),
    },
    Family {
        name: "observer_accept_queue_drops_total",
        otlp: "observer.accept_queue.drops",
        unit: "{segment}",
        help: "What the kernel dropped because of the listener, for any reason: connections, and segments that begin none.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Number(l.drops.into())),
    },
    Family {
        name: "observer_accept_queue_overflows_total",
        otlp: "observer.accept_queue.overflows",
        unit: "{connection}",
        help: "Connections dropped because the accept queue was full; only where they can be no other listener's.",
        kind: Kind::Counter,
        labels: LISTENER,
        collect: |s, sink| {
            for (target, listener) in live_listeners(s) {
                if let Some(overflows) = listener.overflows {
                    sink(listener_labels(target, listener), count(overflows));
                }
            }
        },
    },
    Family {
        name: "observer_accept_queue_depth_on_accept",
        otlp: "observer.accept_queue.depth_on_accept",
        unit: "{connection}",
        help: "Connections that waited when one was accepted, that one included.",
        kind: Kind::Histogram,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Depths(&l.depth_on_accept)),
    },
    Family {
        name: "observer_accept_queue_wait_seconds",
        otlp: "observer.accept_queue.wait",
        unit: "s",
        help: "Time between the end of the handshake and the return of accept.",
        kind: Kind::Histogram,
        labels: LISTENER,
        collect: |s, sink| listeners(s, sink, |l| Value::Histogram(&l.wait)),
    },
    Family {
        name: "observer_reactor_lag_seconds",
        otlp: "observer.reactor.lag",
        unit: "s",
        help: "Delay that something due at a random instant meets; one count for each millisecond observed.",
        kind: Kind::Histogram,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.lag)),
    },
    Family {
        name: "observer_reactor_slice_seconds",
        otlp: "observer.reactor.slice",
        unit: "s",
        help: "Time between two waits for events, from being back on a CPU to blocking again: how long nothing else could run.",
        kind: Kind::Histogram,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.slice)),
    },
    Family {
        name: "observer_reactor_wakeup_seconds",
        otlp: "observer.reactor.wakeup",
        unit: "s",
        help: "Time between being made runnable and running, after a wait for events.",
        kind: Kind::Histogram,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| Value::Histogram(&r.wakeup)),
    },
    Family {
        name: "observer_reactor_wait_seconds_total",
        otlp: "observer.reactor.wait",
        unit: "s",
        help: "Time spent waiting for events, or parked while other threads waited on the same epoll set.",
        kind: Kind::Counter,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| Value::Number(r.wait_seconds)),
    },
    Family {
        name: "observer_reactor_busy_seconds_total",
        otlp: "observer.reactor.busy",
        unit: "s",
        help: "Time spent between waits, by what the thread was doing: on a CPU, waiting for one, or blocked, and in what.",
        kind: Kind::Counter,
        labels: &["pid", "comm", "container", "pod", "tid", "reactor", "state", "cause"],
        collect: |s, sink| {
            for (target, reactor) in live_reactors(s) {
                for cause in Cause::PARTS {
                    let mut labels = reactor_labels(target, reactor);
                    labels.extend([cause.state().into(), cause.name().into()]);
                    sink(labels, Value::Number(reactor.split_seconds.of(cause)));
                }
            }
        },
    },
    Family {
        name: "observer_reactor_stalls_total",
        otlp: "observer.reactor.stalls",
        unit: "{stall}",
        help: "Slices as long as the threshold or longer, by what took most of their time.",
        kind: Kind::Counter,
        labels: &["pid", "comm", "container", "pod", "tid", "reactor", "cause"],
        collect: |s, sink| {
            for (target, reactor) in live_reactors(s) {
                for cause in Cause::all() {
                    let mut labels = reactor_labels(target, reactor);
                    labels.push(cause.name().into());
                    sink(labels, count(reactor.stalls.count_of(cause)));
                }
            }
        },
    },
    Family {
        name: "observer_reactor_gc_seconds_total",
        otlp: "observer.reactor.gc",
        unit: "s",
        help: "Time between waits that went into garbage collections; part of the busy time, whatever its state.",
        kind: Kind::Counter,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| Value::Number(r.split_seconds.gc)),
    },
    Family {
        name: "observer_reactor_waits_total",
        otlp: "observer.reactor.waits",
        unit: "{wait}",
        help: "Waits for events.",
        kind: Kind::Counter,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| count(r.waits)),
    },
    Family {
        name: "observer_reactor_events_total",
        otlp: "observer.reactor.events",
        unit: "{event}",
        help: "Events that waits returned.",
        kind: Kind::Counter,
        labels: REACTOR,
        collect: |s, sink| reactors(s, sink, |r| count(r.events)),
    },
    Family {
        name: "observer_reactor_utilization_ratio",
        otlp: "observer.reactor.utilization",
        unit: "1",
        help: "Busy time as a share of busy and waiting time, since observer attached.",
        kind: Kind::Gauge(Aggregation::Max),
        labels: REACTOR,
        collect: |s, sink| {
            for (target, reactor) in live_reactors(s) {
                if let Some(utilization) = reactor.utilization {
                    sink(reactor_labels(target, reactor), Value::Number(utilization));
                }
            }
        },
    },
    Family {
        name: "observer_deferred_enqueued_total",
        otlp: "observer.deferred.enqueued",
        unit: "{task}",
        help: "Pieces of work put off; where only their start tells the kind, those that have started.",
        kind: Kind::Counter,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| count(d.enqueued)),
    },
    Family {
        name: "observer_deferred_started_total",
        otlp: "observer.deferred.started",
        unit: "{task}",
        help: "Pieces of deferred work that have started.",
        kind: Kind::Counter,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| count(d.started)),
    },
    Family {
        name: "observer_deferred_finished_total",
        otlp: "observer.deferred.finished",
        unit: "{task}",
        help: "Pieces of deferred work that have ended.",
        kind: Kind::Counter,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| count(d.finished)),
    },
    Family {
        name: "observer_deferred_orphaned_total",
        otlp: "observer.deferred.orphaned",
        unit: "{task}",
        help: "Pieces of deferred work that were forgotten before they started.",
        kind: Kind::Counter,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| count(d.orphaned)),
    },
    Family {
        name: "observer_deferred_pending",
        otlp: "observer.deferred.pending",
        unit: "{task}",
        help: "Pieces of deferred work that have not started.",
        kind: Kind::Gauge(Aggregation::Sum),
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| count(d.pending)),
    },
    Family {
        name: "observer_deferred_oldest_seconds",
        otlp: "observer.deferred.oldest",
        unit: "s",
        help: "How long the piece of deferred work has waited that has waited longest and not started.",
        kind: Kind::Gauge(Aggregation::Max),
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| Value::Number(d.oldest_seconds.unwrap_or(0.0))),
    },
    Family {
        name: "observer_deferred_wait_seconds",
        otlp: "observer.deferred.wait",
        unit: "s",
        help: "Time between being put off and the start.",
        kind: Kind::Histogram,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| Value::Histogram(&d.wait)),
    },
    Family {
        name: "observer_deferred_run_seconds",
        otlp: "observer.deferred.run",
        unit: "s",
        help: "Time between the start of deferred work and the last of it, pauses included, of what has ended.",
        kind: Kind::Histogram,
        labels: TASK,
        collect: |s, sink| tasks(s, sink, |d| Value::Histogram(&d.run)),
    },
    Family {
        name: "observer_deferred_unmatched_total",
        otlp: "observer.deferred.unmatched",
        unit: "{time}",
        help: "Times that work went on which was not known to have been put off: what it was for is unknown.",
        kind: Kind::Counter,
        labels: TARGET,
        collect: |s, sink| {
            for target in live(s).filter(|target| !target.hooks.is_empty()) {
                sink(target_labels(target), count(target.unmatched));
            }
        },
    },
    Family {
        name: "observer_deferred_hook_hits_total",
        otlp: "observer.deferred.hook_hits",
        unit: "{hit}",
        help: "Times that a process came to a place which its profile names.",
        kind: Kind::Counter,
        labels: HOOK,
        collect: |s, sink| hooks(s, sink, |hook| hook.hits),
    },
    Family {
        name: "observer_deferred_hook_matches_total",
        otlp: "observer.deferred.hook_matches",
        unit: "{hit}",
        help: "Of those, the ones that meant something: but for a snapshot, that what was meant was known.",
        kind: Kind::Counter,
        labels: HOOK,
        collect: |s, sink| hooks(s, sink, |hook| hook.matches),
    },
    Family {
        name: "observer_gc_pause_seconds",
        otlp: "observer.gc.pause",
        unit: "s",
        help: "How long each garbage collection kept its thread, where that is known of each.",
        kind: Kind::Histogram,
        labels: TARGET,
        collect: |s, sink| collectors(s, sink, |gc| gc.pause.as_ref().map(Value::Histogram)),
    },
    Family {
        name: "observer_gc_total",
        otlp: "observer.gc",
        unit: "{collection}",
        help: "Garbage collections.",
        kind: Kind::Counter,
        labels: TARGET,
        collect: |s, sink| collectors(s, sink, |gc| Some(count(gc.count))),
    },
    Family {
        name: "observer_gc_seconds_total",
        otlp: "observer.gc.seconds",
        unit: "s",
        help: "Time that garbage collections took.",
        kind: Kind::Counter,
        labels: TARGET,
        collect: |s, sink| collectors(s, sink, |gc| gc.seconds.map(Value::Number)),
    },
    Family {
        name: "observer_target_info",
        otlp: "observer.target.info",
        unit: "",
        help: "A process under observation; always 1, but for processes that are told together.",
        kind: Kind::Gauge(Aggregation::Sum),
        labels: PROGRAM,
        collect: |s, sink| {
            for target in live(s) {
                let mut labels = target_labels(target);
                labels.push(target.exe.clone());
                let Place { kubernetes, unit, .. } = target.place.clone();
                let pod = kubernetes.unwrap_or_default();
                labels.extend([pod.namespace, pod.container].map(Option::unwrap_or_default));
                labels.extend([pod.uid, unit.unwrap_or_default()]);
                sink(labels, Value::Number(1.0));
            }
        },
    },
];

fn collectors(snapshot: &Snapshot, sink: &mut Sink<'_>, figure: for<'g> fn(&'g Gc) -> Option<Value<'g>>) {
    for target in live(snapshot) {
        if let Some(figure) = target.gc.as_ref().and_then(figure) {
            sink(target_labels(target), figure);
        }
    }
}

fn tasks(snapshot: &Snapshot, sink: &mut Sink<'_>, figure: for<'d> fn(&'d Deferred) -> Value<'d>) {
    for target in live(snapshot) {
        for deferred in &target.deferred {
            sink(task_labels(target, deferred), figure(deferred));
        }
    }
}

fn hooks(snapshot: &Snapshot, sink: &mut Sink<'_>, figure: fn(&HookFigures) -> u64) {
    for target in live(snapshot) {
        for hook in &target.hooks {
            sink(hook_labels(target, hook), count(figure(hook)));
        }
    }
}

fn reactors(snapshot: &Snapshot, sink: &mut Sink<'_>, figure: for<'r> fn(&'r Reactor) -> Value<'r>) {
    for (target, reactor) in live_reactors(snapshot) {
        sink(reactor_labels(target, reactor), figure(reactor));
    }
}

fn listeners(snapshot: &Snapshot, sink: &mut Sink<'_>, figure: for<'l> fn(&'l Listener) -> Value<'l>) {
    for (target, listener) in live_listeners(snapshot) {
        sink(listener_labels(target, listener), figure(listener));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Prometheus calls an OTLP metric.
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
    fn a_collector_makes_the_same_names_for_prometheus() {
        for family in families() {
            assert_eq!(in_prometheus(family), family.name);
        }
    }
}
