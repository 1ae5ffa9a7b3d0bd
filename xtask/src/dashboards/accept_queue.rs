//! Accept queue: how many connections wait to be accepted, for how long, and which are turned away.

use super::dashboard::{Dashboard, Look, Panel, Unit};

const LISTENER: &str = "{{comm}} {{listener}}";

pub(super) const DASHBOARD: Dashboard = Dashboard {
    name: "accept-queue",
    title: "observer / Accept queue",
    description: "How many connections wait to be accepted, for how long, and which are turned away.",
    choices: &[
        ("comm", "observer_accept_queue_limit"),
        ("pid", "observer_accept_queue_limit"),
        ("listener", "observer_accept_queue_limit"),
    ],
    panels: &[
        Panel {
            title: "Depth",
            description: "Connections that wait to be accepted, now and at most since observer came.",
            look: Look::Lines,
            unit: Unit::Count,
            queries: &[
                ("topk(10, observer_accept_queue_depth{SELECTED})", "{{comm}} {{listener}} now"),
                ("topk(10, observer_accept_queue_peak{SELECTED})", "{{comm}} {{listener}} peak"),
            ],
            more: None,
        },
        Panel {
            title: "Fill",
            description: "Depth as a share of the most that may wait. At 100 % the kernel drops connections.",
            look: Look::Lines,
            unit: Unit::Share,
            queries: &[(
                "topk(10, clamp_max(observer_accept_queue_depth{SELECTED} / (observer_accept_queue_limit{SELECTED} > 0), 1))",
                LISTENER,
            )],
            more: None,
        },
        Panel {
            title: "Waits to be accepted",
            description: "Time between the end of the handshake and the return of accept, over all selected listeners.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(observer_accept_queue_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.9, sum by (le) (rate(observer_accept_queue_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p90",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(observer_accept_queue_wait_seconds_bucket{SELECTED}[$__rate_interval])))",
                    "p99",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Oldest waiting connection",
            description: "How long the first in the queue has waited. A server that has stopped accepting has no waits, only this.",
            look: Look::Lines,
            unit: Unit::Seconds,
            queries: &[("topk(10, observer_accept_queue_oldest_seconds{SELECTED})", LISTENER)],
            more: None,
        },
        Panel {
            title: "Arrivals and accepts",
            description: "Connections that joined the queue, and those accepted from it.",
            look: Look::Lines,
            unit: Unit::PerSecond,
            queries: &[
                ("sum(rate(observer_accept_queue_arrivals_total{SELECTED}[$__rate_interval]))", "arrivals"),
                ("sum(rate(observer_accept_queue_accepts_total{SELECTED}[$__rate_interval]))", "accepts"),
            ],
            more: None,
        },
        Panel {
            title: "Turned away and given up",
            description: "Dropped by a full queue (where certain), dropped for any reason, and reset by their clients while they waited.",
            look: Look::Lines,
            unit: Unit::PerMinute,
            queries: &[
                (
                    "60 * sum(rate(observer_accept_queue_overflows_total{SELECTED}[$__rate_interval]))",
                    "overflows",
                ),
                ("60 * sum(rate(observer_accept_queue_drops_total{SELECTED}[$__rate_interval]))", "drops"),
                (
                    "60 * sum(rate(observer_accept_queue_aborted_total{SELECTED}[$__rate_interval]))",
                    "aborted",
                ),
            ],
            more: None,
        },
        Panel {
            title: "Depth met by accepts, 99th percentile",
            description: "Connections that waited when one was accepted, that one included. It sees what a look now and then misses.",
            look: Look::Lines,
            unit: Unit::Count,
            queries: &[(
                "topk(10, histogram_quantile(0.99, rate(observer_accept_queue_depth_on_accept_bucket{SELECTED}[$__rate_interval])))",
                LISTENER,
            )],
            more: None,
        },
        Panel {
            title: "Handshakes not done",
            description: "Connections whose handshake has begun. Many that stay are a flood of SYNs, or a network that loses answers.",
            look: Look::Lines,
            unit: Unit::Count,
            queries: &[("topk(10, observer_accept_queue_half_open{SELECTED})", LISTENER)],
            more: None,
        },
    ],
};
