//! Exemplars of histograms: the latest measurement that belongs to a span, which leads from a metric to a trace.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use opentelemetry::trace::SpanContext;
use opentelemetry_proto::tonic::metrics::v1::{Exemplar, exemplar::Value};

use super::time::nanoseconds;
use crate::model::subject::Subject;

/// Maximum number of series with an exemplar.
const SERIES: usize = 4096;

/// Name of a metric, process id, and kind of task or id of an event loop.
type Key = (&'static str, u32, Arc<str>);

/// Exemplars since the last push of metrics.
#[derive(Debug, Default)]
pub(super) struct Exemplars(HashMap<Key, Exemplar>);

impl Exemplars {
    /// Stores a measurement in seconds, with its time and its span, in place of the previous one of this series.
    pub(super) fn add(&mut self, key: Key, span: &SpanContext, seconds: f64, time: SystemTime) {
        if self.0.len() == SERIES && !self.0.contains_key(&key) {
            return;
        }
        let exemplar = Exemplar {
            time_unix_nano: nanoseconds(time),
            span_id: span.span_id().to_bytes().to_vec(),
            trace_id: span.trace_id().to_bytes().to_vec(),
            value: Some(Value::AsDouble(seconds)),
            ..Exemplar::default()
        };
        self.0.insert(key, exemplar);
    }

    /// The exemplar of a series of this metric and subject.
    pub(super) fn of(&self, metric: &'static str, subject: Subject<'_>) -> Option<Exemplar> {
        let (target, name) = match subject {
            Subject::Reactor(target, reactor) => (target, reactor.id.as_str().into()),
            Subject::Task(target, deferred) => (target, deferred.task.as_str().into()),
            _ => return None,
        };
        self.0.get(&(metric, target.pid, name)).cloned()
    }

    /// Forgets all exemplars after a push.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{SpanId, TraceFlags, TraceId, TraceState};

    use super::*;
    use crate::export::{live::testing::kind, otlp::testing::target};

    fn span(id: u64) -> SpanContext {
        SpanContext::new(TraceId::from(7), SpanId::from(id), TraceFlags::SAMPLED, false, TraceState::NONE)
    }

    #[test]
    fn the_latest_of_each_series_is_kept() {
        let mut exemplars = Exemplars::default();
        for (n, seconds) in [(1, 0.5), (2, 1.0)] {
            exemplars.add(("wait", 1, "mail".into()), &span(n), seconds, SystemTime::now());
        }
        let (target, other) = (target(1), target(2));
        let [mail, unknown] = ["mail", "unknown"].map(|task| kind(task, 1));
        let found = exemplars.of("wait", Subject::Task(&target, &mail)).unwrap();
        assert_eq!(found.span_id, SpanId::from(2).to_bytes());
        assert_eq!(found.value, Some(Value::AsDouble(1.0)));
        assert_eq!(exemplars.of("run", Subject::Task(&target, &mail)), None);
        assert_eq!(exemplars.of("wait", Subject::Task(&other, &mail)), None);
        assert_eq!(exemplars.of("wait", Subject::Task(&target, &unknown)), None);
        assert_eq!(exemplars.of("wait", Subject::Target(&target)), None);
        exemplars.clear();
        assert_eq!(exemplars.of("wait", Subject::Task(&target, &mail)), None);
    }

    #[test]
    fn there_is_a_limit() {
        let mut exemplars = Exemplars::default();
        for n in 0..=u32::try_from(SERIES).unwrap() {
            exemplars.add(("wait", n, "mail".into()), &span(1), 1.0, SystemTime::now());
        }
        assert_eq!(exemplars.0.len(), SERIES);
    }
}
