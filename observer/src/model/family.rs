//! A metric: its name, unit and labels, and how its samples are found in a snapshot.

use super::{
    histogram::Histogram,
    snapshot::{Depths, Snapshot},
    subject::Subject,
};

/// What kind of figure a family holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down; told like this of several together.
    Gauge(Aggregation),
    /// A distribution, of durations in seconds unless the name says otherwise.
    Histogram,
}

/// What a gauge of several things together is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aggregation {
    /// All of theirs.
    Sum,
    /// The greatest of theirs.
    Max,
}

/// One figure of a family.
pub(crate) enum Value<'a> {
    /// A counter's or a gauge's.
    Number(f64),
    /// A histogram's of durations.
    Histogram(&'a Histogram),
    /// A histogram's of queue depths.
    Depths(&'a Depths),
}

/// Takes the figures of a family one by one: label values in the order of the family's labels, and the figure.
pub(crate) type Sink<'s> = dyn FnMut(Vec<String>, Value<'_>) + 's;

/// One metric.
pub(crate) struct Family {
    /// Its name in Prometheus' form, unit included.
    pub(crate) name: &'static str,
    /// Its name in OpenTelemetry's form, without the unit: what Prometheus makes of both is `name` again.
    pub(crate) otlp: &'static str,
    /// Its unit by the Unified Code for Units of Measure, what is counted in braces; empty if it has none.
    pub(crate) unit: &'static str,
    /// What it tells, in one line.
    pub(crate) help: &'static str,
    /// What kind it is.
    pub(crate) kind: Kind,
    /// Names of its labels.
    pub(crate) labels: &'static [&'static str],
    /// Finds its figures in a snapshot.
    pub(crate) collect: fn(&Snapshot, &mut Sink<'_>),
}

impl Family {
    /// What its series are about, as its labels tell.
    pub(crate) fn subject(&self) -> Subject {
        Subject::of(self.labels)
    }
}

#[expect(clippy::cast_precision_loss, reason = "exporters take floats; exact up to 2^53")]
pub(super) fn count(n: u64) -> Value<'static> {
    Value::Number(n as f64)
}
