//! The trace that a request belongs to, and the ids of its spans. Ids are hashes of the numbers that requests and
//! deferred tasks have anyway, keyed with a secret of this run. So none has to be remembered, and a task knows the span
//! of its parent whichever of the two ends first.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hash, RandomState},
};

use opentelemetry::{
    propagation::TextMapPropagator as _,
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;

use crate::model::{deferred::TraceContext, request::Request};

/// Derives ids.
#[derive(Default)]
pub(super) struct Ids(RandomState);

/// What all spans of a trace have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) trace: TraceId,
    /// The client's span, from the request's `traceparent`.
    pub(super) remote: Option<SpanId>,
    /// The span of the request itself, or of a stall that has no request.
    pub(super) top: SpanId,
}

impl Context {
    /// A span of this trace. Every trace that is exported is sampled.
    pub(super) fn span(&self, id: SpanId) -> SpanContext {
        SpanContext::new(self.trace, id, TraceFlags::SAMPLED, false, TraceState::NONE)
    }
}

impl Ids {
    /// The trace of a request; `None` if its client decided not to sample it.
    pub(super) fn context(&self, request: &Request) -> Option<Context> {
        let top = self.span("request", request.id);
        let Some(remote) = request.traceparent.as_deref().and_then(parsed) else {
            return Some(self.new_trace(top));
        };
        let context = Context { trace: remote.trace_id(), remote: Some(remote.span_id()), top };
        remote.is_sampled().then_some(context)
    }

    /// The trace of a stall that has no request.
    pub(super) fn own_context(&self, tid: u32, start_ns: u64) -> Context {
        self.new_trace(self.stall(tid, start_ns))
    }

    fn new_trace(&self, top: SpanId) -> Context {
        let halves =
            ["trace", "trace's other half"].map(|half| u128::from(self.number(half, top.to_bytes())));
        Context { trace: TraceId::from(halves[0] << 64 | halves[1]), remote: None, top }
    }

    /// The span of a deferred task.
    pub(super) fn work(&self, number: u64) -> SpanId {
        self.span("work", number)
    }

    /// The span of the stall that began on a thread at this time.
    pub(super) fn stall(&self, tid: u32, start_ns: u64) -> SpanId {
        self.span("stall", (tid, start_ns))
    }

    fn span(&self, kind: &str, key: impl Hash) -> SpanId {
        SpanId::from(self.number(kind, key))
    }

    /// Never 0, which is not a valid id.
    fn number(&self, kind: &str, key: impl Hash) -> u64 {
        self.0.hash_one((kind, key)).max(1)
    }
}

/// The trace and span that a process publishes.
pub(super) fn published(context: &TraceContext) -> Option<(TraceId, SpanId)> {
    let (trace, span) = (TraceId::from_hex(&context.trace_id), SpanId::from_hex(&context.span_id));
    Some((trace.ok()?, span.ok()?))
}

/// Whether a `traceparent` that was read from a request is valid for the exporter as well.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn is_valid(traceparent: &str) -> bool {
    parsed(traceparent).is_some()
}

/// The client's span in a `traceparent`; `None` if that is invalid.
fn parsed(traceparent: &str) -> Option<SpanContext> {
    let headers = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let remote = TraceContextPropagator::new().extract(&headers).span().span_context().clone();
    remote.is_valid().then_some(remote)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: u64, traceparent: Option<&str>) -> Request {
        Request { id, traceparent: traceparent.map(str::to_owned), ..Request::default() }
    }

    #[test]
    fn what_a_process_publishes_is_understood() {
        let of = |trace: &str, span: &str| {
            published(&TraceContext { trace_id: trace.into(), span_id: span.into() })
        };
        let (trace, span) = of("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331").unwrap();
        assert_eq!(trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span.to_string(), "b7ad6b7169203331");
        assert_eq!(of("", "b7ad6b7169203331"), None);
    }

    #[test]
    fn a_trace_goes_on() {
        let ids = Ids::default();
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03";
        let context = ids.context(&request(1, Some(sent))).unwrap();
        assert_eq!(context.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(context.remote.unwrap().to_string(), "b7ad6b7169203331");
        assert_eq!(context.top, ids.context(&request(1, None)).unwrap().top);
        assert_eq!(ids.context(&request(1, Some(&sent.replace("-03", "-02")))), None);
    }

    #[test]
    fn ids_are_the_same_again_and_no_others() {
        let ids = Ids::default();
        let one = ids.context(&request(1, None)).unwrap();
        assert_eq!(Some(&one), ids.context(&request(1, None)).as_ref());
        let other = ids.context(&request(2, None)).unwrap();
        assert_ne!(one.trace, other.trace);
        let bytes = one.trace.to_bytes();
        assert_ne!(bytes[..8], bytes[8..]);
        assert_ne!(Ids::default().context(&request(1, None)).unwrap().trace, one.trace);
        let spans = [one.top, other.top, ids.work(1), ids.work(2), ids.stall(1, 1), ids.stall(1, 2)];
        let distinct: std::collections::HashSet<_> = spans.iter().collect();
        assert_eq!(distinct.len(), spans.len());
        assert_eq!(ids.work(1), ids.work(1));
    }
}
