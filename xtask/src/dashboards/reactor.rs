//! Reactor: how late event loops are, how busy, and why.

use super::dashboard::{Dashboard, Look, Panel, Unit};

const LOOP: &str = "{{comm}} {{reactor}} {{tid}}";

pub(super) const DASHBOARD: Dashboard = Dashboard {
    name: "reactor",
    title: "observer / Reactor",
    description: "How late event loops are, how busy, and why.",
    choices: &[
        ("comm", "observer_reactor_waits_total"),
        ("pid", "observer_reactor_waits_total"),
        ("tid", "observer_reactor_waits_total"),
    ],
    panels: &[
        Panel {
            title: "Lag",
            description: "Delay that something due at a random instant meets, over all selected loops. It counts a block that goes on, too.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(observer_reactor_lag_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.9, sum by (le) (rate(observer_reactor_lag_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p90",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(observer_reactor_lag_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p99",
                ),
                (
                    "sum(rate(observer_reactor_lag_seconds_sum{SELECTED}[$__rate_interval])) / sum(rate(observer_reactor_lag_seconds_count{SELECTED}[$__rate_interval]))",
                    "mean",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Mean lag by loop",
            description: "The ten loops that are latest on average.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[(
                "topk(10, rate(observer_reactor_lag_seconds_sum{SELECTED}[$__rate_interval]) / rate(observer_reactor_lag_seconds_count{SELECTED}[$__rate_interval]))",
                LOOP,
            )],
            more: None,
        },
        Panel {
            title: "Utilisation by loop",
            description: "Share of the time between waits for events. A loop at 100 % never waits: its queue grows.",
            look: Look::Lines,
            unit: Unit::Share,
            queries: &[(
                "topk(10, 1 - rate(observer_reactor_wait_seconds_total{SELECTED}[$__rate_interval]) / (rate(observer_reactor_wait_seconds_total{SELECTED}[$__rate_interval]) + ignoring(state, cause) sum without (state, cause) (rate(observer_reactor_busy_seconds_total{SELECTED}[$__rate_interval]))))",
                LOOP,
            )],
            more: None,
        },
        Panel {
            title: "Where busy time goes",
            description: "On a CPU: your code. Runqueue: waiting for one. The rest: blocked, and in what. Averaged over the selected loops.",
            look: Look::Stack,
            unit: Unit::Share,
            queries: &[(
                "sum by (state, cause) (rate(observer_reactor_busy_seconds_total{SELECTED}[$__rate_interval])) / on () group_left () count(rate(observer_reactor_wait_seconds_total{SELECTED}[$__rate_interval]))",
                "{{state}} {{cause}}",
            )],
            more: None,
        },
        Panel {
            title: "Stalls by cause",
            description: "Slices as long as the threshold (50 ms unless set) or longer, by what took most of their time.",
            look: Look::Stack,
            unit: Unit::PerMinute,
            queries: &[(
                "60 * sum by (cause) (rate(observer_reactor_stalls_total{SELECTED}[$__rate_interval]))",
                "{{cause}}",
            )],
            more: None,
        },
        Panel {
            title: "Slices",
            description: "Time between two waits for events, from when the first is over: how long nothing else could run.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(observer_reactor_slice_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(observer_reactor_slice_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p99",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Wake-ups",
            description: "Time between an event making a loop runnable and the loop running. Long ones are the machine's fault.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(observer_reactor_wakeup_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(observer_reactor_wakeup_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p99",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Garbage collection by loop",
            description: "Share of the time that a loop spends on collecting garbage, part of its utilisation; 0 where nobody knows.",
            look: Look::Lines,
            unit: Unit::Share,
            queries: &[(
                "topk(10, rate(observer_reactor_gc_seconds_total{SELECTED}[$__rate_interval]))",
                LOOP,
            )],
            more: None,
        },
        Panel {
            title: "Garbage collections",
            description: "Collections of each process, whichever of its threads they were in; only where the runtime can be watched.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[("topk(10, rate(observer_gc_total{PROCESS}[$__rate_interval]))", "{{comm}} {{pid}}")],
            more: None,
        },
        Panel {
            title: "Waits and events",
            description: "Waits for events, and events that they returned; a ring does not tell the latter.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[
                ("sum(rate(observer_reactor_waits_total{SELECTED}[$__rate_interval]))", "waits"),
                ("sum(rate(observer_reactor_events_total{SELECTED}[$__rate_interval]))", "events"),
            ],
            more: None,
        },
    ],
};
