//! The definition of a metric: its name, unit and labels, and how its samples are read from a snapshot.

use super::{
    histogram::Histogram,
    snapshot::{Depths, Snapshot},
    subject::Subject,
};

/// Type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A value that only grows.
    Counter,
    /// A value that goes up and down. If several series are aggregated, their gauges are combined like this.
    Gauge(Aggregation),
    /// A distribution, of durations in seconds unless the name says otherwise.
    Histogram,
}

/// How the gauges of several series are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aggregation {
    /// Their sum.
    Sum,
    /// Their maximum.
    Max,
}

/// Value of a sample.
pub(crate) enum Value<'a> {
    /// Of a counter or a gauge.
    Number(f64),
    /// Of a histogram of durations.
    Histogram(&'a Histogram),
    /// Of a histogram of queue depths.
    Depths(&'a Depths),
}

/// Receives the samples of a family: the label values, in the order of the family's labels, and the value.
pub(crate) type Sink<'s> = dyn FnMut(Vec<String>, Value<'_>) + 's;

/// A metric: all series of one name.
pub(crate) struct Family {
    /// Name in Prometheus, including the unit.
    pub(crate) name: &'static str,
    /// Name in OpenTelemetry, without the unit. Prometheus derives `name` from it, the unit and the type.
    pub(crate) otlp: &'static str,
    /// Unit by the Unified Code for Units of Measure, with the things counted in braces; empty if there is none.
    pub(crate) unit: &'static str,
    /// Help text, one line.
    pub(crate) help: &'static str,
    /// Type.
    pub(crate) kind: Kind,
    /// Label names.
    pub(crate) labels: &'static [&'static str],
    /// Reads its samples from a snapshot.
    pub(crate) collect: fn(&Snapshot, &mut Sink<'_>),
}

impl Family {
    /// Subject of its series, which follows from the labels.
    pub(crate) fn subject(&self) -> Subject {
        Subject::of(self.labels)
    }
}

#[expect(clippy::cast_precision_loss, reason = "exporters take floats; exact up to 2^53")]
pub(super) fn count(n: u64) -> Value<'static> {
    Value::Number(n as f64)
}
