//! What is strived for, and how far the last figures are from it.

use super::statistics::Spread;

/// A figure that is to be no more than its limit.
pub(super) struct Goal {
    /// What its figure is kept under.
    pub(super) key: &'static str,
    what: &'static str,
    limit: f64,
    unit: &'static str,
    /// What takes it, for whoever asks why it is not less.
    taken_by: &'static str,
}

pub(super) const TARGET_WAIT: Goal = goal(
    "target_wait",
    "a target's wait and its return, net",
    (100.0, "ns"),
    "a look at the clock, some 50 ns, where a wait has not blocked, and two programs that each find their thread and end one \
     phase of it: code and memory that a busy server drives out of the near caches between two waits",
);
pub(super) const STRANGER_SWITCH: Goal = goal(
    "stranger_switch",
    "a stranger's context switch, net",
    (25.0, "ns"),
    "reads the ids of two threads from their structures, and a word for each that tells whether anybody can know it: \
     memory that is seldom in a near cache",
);
pub(super) const STRANGER_WAIT: Goal = goal(
    "stranger_wait",
    "a stranger's wait and its return, net",
    (25.0, "ns"),
    "two programs that each read their thread's id and the words that tell whether anybody can know it and its process",
);
pub(super) const LOOPS_TO_BPFTRACE: Goal = goal(
    "loops_to_bpftrace",
    "the programs for event loops, of what those of bpftrace take for slices and run-queue delay",
    (50.0, "%"),
    "the same as a target's wait",
);
pub(super) const NGINX_LOSS: Goal = goal(
    "nginx_loss",
    "throughput that nginx loses at saturation",
    (1.0, "%"),
    "the way to programs rather than what they do: observer on another process takes as much, and so does bpftrace for less; \
     every system call and context switch goes a longer way while anybody hooks some",
);
pub(super) const REDIS_LOSS: Goal = goal(
    "redis_loss",
    "throughput that Redis loses at saturation",
    (1.0, "%"),
    "as with nginx, and the load is what is saturated: its calls go the same longer way with either tool, but beside bpftrace Redis \
     itself takes more for each, and so finds more commands at once and sleeps less often",
);
pub(super) const NGINX_TO_BPFTRACE: Goal = goal(
    "nginx_to_bpftrace",
    "CPU time that nginx takes more for a request, of what it does beside bpftrace",
    (50.0, "%"),
    "the way to programs, which is the same for both",
);
pub(super) const REDIS_TO_BPFTRACE: Goal = goal(
    "redis_to_bpftrace",
    "CPU time that Redis takes more for a command, of what it does beside bpftrace",
    (50.0, "%"),
    "as with nginx",
);
pub(super) const CPU: Goal = goal(
    "cpu",
    "observer's own CPU, of one, beside a busy nginx",
    (1.0, "%"),
    "processes, listeners and figures are looked after once a second",
);
pub(super) const MEMORY: Goal = goal(
    "memory",
    "observer's resident memory with one target",
    (20.0, "MiB"),
    "most of it is the program itself",
);
pub(super) const MEMORY_OF_MANY: Goal = goal(
    "memory_of_many",
    "observer's resident memory with a thousand targets",
    (60.0, "MiB"),
    "figures of loops and listeners as they were last read, and the page of the last scrape",
);
pub(super) const SCRAPE_OF_MANY: Goal = goal(
    "scrape_of_many",
    "a scrape of a thousand targets",
    (100.0, "ms"),
    "half is reading maps and /proc, half is making the text",
);
pub(super) const FIRST_FIGURE: Goal = goal(
    "first_figure",
    "from the start to the first figure",
    (300.0, "ms"),
    "the verifier, which has to go through every way through every program",
);

const fn goal(
    key: &'static str,
    what: &'static str,
    (limit, unit): (f64, &'static str),
    taken_by: &'static str,
) -> Goal {
    Goal { key, what, limit, unit, taken_by }
}

pub(super) const ALL: [&Goal; 13] = [
    &TARGET_WAIT,
    &STRANGER_SWITCH,
    &STRANGER_WAIT,
    &LOOPS_TO_BPFTRACE,
    &NGINX_LOSS,
    &REDIS_LOSS,
    &NGINX_TO_BPFTRACE,
    &REDIS_TO_BPFTRACE,
    &CPU,
    &MEMORY,
    &MEMORY_OF_MANY,
    &SCRAPE_OF_MANY,
    &FIRST_FIGURE,
];

pub(super) const HEAD: [&str; 5] = ["goal", "at most", "figure", "met", "where not: what takes it"];

impl Goal {
    /// A row of the table of goals.
    pub(super) fn row(&self, figure: Option<Spread>) -> Vec<String> {
        let Self { what, limit, unit, .. } = self;
        let begin = [(*what).to_owned(), format!("{limit} {unit}")];
        let end = match figure {
            None => ["not measured, or lost in the noise".to_owned(), String::new(), String::new()],
            Some(figure) => {
                let taken_by = if figure.median > *limit { self.taken_by } else { "" };
                let digits = if figure.median < 10.0 { 2 } else { 0 };
                [figure.show(digits, unit), self.verdict(figure), taken_by.to_owned()]
            }
        };
        begin.into_iter().chain(end).collect()
    }

    fn verdict(&self, Spread { low, median, high }: Spread) -> String {
        let limit = self.limit;
        // A limit between the quartiles is one that the rounds do not agree on.
        let doubt = if low <= limit && limit < high { "; within the spread" } else { "" };
        let verdict = if median <= limit { "yes" } else { "no" };
        let distance = if median <= 0.0 {
            "no cost to be seen".to_owned()
        } else {
            format!("{:.0} % of the limit", median / limit * 100.0)
        };
        format!("{verdict}: {distance}{doubt}")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{ALL, FIRST_FIGURE, Spread};

    #[test]
    fn goals_are_kept_apart() {
        assert_eq!(ALL.map(|goal| goal.key).iter().collect::<BTreeSet<_>>().len(), ALL.len());
    }

    #[test]
    fn a_verdict_tells_the_distance_and_the_doubt() {
        let verdict = |low, median, high| FIRST_FIGURE.verdict(Spread { low, median, high });
        assert_eq!(verdict(140.0, 150.0, 160.0), "yes: 50 % of the limit");
        assert_eq!(verdict(290.0, 330.0, 350.0), "no: 110 % of the limit; within the spread");
        assert_eq!(verdict(-2.0, -1.0, 1.0), "yes: no cost to be seen");
        assert_eq!(FIRST_FIGURE.row(None)[2], "not measured, or lost in the noise");
    }
}
