//! The latest measurement of a histogram that has a trace: leads from a figure to a request that it is made of.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use opentelemetry::trace::SpanContext;
use opentelemetry_proto::tonic::metrics::v1::{Exemplar, exemplar::Value};

use super::nanoseconds;

/// Most series that have one at a time.
const SERIES: usize = 4096;

/// A metric's name in the catalog, a process, and what tells its series apart: a kind of work, or a thread.
type Key = (&'static str, u32, Arc<str>);

/// Exemplars since the last push.
#[derive(Debug, Default)]
pub(super) struct Exemplars(HashMap<Key, Exemplar>);

impl Exemplars {
    /// Keeps a measurement in seconds, its time and the span that it was measured in.
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

    /// That of a series, by its labels.
    pub(super) fn of(&self, metric: &'static str, labels: &[String]) -> Vec<Exemplar> {
        let [pid, _, _, _, what, ..] = labels else { return Vec::new() };
        let Ok(pid) = pid.parse() else { return Vec::new() };
        self.0.get(&(metric, pid, what.as_str().into())).cloned().into_iter().collect()
    }

    /// They have been pushed.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{SpanId, TraceFlags, TraceId, TraceState};

    use super::*;

    fn span(id: u64) -> SpanContext {
        SpanContext::new(TraceId::from(7), SpanId::from(id), TraceFlags::SAMPLED, false, TraceState::NONE)
    }

    #[test]
    fn the_latest_of_each_series_is_kept() {
        let mut exemplars = Exemplars::default();
        for (n, seconds) in [(1, 0.5), (2, 1.0)] {
            exemplars.add(("wait", 1, "mail".into()), &span(n), seconds, SystemTime::now());
        }
        let labels = |pid: &str, task: &str| [pid, "app", "", "", task].map(str::to_owned);
        let found = exemplars.of("wait", &labels("1", "mail"));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].span_id, SpanId::from(2).to_bytes());
        assert_eq!(found[0].value, Some(Value::AsDouble(1.0)));
        for (metric, labels) in [
            ("run", labels("1", "mail")),
            ("wait", labels("2", "mail")),
            ("wait", labels("1", "other")),
            ("wait", labels("other", "other")),
        ] {
            assert!(exemplars.of(metric, &labels).is_empty());
        }
        assert!(exemplars.of("wait", &[]).is_empty());
        exemplars.clear();
        assert!(exemplars.of("wait", &labels("1", "mail")).is_empty());
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
