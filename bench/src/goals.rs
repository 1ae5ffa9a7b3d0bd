//! The goals for observer's costs, and how far the measured values are from them.

use crate::statistics::Spread;

/// An upper limit for a measured value.
pub(crate) struct Goal {
    /// The key of its value in JSON files.
    pub(crate) key: &'static str,
    name: &'static str,
    limit: f64,
    unit: &'static str,
    /// What causes the cost, shown where the goal is missed.
    cause: &'static str,
}

pub(crate) const TARGET_WAIT: Goal = goal(
    "target_wait",
    "a wait and its return in a target, net",
    (100.0, "ns"),
    "reading the clock, about 50 ns, unless the wait has blocked; and two programs that each look up their thread and \
     end a phase of it, whose code and memory a busy server evicts from the near caches between two waits",
);
pub(crate) const OTHER_SWITCH: Goal = goal(
    "other_switch",
    "a context switch between other processes, net",
    (25.0, "ns"),
    "reading the ids of two threads, and for each a word of the id filter, from memory that is seldom in a near cache",
);
pub(crate) const OTHER_WAIT: Goal = goal(
    "other_wait",
    "a wait and its return in another process, net",
    (25.0, "ns"),
    "two programs that each read the ids of their thread and process, and a word of the id filter for both",
);
pub(crate) const LOOPS_TO_BPFTRACE: Goal = goal(
    "loops_to_bpftrace",
    "run time of the reactor probe, relative to slices.bt",
    (50.0, "%"),
    "see a wait in a target",
);
pub(crate) const NGINX_LOSS: Goal = goal(
    "nginx_loss",
    "loss of throughput of nginx at saturation",
    (1.0, "%"),
    "calling the programs rather than their run time: observer on another process costs the same, and bpftrace, which \
     does less, as well; every system call and context switch takes a slower path while any program is attached to one",
);
pub(crate) const REDIS_LOSS: Goal = goal(
    "redis_loss",
    "loss of throughput of Redis at saturation",
    (1.0, "%"),
    "as with nginx, and the load generator is saturated: its system calls take the same slower path with either tool, \
     but with bpftrace Redis spends more time per command, so it finds more commands at once and sleeps less often",
);
pub(crate) const NGINX_TO_BPFTRACE: Goal = goal(
    "nginx_to_bpftrace",
    "additional CPU time of nginx per request, relative to that with bpftrace",
    (50.0, "%"),
    "calling the programs, which costs the same for both tools",
);
pub(crate) const REDIS_TO_BPFTRACE: Goal = goal(
    "redis_to_bpftrace",
    "additional CPU time of Redis per command, relative to that with bpftrace",
    (50.0, "%"),
    "as with nginx",
);
pub(crate) const CPU: Goal = goal(
    "cpu",
    "CPU usage of observer with a busy nginx as its target",
    (1.0, "%"),
    "processes, listeners and metrics are refreshed once a second",
);
pub(crate) const MEMORY: Goal = goal(
    "memory",
    "resident memory of observer with one target",
    (20.0, "MiB"),
    "most of it is the executable",
);
pub(crate) const MEMORY_OF_MANY: Goal = goal(
    "memory_of_many",
    "resident memory of observer with 1,000 targets",
    (60.0, "MiB"),
    "the last values of event loops and listeners, and the page of the last scrape",
);
pub(crate) const SCRAPE_OF_MANY: Goal = goal(
    "scrape_of_many",
    "a scrape with 1,000 targets",
    (100.0, "ms"),
    "one half is reading maps and /proc, the other half formatting the text",
);
pub(crate) const FIRST_METRIC: Goal = goal(
    "first_metric",
    "time from the start to the first metric",
    (300.0, "ms"),
    "the verifier, which checks all paths through all programs",
);

const fn goal(
    key: &'static str,
    name: &'static str,
    (limit, unit): (f64, &'static str),
    cause: &'static str,
) -> Goal {
    Goal { key, name, limit, unit, cause }
}

pub(crate) const ALL: [&Goal; 13] = [
    &TARGET_WAIT,
    &OTHER_SWITCH,
    &OTHER_WAIT,
    &LOOPS_TO_BPFTRACE,
    &NGINX_LOSS,
    &REDIS_LOSS,
    &NGINX_TO_BPFTRACE,
    &REDIS_TO_BPFTRACE,
    &CPU,
    &MEMORY,
    &MEMORY_OF_MANY,
    &SCRAPE_OF_MANY,
    &FIRST_METRIC,
];

pub(crate) const HEAD: [&str; 5] = ["goal", "limit", "measured", "met", "cause, if missed"];

impl Goal {
    /// A row of the table of goals.
    pub(crate) fn row(&self, value: Option<Spread>) -> Vec<String> {
        let Self { name, limit, unit, .. } = self;
        let begin = [(*name).to_owned(), format!("{limit} {unit}")];
        let end = match value {
            None => ["not measured, or below the noise".to_owned(), String::new(), String::new()],
            Some(value) => {
                let cause = if value.median > *limit { self.cause } else { "" };
                let digits = if value.median < 10.0 { 2 } else { 0 };
                [value.show(digits, unit), self.verdict(value), cause.to_owned()]
            }
        };
        begin.into_iter().chain(end).collect()
    }

    fn verdict(&self, Spread { low, median, high }: Spread) -> String {
        let limit = self.limit;
        // The limit is within the quartiles, so the rounds disagree about it.
        let doubt = if low <= limit && limit < high { "; the limit is within the spread" } else { "" };
        let verdict = if median <= limit { "yes" } else { "no" };
        let distance = if median <= 0.0 {
            "no measurable cost".to_owned()
        } else {
            format!("{:.0} % of the limit", median / limit * 100.0)
        };
        format!("{verdict}: {distance}{doubt}")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{ALL, FIRST_METRIC, Spread};

    #[test]
    fn keys_are_unique() {
        assert_eq!(ALL.map(|goal| goal.key).iter().collect::<BTreeSet<_>>().len(), ALL.len());
    }

    #[test]
    fn a_verdict_has_the_distance_and_the_doubt() {
        let verdict = |low, median, high| FIRST_METRIC.verdict(Spread { low, median, high });
        assert_eq!(verdict(140.0, 150.0, 160.0), "yes: 50 % of the limit");
        assert_eq!(verdict(290.0, 330.0, 350.0), "no: 110 % of the limit; the limit is within the spread");
        assert_eq!(verdict(-2.0, -1.0, 1.0), "yes: no measurable cost");
        assert_eq!(FIRST_METRIC.row(None)[2], "not measured, or below the noise");
    }
}
