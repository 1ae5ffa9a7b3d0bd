//! Deferred work: how much of which kind is put off, how long it waits and runs, and what is never done.

use super::dashboard::{Dashboard, Look, Panel, Unit};

const KIND: &str = "{{comm}} {{task}}";

const PROCESS: &str = "{{comm}} {{pid}}";

pub(super) const DASHBOARD: Dashboard = Dashboard {
    name: "deferred-work",
    title: "observer / Deferred work",
    description: "Work that requests leave behind: how much of which kind, how long it waits and runs, and what is never done.",
    choices: &[
        ("comm", "observer_deferred_enqueued_total"),
        ("pid", "observer_deferred_enqueued_total"),
        ("task", "observer_deferred_enqueued_total"),
    ],
    panels: &[
        Panel {
            title: "Pending",
            description: "Pieces that have not started. Timers are among them. Kinds that only the start tells are pending as one.",
            look: Look::Lines,
            unit: Unit::Count,
            queries: &[("topk(10, observer_deferred_pending{SELECTED})", KIND)],
            more: None,
        },
        Panel {
            title: "Oldest pending piece",
            description: "How long the piece has waited that has waited longest. Timers wait on purpose; what grows and grows is stuck.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[("topk(10, observer_deferred_oldest_seconds{SELECTED})", KIND)],
            more: None,
        },
        Panel {
            title: "Put off, started, ended",
            description: "Pieces of work, over all selected kinds. Where fewer start than are put off, pending work grows.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[
                ("sum(rate(observer_deferred_enqueued_total{SELECTED}[$__rate_interval]))", "put off"),
                ("sum(rate(observer_deferred_started_total{SELECTED}[$__rate_interval]))", "started"),
                ("sum(rate(observer_deferred_finished_total{SELECTED}[$__rate_interval]))", "ended"),
            ],
            more: None,
        },
        Panel {
            title: "Started by kind",
            description: "The ten kinds of which most starts.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[("topk(10, rate(observer_deferred_started_total{SELECTED}[$__rate_interval]))", KIND)],
            more: None,
        },
        Panel {
            title: "Waits, 99th percentile",
            description: "Time between being put off and the start, by kind. Long where that is wanted, as of timers, or where the loop is late.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[(
                "topk(10, histogram_quantile(0.99, sum by (le, job, instance, comm, container, pid, task) (rate(observer_deferred_wait_seconds_bucket{SELECTED}[$__rate_interval]))) >= 0)",
                KIND,
            )],
            more: Some(&("reactor", "Event loops of this process", &["instance", "comm", "pid"])),
        },
        Panel {
            title: "Runs, 99th percentile",
            description: "Time between the start of a piece and the last of it, pauses included, by kind.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[(
                "topk(10, histogram_quantile(0.99, sum by (le, job, instance, comm, container, pid, task) (rate(observer_deferred_run_seconds_bucket{SELECTED}[$__rate_interval]))) >= 0)",
                KIND,
            )],
            more: None,
        },
        Panel {
            title: "Waits",
            description: "Time between being put off and the start, over all selected kinds.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(observer_deferred_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.9, sum by (le) (rate(observer_deferred_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p90",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(observer_deferred_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p99",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Orphans by kind",
            description: "Pieces that were forgotten before they started. Cancelled timers are such; of other kinds it is work that is lost.",
            look: Look::Lines,
            unit: Unit::PerMinute,
            queries: &[(
                "topk(10, 60 * rate(observer_deferred_orphaned_total{SELECTED}[$__rate_interval]))",
                KIND,
            )],
            more: None,
        },
        Panel {
            title: "Work of unknown origin",
            description: "Times that work went on which was not known to have been put off. At first that is work from before observer came.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[(
                "topk(10, rate(observer_deferred_unmatched_total{PROCESS}[$__rate_interval]))",
                PROCESS,
            )],
            more: None,
        },
        Panel {
            title: "Hits of hooks",
            description: "Times that processes came to a place which a profile names. Each costs them 1 to 2 us.",
            look: Look::Stack,
            unit: Unit::PerSecond,
            queries: &[(
                "sum by (profile, verb) (rate(observer_deferred_hook_hits_total{PROCESS}[$__rate_interval]))",
                "{{profile}} {{verb}}",
            )],
            more: None,
        },
    ],
};
