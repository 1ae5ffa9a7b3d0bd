//! What is strived for, and how far the last figures are from it.

use super::statistics::Spread;

/// A figure that is to be no more than its limit.
pub(super) struct Goal {
    /// What its figure is kept under.
    pub(super) key: &'static str,
    what: &'static str,
    limit: f64,
    unit: &'static str,
}

pub(super) const TARGET_WAIT: Goal =
    Goal { key: "target_wait", what: "a target's wait and its return, net", limit: 100.0, unit: "ns" };
pub(super) const STRANGER_SWITCH: Goal =
    Goal { key: "stranger_switch", what: "a stranger's context switch, net", limit: 25.0, unit: "ns" };
pub(super) const STRANGER_WAIT: Goal =
    Goal { key: "stranger_wait", what: "a stranger's wait and its return, net", limit: 25.0, unit: "ns" };
pub(super) const LOOPS_TO_BPFTRACE: Goal = Goal {
    key: "loops_to_bpftrace",
    what: "the programs for event loops, of what those of bpftrace take for slices and run-queue delay",
    limit: 50.0,
    unit: "%",
};
pub(super) const NGINX_LOSS: Goal =
    Goal { key: "nginx_loss", what: "throughput that nginx loses at saturation", limit: 1.0, unit: "%" };
pub(super) const REDIS_LOSS: Goal =
    Goal { key: "redis_loss", what: "throughput that Redis loses at saturation", limit: 1.0, unit: "%" };
pub(super) const NGINX_TO_BPFTRACE: Goal = Goal {
    key: "nginx_to_bpftrace",
    what: "CPU time that nginx takes more for a request, of what it does beside bpftrace",
    limit: 50.0,
    unit: "%",
};
pub(super) const REDIS_TO_BPFTRACE: Goal = Goal {
    key: "redis_to_bpftrace",
    what: "CPU time that Redis takes more for a command, of what it does beside bpftrace",
    limit: 50.0,
    unit: "%",
};
pub(super) const CPU: Goal =
    Goal { key: "cpu", what: "observer's own CPU, of one, beside a busy nginx", limit: 1.0, unit: "%" };
pub(super) const MEMORY: Goal =
    Goal { key: "memory", what: "observer's resident memory with one target", limit: 20.0, unit: "MiB" };
pub(super) const MEMORY_OF_MANY: Goal = Goal {
    key: "memory_of_many",
    what: "observer's resident memory with a thousand targets",
    limit: 60.0,
    unit: "MiB",
};
pub(super) const SCRAPE_OF_MANY: Goal =
    Goal { key: "scrape_of_many", what: "a scrape of a thousand targets", limit: 100.0, unit: "ms" };
pub(super) const FIRST_FIGURE: Goal =
    Goal { key: "first_figure", what: "from the start to the first figure", limit: 300.0, unit: "ms" };

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

pub(super) const HEAD: [&str; 4] = ["goal", "at most", "figure", "met"];

impl Goal {
    /// A row of the table of goals.
    pub(super) fn row(&self, figure: Option<Spread>) -> Vec<String> {
        let Self { what, limit, unit, .. } = self;
        let (figure, verdict) = figure
            .map_or(("not measured, or lost in the noise".to_owned(), String::new()), |figure| {
                (figure.show(if figure.median < 10.0 { 2 } else { 0 }, unit), self.verdict(figure))
            });
        vec![(*what).to_owned(), format!("{limit} {unit}"), figure, verdict]
    }

    fn verdict(&self, Spread { low, median, high }: Spread) -> String {
        let limit = self.limit;
        // A limit between the quartiles is one that the rounds do not agree on.
        let doubt = if low <= limit && limit < high { "; within the spread" } else { "" };
        let verdict = if median <= limit { "yes" } else { "no" };
        let distance = if median <= 0.0 {
            "no cost to be seen".to_owned()
        } else if median <= limit {
            format!("{:.0} % of the limit", median / limit * 100.0)
        } else {
            format!("{:.1} times the limit", median / limit)
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
        assert_eq!(verdict(290.0, 330.0, 350.0), "no: 1.1 times the limit; within the spread");
        assert_eq!(verdict(-2.0, -1.0, 1.0), "yes: no cost to be seen");
        assert_eq!(FIRST_FIGURE.row(None)[2], "not measured, or lost in the noise");
    }
}
