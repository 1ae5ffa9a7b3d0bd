//! The definition of a metric: its name, unit and labels, and how its samples are read from a snapshot.

use super::{
    histogram::Histogram,
    snapshot::{Depths, Snapshot},
    subject::{Labels, Subject, SubjectKind},
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

/// Receives the samples of a family.
pub(crate) struct Sink<'f, 's>(pub(crate) &'f mut dyn FnMut(Labels<'s>, Value<'s>));

impl<'s> Sink<'_, 's> {
    /// The only sample of a subject.
    pub(super) fn add(&mut self, subject: Subject<'s>, value: Value<'s>) {
        (self.0)(Labels { subject, own: Vec::new() }, value);
    }

    /// One of several samples of a subject, with the labels that distinguish it from the others.
    pub(super) fn add_with<const N: usize>(
        &mut self,
        subject: Subject<'s>,
        labels: [(&'static str, &'s str); N],
        value: Value<'s>,
    ) {
        (self.0)(Labels { subject, own: labels.map(|(name, label)| (name, label.into())).into() }, value);
    }
}

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
    /// Kind of the subjects of its series.
    pub(crate) subject: SubjectKind,
    /// Names of the labels that distinguish the series of a subject.
    pub(crate) own_labels: &'static [&'static str],
    /// Reads its samples from a snapshot.
    pub(crate) collect: for<'s> fn(&'s Snapshot, Sink<'_, 's>),
}

impl Family {
    /// Names of all labels of its series.
    pub(crate) fn labels(&self) -> impl Iterator<Item = &'static str> {
        self.subject.labels().iter().chain(self.own_labels).copied()
    }
}

#[expect(clippy::cast_precision_loss, reason = "exporters take floats; exact up to 2^53")]
pub(super) fn count(n: u64) -> Value<'static> {
    Value::Number(n as f64)
}
