//! Requests, what was put off for them and how they stalled, as OTLP traces. A span is sent when what it tells is over; that
//! of a request waits for its answer, but not for ever.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use opentelemetry_proto::tonic::{
    common::v1::{InstrumentationScope, KeyValue, any_value::Value},
    trace::v1::{
        ResourceSpans, ScopeSpans, Span, Status,
        span::{Event as SpanEvent, Link, SpanKind},
        status::StatusCode,
    },
};
use prost::Message as _;

use super::{
    attribute::{attribute, nanoseconds, text},
    context::{Context, Ids, SpanId, published},
    exemplars::{self, Exemplars},
    resource::Resources,
    signal::{Batch, TraceRequest},
};
use crate::{
    kernel::clock,
    model::{
        histogram::seconds,
        request::Request as Asked,
        stall::Stall,
        trace::{Event, What, Work},
    },
    process::Process,
};

/// How long a request may be without an answer before it is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests that are remembered: those that wait for their answer, and those that are told. As many as are known by number.
const REMEMBERED: usize = 32_768;

/// Most stalls that are told with a request.
const STALLS: usize = 32;

/// Spans of a process in one request; a request is full when it has so many bytes.
const SPANS: usize = 1024;
const REQUEST: usize = 1 << 20;

/// Whether the parent of a span is of another process is known, and that it is.
const KNOWS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// Metrics whose measurements are spans.
const WAIT: &str = "observer_deferred_wait_seconds";
const RUN: &str = "observer_deferred_run_seconds";
const SLICE: &str = "observer_reactor_slice_seconds";

/// Methods that HTTP has; others are not named, for anybody can think of one.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Makes spans.
#[derive(Default)]
pub(super) struct Tracer {
    ids: Ids,
    requests: HashMap<u64, State>,
    /// From the oldest on.
    order: VecDeque<u64>,
}

/// How far a request has been told.
enum State {
    Open(Open),
    Told,
}

/// A request that has not been told.
struct Open {
    pid: u32,
    request: Arc<Asked>,
    context: Context,
    since: Instant,
    /// The last that is known of it, monotonic nanoseconds.
    last_ns: u64,
    stalls: Vec<SpanEvent>,
    stalls_dropped: u32,
}

/// Spans by process.
type Spans = BTreeMap<u32, Vec<Span>>;

impl Tracer {
    /// Makes spans of what has happened, and of requests that have been answered or have waited for long enough; of all of
    /// them if these are the last.
    pub(super) fn spans(
        &mut self,
        events: VecDeque<Event>,
        exemplars: &mut Exemplars,
        are_last: bool,
    ) -> Spans {
        let mut spans = Spans::new();
        for Event { pid, what } in events {
            let span = match what {
                What::Work(request, work) => {
                    let Some(context) = self.remember(pid, &request, &mut spans) else { continue };
                    let span = work_span(&self.ids, &context, &work);
                    add_exemplars(exemplars, pid, &work, &span);
                    if let Some(open) = self.open(&request) {
                        open.last_ns = open.last_ns.max(work.ended_ns);
                    }
                    Some(span)
                }
                What::Stall(tid, start_ns, stall) => {
                    let context = match &stall.origin {
                        Some(request) => self.remember(pid, request, &mut spans),
                        None => Some(self.ids.own_context(tid, start_ns)),
                    };
                    let Some(context) = context else { continue };
                    let end = nanoseconds(clock::wall_time(start_ns)) + length(&stall);
                    let whose = exemplars::Span { trace: &context.trace, id: &context.top };
                    let key = (SLICE, pid, tid.to_string().into());
                    exemplars.add(key, &whose, stall.seconds, end);
                    let span = stall_span(&self.ids, &context, tid, start_ns, &stall);
                    match stall.origin.as_ref().and_then(|request| self.open(request)) {
                        Some(open) => {
                            open.add(tid, start_ns, &stall);
                            None
                        }
                        None => Some(span),
                    }
                }
            };
            spans.entry(pid).or_default().extend(span);
        }
        for state in self.requests.values_mut() {
            if let State::Open(open) = state
                && (are_last || open.is_due())
                && let State::Open(open) = mem::replace(state, State::Told)
            {
                spans.entry(open.pid).or_default().push(open.into());
            }
        }
        spans
    }

    /// A request that is not told yet.
    fn open(&mut self, request: &Asked) -> Option<&mut Open> {
        match self.requests.get_mut(&request.id)? {
            State::Open(open) => Some(open),
            State::Told => None,
        }
    }

    /// The trace of a request, which is opened if nothing was known of it; `None` if it is not wanted. The oldest is told,
    /// if need be, and forgotten.
    fn remember(&mut self, pid: u32, request: &Arc<Asked>, spans: &mut Spans) -> Option<Context> {
        let context = self.ids.context(request)?;
        if self.requests.contains_key(&request.id) {
            return Some(context);
        }
        let open = Open {
            pid,
            request: Arc::clone(request),
            context: context.clone(),
            since: Instant::now(),
            last_ns: request.at_ns,
            stalls: Vec::new(),
            stalls_dropped: 0,
        };
        self.requests.insert(request.id, State::Open(open));
        self.order.push_back(request.id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
            && let Some(State::Open(open)) = self.requests.remove(&oldest)
        {
            spans.entry(open.pid).or_default().push(open.into());
        }
        Some(context)
    }
}

impl Open {
    fn is_due(&self) -> bool {
        self.request.answered.get().is_some() || self.since.elapsed() >= PATIENCE
    }

    /// A thread stalled with it.
    fn add(&mut self, tid: u32, start_ns: u64, stall: &Stall) {
        let length = length(stall);
        self.last_ns = self.last_ns.max(start_ns + length);
        if self.stalls.len() < STALLS {
            let mut attributes = of_stall(tid, stall);
            attributes.push(attribute("observer.stall.duration", Value::DoubleValue(stall.seconds)));
            self.stalls.push(SpanEvent {
                time_unix_nano: nanoseconds(clock::wall_time(start_ns)),
                name: "stall".into(),
                attributes,
                ..SpanEvent::default()
            });
        } else {
            self.stalls_dropped += 1;
        }
    }
}

/// The span of a request.
impl From<Open> for Span {
    fn from(open: Open) -> Self {
        let Open { request, context, last_ns, stalls, stalls_dropped, .. } = open;
        let mut attributes = Vec::new();
        let mut name = "request";
        if let Some(method) = request.method.as_deref() {
            let known = METHODS.into_iter().find(|known| *known == method);
            name = known.unwrap_or("HTTP");
            attributes.push(text("http.request.method", known.unwrap_or("_OTHER")));
        }
        if let Some(path) = &request.path {
            attributes.push(text("url.path", path.as_str()));
        }
        let answered = request.answered.get();
        if answered.is_none() {
            attributes.push(attribute("observer.request.answered", Value::BoolValue(false)));
        }
        let remote = if context.remote.is_some() { IS_REMOTE } else { 0 };
        // One reading of the clocks: the wall's may be set between two.
        let start = nanoseconds(clock::wall_time(request.at_ns));
        let end = answered.unwrap_or(&last_ns).saturating_sub(request.at_ns);
        Self {
            trace_id: context.trace.into(),
            span_id: context.top.into(),
            parent_span_id: context.remote.map_or_else(Vec::new, Into::into),
            flags: u32::from(context.flags) | KNOWS_REMOTE | remote,
            name: name.into(),
            kind: SpanKind::Server.into(),
            start_time_unix_nano: start,
            end_time_unix_nano: start + end,
            attributes,
            events: stalls,
            dropped_events_count: stalls_dropped,
            ..Self::default()
        }
    }
}

/// A span of a trace; one that is its own parent is at the top.
fn span(context: &Context, id: SpanId, parent: SpanId, name: &str, kind: SpanKind) -> Span {
    Span {
        trace_id: context.trace.into(),
        span_id: id.into(),
        parent_span_id: if parent == id { Vec::new() } else { parent.into() },
        flags: u32::from(context.flags) | KNOWS_REMOTE,
        name: name.into(),
        kind: kind.into(),
        ..Span::default()
    }
}

/// The span of a piece of deferred work.
fn work_span(ids: &Ids, context: &Context, work: &Work) -> Span {
    let parent = work.parent.map_or(context.top, |parent| ids.work(parent));
    let start_ns = work.started_ns.unwrap_or(work.queued_ns);
    let start = nanoseconds(clock::wall_time(start_ns));
    let waited_until = work.started_ns.unwrap_or(work.ended_ns);
    let wait = seconds(waited_until.saturating_sub(work.queued_ns));
    let link = Link {
        trace_id: context.trace.into(),
        span_id: parent.into(),
        flags: u32::from(context.flags) | KNOWS_REMOTE,
        ..Link::default()
    };
    let mut attributes = vec![attribute("observer.deferred.wait", Value::DoubleValue(wait))];
    attributes.extend(work.request_id.as_ref().map(|id| text("observer.request.id", id.as_str())));
    let orphaned = Status { message: "orphaned".into(), code: StatusCode::Error.into() };
    let mut span = Span {
        start_time_unix_nano: start,
        end_time_unix_nano: start + work.ended_ns.saturating_sub(start_ns),
        attributes,
        links: vec![link],
        status: work.started_ns.is_none().then_some(orphaned),
        ..span(context, ids.work(work.id), parent, &work.task, SpanKind::Consumer)
    };
    // What the process itself says counts for more; the link still leads to what put it off.
    if let Some((trace, in_span)) = work.context.as_ref().and_then(published) {
        span.trace_id = trace.into();
        span.parent_span_id = in_span.into();
    }
    span
}

/// What was measured of work that has started.
fn add_exemplars(exemplars: &mut Exemplars, pid: u32, work: &Work, span: &Span) {
    let Some(started) = work.started_ns else { return };
    let whose = exemplars::Span { trace: &span.trace_id, id: &span.span_id };
    let wait = seconds(started.saturating_sub(work.queued_ns));
    exemplars.add((WAIT, pid, Arc::clone(&work.task)), &whose, wait, span.start_time_unix_nano);
    let run = seconds(work.ended_ns.saturating_sub(started));
    exemplars.add((RUN, pid, Arc::clone(&work.task)), &whose, run, span.end_time_unix_nano);
}

/// The span of a stall that has no request, or one that has been told.
fn stall_span(ids: &Ids, context: &Context, tid: u32, start_ns: u64, stall: &Stall) -> Span {
    let start = nanoseconds(clock::wall_time(start_ns));
    Span {
        start_time_unix_nano: start,
        end_time_unix_nano: start + length(stall),
        attributes: of_stall(tid, stall),
        ..span(context, ids.stall(tid, start_ns), context.top, "stall", SpanKind::Internal)
    }
}

fn of_stall(tid: u32, stall: &Stall) -> Vec<KeyValue> {
    let mut attributes = vec![
        attribute("thread.id", Value::IntValue(tid.into())),
        text("observer.stall.cause", stall.cause.name()),
    ];
    attributes.extend(stall.syscall.as_ref().map(|call| text("observer.stall.syscall", call.as_str())));
    attributes
}

/// How long a stall was, in nanoseconds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "durations are not negative; a cast stops at the largest number"
)]
fn length(stall: &Stall) -> u64 {
    (stall.seconds * 1e9).round() as u64
}

/// Spans as requests.
pub(super) fn encode(
    spans: Spans,
    resources: &mut Resources,
    process: impl Fn(u32) -> Process,
) -> Vec<Batch> {
    let mut batches = Vec::new();
    let (mut request, mut bytes, mut items) = (TraceRequest::default(), 0, 0);
    for (pid, spans) in spans {
        if spans.is_empty() {
            continue;
        }
        let (resource, _) = resources.of(&process(pid));
        let mut spans = spans.into_iter().peekable();
        while spans.peek().is_some() {
            let spans: Vec<_> = spans.by_ref().take(SPANS).collect();
            let count = u64::try_from(spans.len()).unwrap_or(u64::MAX);
            let scope = InstrumentationScope {
                name: "observer".into(),
                version: env!("CARGO_PKG_VERSION").into(),
                ..InstrumentationScope::default()
            };
            let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
            let one =
                ResourceSpans { resource: Some(resource.clone()), scope_spans, ..ResourceSpans::default() };
            let size = one.encoded_len();
            if bytes > 0 && bytes + size > REQUEST {
                batches.push(batch(&mem::take(&mut request), items));
                (bytes, items) = (0, 0);
            }
            (bytes, items) = (bytes + size, items + count);
            request.resource_spans.push(one);
        }
    }
    if items > 0 {
        batches.push(batch(&request, items));
    }
    batches
}

fn batch(request: &TraceRequest, items: u64) -> Batch {
    Batch { bytes: Bytes::from(request.encode_to_vec()), items }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{
        export::otlp::testing::{process, settings},
        model::{
            busy::{Cause, Split},
            catalog::families,
        },
    };

    fn asked(id: u64, answered: Option<u64>) -> Arc<Asked> {
        let asked = Asked {
            id,
            at_ns: 1_000_000,
            method: Some("GET".into()),
            path: Some("/a".into()),
            ..Asked::default()
        };
        if let Some(answered) = answered {
            asked.answered.set(answered).unwrap();
        }
        Arc::new(asked)
    }

    fn work(request: &Arc<Asked>, id: u64, parent: Option<u64>, started_ns: Option<u64>) -> Event {
        let task = "task".into();
        let (queued_ns, ended_ns) = (2_000_000, 9_000_000);
        let request_id = Some(format!("request-{}", request.id));
        let work = Work { id, parent, context: None, request_id, task, queued_ns, started_ns, ended_ns };
        Event { pid: 7, what: What::Work(Arc::clone(request), work) }
    }

    fn stall(request: &Arc<Asked>) -> Event {
        stall_with(Some(Arc::clone(request)))
    }

    fn stall_with(origin: Option<Arc<Asked>>) -> Event {
        let stall = Stall {
            start: String::new(),
            seconds: 0.25,
            cause: Cause::Cpu,
            syscall: None,
            behind: None,
            split_seconds: Split::default(),
            origin,
            site: 0,
        };
        Event { pid: 7, what: What::Stall(9, 3_000_000, Box::new(stall)) }
    }

    fn spans(tracer: &mut Tracer, events: impl IntoIterator<Item = Event>, are_last: bool) -> Vec<Span> {
        let events = events.into_iter().collect();
        tracer.spans(events, &mut Exemplars::default(), are_last).into_values().flatten().collect()
    }

    #[test]
    fn an_answered_request_is_told_once() {
        let mut tracer = Tracer::default();
        let request = asked(1, Some(4_000_000));
        // The child ends before its parent.
        let both = [work(&request, 3, Some(2), Some(5_000_000)), work(&request, 2, None, Some(3_000_000))];
        let [child, parent, server] = spans(&mut tracer, both, false).try_into().unwrap();
        assert_eq!(server.kind, i32::from(SpanKind::Server));
        assert_eq!((server.name.as_str(), server.parent_span_id.as_slice()), ("GET", &[][..]));
        assert_eq!(server.end_time_unix_nano - server.start_time_unix_nano, 3_000_000);
        assert_eq!((&child.parent_span_id, &parent.parent_span_id), (&parent.span_id, &server.span_id));
        assert_eq!(child.links[0].span_id, parent.span_id);
        assert_eq!(child.start_time_unix_nano - server.start_time_unix_nano, 4_000_000);
        assert!(
            [&child, &parent].iter().all(|span| span.trace_id == server.trace_id && span.status.is_none())
        );
        let named = |span: &Span| span.attributes.contains(&text("observer.request.id", "request-1"));
        assert!(named(&child) && named(&parent) && !named(&server));
        let later = spans(&mut tracer, [work(&request, 4, None, Some(3_000_000))], true);
        assert_eq!(later.len(), 1);
        assert_eq!(later[0].parent_span_id, server.span_id);
    }

    #[test]
    fn one_without_an_answer_waits_and_says_so() {
        let mut tracer = Tracer::default();
        let request = asked(1, None);
        let waiting = spans(&mut tracer, [work(&request, 2, None, None), stall(&request)], false);
        let orphan = &waiting[0];
        assert_eq!(waiting.len(), 1);
        assert_eq!(orphan.status.as_ref().unwrap().message, "orphaned");
        assert_eq!(orphan.end_time_unix_nano - orphan.start_time_unix_nano, 7_000_000);
        let [server] = spans(&mut tracer, [], true).try_into().unwrap();
        assert!(server.attributes.iter().any(|attribute| attribute.key == "observer.request.answered"));
        // Until the stall, the last that is known of it, was over.
        assert_eq!(server.end_time_unix_nano - server.start_time_unix_nano, 252_000_000);
        assert_eq!((server.events.len(), server.events[0].name.as_str()), (1, "stall"));
        // From now on stalls are told by themselves.
        let [late] = spans(&mut tracer, [stall(&request)], false).try_into().unwrap();
        assert_eq!((late.name.as_str(), &late.parent_span_id), ("stall", &server.span_id));
    }

    #[test]
    fn a_stall_without_a_request_is_a_trace_of_its_own() {
        let mut tracer = Tracer::default();
        let [stall] = spans(&mut tracer, [stall_with(None)], false).try_into().unwrap();
        assert_eq!((stall.name.as_str(), stall.parent_span_id.as_slice()), ("stall", &[][..]));
        assert_eq!(stall.end_time_unix_nano - stall.start_time_unix_nano, 250_000_000);
        assert!(tracer.requests.is_empty());
    }

    #[test]
    fn stalls_and_requests_are_limited() {
        let mut tracer = Tracer::default();
        let request = asked(1, None);
        spans(&mut tracer, (0..STALLS + 2).map(|_| stall(&request)), false);
        let most = u64::try_from(REMEMBERED).unwrap();
        let told = spans(&mut tracer, (2..=most + 1).map(|id| stall(&asked(id, None))), false);
        assert_eq!((told.len(), told[0].events.len(), told[0].dropped_events_count), (1, STALLS, 2));
        assert_eq!((tracer.requests.len(), tracer.order.len()), (REMEMBERED, REMEMBERED));
    }

    #[test]
    fn what_nobody_wants_recorded_is_not() {
        let traceparent = format!("00-{}1-{}1-00", "0".repeat(31), "0".repeat(15));
        let request = Arc::new(Asked { traceparent: Some(traceparent), ..Asked::clone(&asked(1, None)) });
        let mut tracer = Tracer::default();
        assert!(spans(&mut tracer, [work(&request, 2, None, None)], true).is_empty());
        assert!(tracer.requests.is_empty());
    }

    #[test]
    fn names_are_few() {
        let name = |method: Option<&str>| {
            let request = Asked { method: method.map(str::to_owned), ..Asked::clone(&asked(1, Some(1))) };
            spans(&mut Tracer::default(), [stall(&Arc::new(request))], true).remove(0).name
        };
        assert_eq!([Some("POST"), Some("BREW"), None].map(name), ["POST", "HTTP", "request"]);
    }

    #[test]
    fn figures_have_the_names_of_the_catalog() {
        for name in [WAIT, RUN, SLICE] {
            assert!(families().any(|family| family.name == name), "{name}");
        }
    }

    #[test]
    fn many_spans_are_sent_in_parts() {
        let mut tracer = Tracer::default();
        let events = (0..20_000).map(|id| work(&asked(1, Some(4)), id, None, Some(3_000_000)));
        let spans = tracer.spans(events.collect(), &mut Exemplars::default(), false);
        let mut resources = Resources::new(&settings(), SystemTime::now());
        let batches = encode(spans, &mut resources, process);
        assert!(batches.len() > 1 && batches.iter().all(|batch| batch.bytes.len() <= REQUEST + 1024));
        assert_eq!(batches.iter().map(|batch| batch.items).sum::<u64>(), 20_001);
        assert!(encode(Spans::new(), &mut resources, process).is_empty());
    }
}
