//! Which trace a request belongs to, and the ids of its spans. They are made of the numbers that requests and pieces of
//! work have anyhow, with a secret that each run draws anew: nobody has to remember them, and a piece of work knows the span
//! of the one that put it off whichever of both ends first.

use std::hash::{BuildHasher as _, RandomState};

use crate::model::{deferred::TraceContext, request::Request};

/// A span's id.
pub(super) type SpanId = [u8; 8];

/// Makes ids.
#[derive(Default)]
pub(super) struct Ids(RandomState);

/// What all spans of a trace have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) trace: [u8; 16],
    /// The span of whoever sent the request.
    pub(super) remote: Option<SpanId>,
    /// As W3C has them.
    pub(super) flags: u8,
    /// The request's own span, or that of a stall that has no request.
    pub(super) top: SpanId,
}

/// Set if the trace is recorded.
const SAMPLED: u8 = 1;

impl Ids {
    /// The trace of a request; `None` if whoever sent it does not want it recorded.
    pub(super) fn context(&self, request: &Request) -> Option<Context> {
        let top = self.span("request", request.id);
        let Some((trace, remote, flags)) = request.traceparent.as_deref().and_then(parsed) else {
            return Some(self.new_trace(top));
        };
        (flags & SAMPLED != 0).then_some(Context { trace, remote: Some(remote), flags, top })
    }

    /// The trace of a stall that is due to no request.
    pub(super) fn own_context(&self, tid: u32, start_ns: u64) -> Context {
        self.new_trace(self.stall(tid, start_ns))
    }

    fn new_trace(&self, top: SpanId) -> Context {
        let mut trace = [0; 16];
        trace[..8].copy_from_slice(&self.span("trace", top));
        trace[8..].copy_from_slice(&self.span("trace's other half", top));
        Context { trace, remote: None, flags: SAMPLED, top }
    }

    /// The span of a piece of work.
    pub(super) fn work(&self, number: u64) -> SpanId {
        self.span("work", number)
    }

    /// The span of a stall that a thread began at this time.
    pub(super) fn stall(&self, tid: u32, start_ns: u64) -> SpanId {
        self.span("stall", (tid, start_ns))
    }

    fn span(&self, kind: &str, what: impl std::hash::Hash) -> SpanId {
        self.number(kind, what).to_be_bytes()
    }

    /// Never 0, which is no id.
    fn number(&self, kind: &str, what: impl std::hash::Hash) -> u64 {
        self.0.hash_one((kind, what)).max(1)
    }
}

/// Trace and span that a process publishes.
pub(super) fn published(context: &TraceContext) -> Option<([u8; 16], SpanId)> {
    let trace = u128::from_str_radix(&context.trace_id, 16).ok()?.to_be_bytes();
    Some((trace, u64::from_str_radix(&context.span_id, 16).ok()?.to_be_bytes()))
}

/// Whether it has all three.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn is_understood(traceparent: &str) -> bool {
    parsed(traceparent).is_some()
}

/// Trace, span and flags of a valid trace context.
fn parsed(traceparent: &str) -> Option<([u8; 16], SpanId, u8)> {
    let mut parts = traceparent.split('-').skip(1);
    let trace = u128::from_str_radix(parts.next()?, 16).ok()?.to_be_bytes();
    let span = u64::from_str_radix(parts.next()?, 16).ok()?.to_be_bytes();
    Some((trace, span, u8::from_str_radix(parts.next()?, 16).ok()?))
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
        assert_eq!((trace[0], trace[15], span[0], span[7]), (0x0a, 0x9c, 0xb7, 0x31));
        assert_eq!(of("", "b7ad6b7169203331"), None);
    }

    #[test]
    fn a_trace_goes_on() {
        let ids = Ids::default();
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03";
        let context = ids.context(&request(1, Some(sent))).unwrap();
        assert_eq!(context.trace[..2], [0x0a, 0xf7]);
        assert_eq!(context.remote.unwrap()[6..], [0x33, 0x31]);
        assert_eq!(context.flags, 3);
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
        assert_ne!(one.trace[..8], one.trace[8..]);
        assert_ne!(Ids::default().context(&request(1, None)).unwrap().trace, one.trace);
        let spans = [one.top, other.top, ids.work(1), ids.work(2), ids.stall(1, 1), ids.stall(1, 2)];
        let distinct: std::collections::HashSet<_> = spans.iter().collect();
        assert_eq!(distinct.len(), spans.len());
        assert_eq!(ids.work(1), ids.work(1));
    }
}
