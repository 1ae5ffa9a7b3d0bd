//! Fleet: which workloads are late, and which turn connections away.

use super::dashboard::{Dashboard, Look, Panel, Unit};

type More = (&'static str, &'static str, &'static [&'static str]);

const REACTOR: &More = &("reactor", "Event loops of this workload", &["instance", "comm"]);
const ACCEPT_QUEUE: &More = &("accept-queue", "Accept queues of this workload", &["instance", "comm"]);

const DEFERRED: &More = &("deferred-work", "Deferred work of this workload", &["instance", "comm"]);

const WORKLOAD: &str = "{{comm}} {{instance}}";

pub(super) const DASHBOARD: Dashboard = Dashboard {
    name: "fleet",
    title: "observer / Fleet",
    description: "Which workloads are late, and which turn connections away. A workload is a program on a machine.",
    choices: &[],
    panels: &[
        Panel {
            title: "Late workloads",
            description: "Workloads with an event loop whose lag exceeds 50 ms at 1 % of all instants or more.",
            look: Look::Number { red_from: 1.0 },
            unit: Unit::Count,
            queries: &[(
                "count(max by (job, instance, comm, container) (histogram_quantile(0.99, sum by (le, job, instance, comm, container, pid, tid) (rate(observer_reactor_lag_seconds_bucket{SELECTED}[$__rate_interval])))) > 0.05) or vector(0)",
                "late",
            )],
            more: None,
        },
        Panel {
            title: "Overflowing workloads",
            description: "Workloads that had connections dropped because an accept queue was full.",
            look: Look::Number { red_from: 1.0 },
            unit: Unit::Count,
            queries: &[(
                "count(sum by (job, instance, comm, container) (rate(observer_accept_queue_overflows_total{SELECTED}[$__rate_interval])) > 0) or vector(0)",
                "overflowing",
            )],
            more: None,
        },
        Panel {
            title: "Oldest waiting connection",
            description: "How long the connection has waited that has waited longest to be accepted, of all.",
            look: Look::Number { red_from: 1.0 },
            unit: Unit::Seconds,
            queries: &[("max(observer_accept_queue_oldest_seconds{SELECTED})", "oldest")],
            more: None,
        },
        Panel {
            title: "Events that observer lost",
            description: "What observer's programs in the kernel could not keep. Above zero, figures are incomplete.",
            look: Look::Number { red_from: 0.001 },
            unit: Unit::PerSecond,
            queries: &[("sum(rate(observer_self_lost_total{SELECTED}[$__rate_interval]))", "lost")],
            more: None,
        },
        Panel {
            title: "Lag, 99th percentile",
            description: "The delay that 99 % of all instants do not exceed, of the worst event loop of each workload.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[(
                "topk(10, max by (job, instance, comm, container) (histogram_quantile(0.99, sum by (le, job, instance, comm, container, pid, tid) (rate(observer_reactor_lag_seconds_bucket{SELECTED}[$__rate_interval])))))",
                WORKLOAD,
            )],
            more: Some(REACTOR),
        },
        Panel {
            title: "Utilisation",
            description: "Share of the time that the busiest event loop of each workload spends between waits for events.",
            look: Look::Lines,
            unit: Unit::Share,
            queries: &[(
                "topk(10, max by (job, instance, comm, container) (1 - sum by (job, instance, comm, container, pid, tid) (rate(observer_reactor_wait_seconds_total{SELECTED}[$__rate_interval])) / (sum by (job, instance, comm, container, pid, tid) (rate(observer_reactor_wait_seconds_total{SELECTED}[$__rate_interval])) + sum by (job, instance, comm, container, pid, tid) (rate(observer_reactor_busy_seconds_total{SELECTED}[$__rate_interval])))))",
                WORKLOAD,
            )],
            more: Some(REACTOR),
        },
        Panel {
            title: "Overflows",
            description: "Connections dropped because an accept queue was full, where they are certain to be this workload's.",
            look: Look::Lines,
            unit: Unit::PerMinute,
            queries: &[(
                "topk(10, 60 * sum by (job, instance, comm, container) (rate(observer_accept_queue_overflows_total{SELECTED}[$__rate_interval])))",
                WORKLOAD,
            )],
            more: Some(ACCEPT_QUEUE),
        },
        Panel {
            title: "Waits to be accepted, 99th percentile",
            description: "Time between the end of the handshake and the return of accept. Nothing inside a server can see it.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[(
                "topk(10, histogram_quantile(0.99, sum by (le, job, instance, comm, container) (rate(observer_accept_queue_wait_seconds_bucket{SELECTED}[$__rate_interval]))))",
                WORKLOAD,
            )],
            more: Some(ACCEPT_QUEUE),
        },
        Panel {
            title: "Deferred work that starts",
            description: "Pieces of work that requests left behind, which start now. Only of runtimes that a profile knows.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[(
                "topk(10, sum by (job, instance, comm, container) (rate(observer_deferred_started_total{SELECTED}[$__rate_interval])))",
                WORKLOAD,
            )],
            more: Some(DEFERRED),
        },
        Panel {
            title: "Orphaned work",
            description: "Pieces of work that were forgotten before they started. Cancelled timers are such, where a runtime does not tell them apart.",
            look: Look::Lines,
            unit: Unit::PerMinute,
            queries: &[(
                "topk(10, 60 * sum by (job, instance, comm, container) (rate(observer_deferred_orphaned_total{SELECTED}[$__rate_interval])))",
                WORKLOAD,
            )],
            more: Some(DEFERRED),
        },
    ],
};
