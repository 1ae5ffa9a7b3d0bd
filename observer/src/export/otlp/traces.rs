//! Requests, the deferred tasks that they enqueued and the stalls that hit them, as spans. A span is exported when it
//! is over; that of a request when it is answered, or after [`PATIENCE`].

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    mem,
    sync::{Arc, LazyLock},
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    InstrumentationScope, KeyValue, Value,
    trace::{Event as SpanEvent, Link, SpanId, SpanKind, Status},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::{
    client::Batch,
    context::{Context, Ids, published},
    exemplars::Exemplars,
    resource::Resources,
    span_client::SpanBatch,
};
use crate::{
    kernel::clock,
    model::{
        histogram::seconds,
        request::Request as Asked,
        stall::Stall,
        trace::{Event, EventKind, FinishedTask},
    },
    process::Process,
};

/// The span of a request without an answer is exported after this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum number of requests that are remembered, both those whose span is pending and those whose span was exported. The eBPF
/// programs keep as many.
const REMEMBERED: usize = 32_768;

/// Maximum number of stalls in the span of a request.
const STALLS: usize = 32;

/// Maximum number of spans in a batch, as in the batch processors of the SDKs.
const SPANS: usize = 512;

/// Metrics that have spans as exemplars.
const WAIT: &str = "observer_deferred_wait_seconds";
const RUN: &str = "observer_deferred_run_seconds";
const SLICE: &str = "observer_reactor_slice_seconds";

/// The methods that HTTP defines. Others are not used as names of spans, because clients can invent any number of them.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

static SCOPE: LazyLock<InstrumentationScope> = LazyLock::new(|| {
    InstrumentationScope::builder("observer").with_version(env!("CARGO_PKG_VERSION")).build()
});

/// Makes spans.
#[derive(Default)]
pub(super) struct Tracer {
    ids: Ids,
    requests: HashMap<u64, State>,
    /// Numbers of requests, the oldest first.
    order: VecDeque<u64>,
}

/// The state of the span of a request.
enum State {
    Open(Open),
    Exported,
}

/// A request whose span is pending.
struct Open {
    pid: u32,
    request: Arc<Asked>,
    context: Context,
    since: Instant,
    /// The last event of the request in monotonic nanoseconds.
    last_ns: u64,
    stalls: Vec<SpanEvent>,
    stalls_dropped: u32,
}

/// Spans by process.
type Spans = BTreeMap<u32, Vec<SpanData>>;

impl Tracer {
    /// Makes the spans of tasks and stalls from events, and of requests that are answered or older than [`PATIENCE`]. If these
    /// events are the last, makes the spans of all pending requests.
    pub(super) fn spans(
        &mut self,
        events: VecDeque<Event>,
        exemplars: &mut Exemplars,
        are_last: bool,
    ) -> Spans {
        let mut spans = Spans::new();
        for Event { pid, what } in events {
            let span = match what {
                EventKind::Task(request, work) => {
                    let Some(context) = self.remember(pid, &request, &mut spans) else { continue };
                    let span = work_span(&self.ids, &context, &work);
                    add_exemplars(exemplars, pid, &work, &span);
                    if let Some(open) = self.open(&request) {
                        open.last_ns = open.last_ns.max(work.ended_ns);
                    }
                    Some(span)
                }
                EventKind::Stall { reactor, tid, start_ns, stall } => {
                    let context = match &stall.origin {
                        Some(request) => self.remember(pid, request, &mut spans),
                        None => Some(self.ids.own_context(tid, start_ns)),
                    };
                    let Some(context) = context else { continue };
                    let end = clock::wall_time(start_ns) + length(&stall);
                    exemplars.add((SLICE, pid, reactor), &context.span(context.top), stall.seconds, end);
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
                && let State::Open(open) = mem::replace(state, State::Exported)
            {
                spans.entry(open.pid).or_default().push(open.into());
            }
        }
        spans
    }

    /// The pending span of a request; `None` if it was exported.
    fn open(&mut self, request: &Asked) -> Option<&mut Open> {
        match self.requests.get_mut(&request.id)? {
            State::Open(open) => Some(open),
            State::Exported => None,
        }
    }

    /// Remembers a request and returns its trace; `None` if that is not sampled. If there are too many requests, the span of the
    /// oldest is exported and the request is forgotten.
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

    /// Adds a stall during the request, as an event of its span.
    fn add(&mut self, tid: u32, start_ns: u64, stall: &Stall) {
        let length_ns = length(stall).as_nanos().try_into().unwrap_or(u64::MAX);
        self.last_ns = self.last_ns.max(start_ns.saturating_add(length_ns));
        if self.stalls.len() < STALLS {
            let mut attributes = stall_attributes(tid, stall);
            attributes.push(KeyValue::new("observer.stall.duration", stall.seconds));
            self.stalls.push(SpanEvent::new("stall", clock::wall_time(start_ns), attributes, 0));
        } else {
            self.stalls_dropped += 1;
        }
    }
}

/// The span of a request.
impl From<Open> for SpanData {
    fn from(open: Open) -> Self {
        let Open { request, context, last_ns, stalls, stalls_dropped, .. } = open;
        let mut attributes = Vec::new();
        let mut name = "request";
        if let Some(method) = request.method.as_deref() {
            let known = METHODS.into_iter().find(|known| *known == method);
            name = known.unwrap_or("HTTP");
            attributes.push(KeyValue::new("http.request.method", known.unwrap_or("_OTHER")));
        }
        if let Some(path) = &request.path {
            attributes.push(KeyValue::new("url.path", path.clone()));
        }
        let answered = request.answered.get();
        if answered.is_none() {
            attributes.push(KeyValue::new("observer.request.answered", false));
        }
        let mut events = SpanEvents::default();
        (events.events, events.dropped_count) = (stalls, stalls_dropped);
        // Only the start is converted to wall time: the wall clock may be set between two conversions.
        let start = clock::wall_time(request.at_ns);
        let length_ns = answered.unwrap_or(&last_ns).saturating_sub(request.at_ns);
        Self {
            parent_span_id: context.remote.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: context.remote.is_some(),
            attributes,
            events,
            ..span(&context, context.top, name.into(), SpanKind::Server, start, length_ns)
        }
    }
}

/// A span without a parent.
fn span(
    context: &Context,
    id: SpanId,
    name: std::borrow::Cow<'static, str>,
    kind: SpanKind,
    start: SystemTime,
    length_ns: u64,
) -> SpanData {
    SpanData {
        span_context: context.span(id),
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind: kind,
        name,
        start_time: start,
        end_time: start + Duration::from_nanos(length_ns),
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: SCOPE.clone(),
    }
}

/// The span of a deferred task.
fn work_span(ids: &Ids, context: &Context, work: &FinishedTask) -> SpanData {
    let parent = work.parent.map_or(context.top, |parent| ids.work(parent));
    let start_ns = work.started_ns.unwrap_or(work.queued_ns);
    let waited_until = work.started_ns.unwrap_or(work.ended_ns);
    let wait = seconds(waited_until.saturating_sub(work.queued_ns));
    let mut links = SpanLinks::default();
    links.links = vec![Link::new(context.span(parent), Vec::new(), 0)];
    let mut attributes = vec![KeyValue::new("observer.deferred.wait", wait)];
    attributes.extend(work.request_id.as_ref().map(|id| KeyValue::new("observer.request.id", id.clone())));
    // The trace context that the process itself publishes takes precedence. The link still leads to the span that enqueued the
    // task.
    let own = work.context.as_ref().and_then(published);
    let (trace, parent) = own.unwrap_or((context.trace, parent));
    let context = Context { trace, ..context.clone() };
    let start = clock::wall_time(start_ns);
    let length_ns = work.ended_ns.saturating_sub(start_ns);
    let name = work.task.to_string().into();
    SpanData {
        parent_span_id: parent,
        attributes,
        links,
        status: if work.started_ns.is_none() { Status::error("orphaned") } else { Status::Unset },
        ..span(&context, ids.work(work.id), name, SpanKind::Consumer, start, length_ns)
    }
}

/// Adds the wait and the run time of a task as exemplars, if it has started.
fn add_exemplars(exemplars: &mut Exemplars, pid: u32, work: &FinishedTask, span: &SpanData) {
    let Some(started) = work.started_ns else { return };
    let wait = seconds(started.saturating_sub(work.queued_ns));
    exemplars.add((WAIT, pid, Arc::clone(&work.task)), &span.span_context, wait, span.start_time);
    let run = seconds(work.ended_ns.saturating_sub(started));
    exemplars.add((RUN, pid, Arc::clone(&work.task)), &span.span_context, run, span.end_time);
}

/// The span of a stall that has no request, or whose request was exported.
fn stall_span(ids: &Ids, context: &Context, tid: u32, start_ns: u64, stall: &Stall) -> SpanData {
    let id = ids.stall(tid, start_ns);
    let start = clock::wall_time(start_ns);
    let length_ns = length(stall).as_nanos().try_into().unwrap_or(u64::MAX);
    SpanData {
        parent_span_id: if context.top == id { SpanId::INVALID } else { context.top },
        attributes: stall_attributes(tid, stall),
        ..span(context, id, "stall".into(), SpanKind::Internal, start, length_ns)
    }
}

fn stall_attributes(tid: u32, stall: &Stall) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("thread.id", i64::from(tid)),
        KeyValue::new("observer.stall.cause", stall.cause.name()),
    ];
    attributes
        .extend(stall.syscall.as_ref().map(|call| KeyValue::new("observer.stall.syscall", call.to_string())));
    attributes
}

/// The duration of a stall.
fn length(stall: &Stall) -> Duration {
    Duration::try_from_secs_f64(stall.seconds).unwrap_or_default()
}

/// Splits spans into batches, each of one process.
pub(super) fn batches(
    spans: Spans,
    resources: &mut Resources,
    process: impl Fn(u32) -> Process,
) -> Vec<Batch<SpanBatch>> {
    let mut batches = Vec::new();
    for (pid, spans) in spans {
        if spans.is_empty() {
            continue;
        }
        let (resource, _) = resources.of(&process(pid));
        let mut spans = spans.into_iter().peekable();
        while spans.peek().is_some() {
            let spans: Vec<_> = spans.by_ref().take(SPANS).collect();
            let bytes = spans.iter().map(memory).sum();
            let items = spans.len().try_into().unwrap_or(u64::MAX);
            batches.push(Batch { request: SpanBatch { resource: resource.clone(), spans }, bytes, items });
        }
    }
    batches
}

/// Approximate memory of a span in bytes.
fn memory(span: &SpanData) -> usize {
    let of = |attributes: &[KeyValue]| -> usize {
        let text = |attribute: &KeyValue| match &attribute.value {
            Value::String(text) => text.as_str().len(),
            _ => 0,
        };
        size_of_val(attributes) + attributes.iter().map(text).sum::<usize>()
    };
    let events: usize = span.events.iter().map(|event| size_of_val(event) + of(&event.attributes)).sum();
    size_of_val(span) + span.name.len() + of(&span.attributes) + events + size_of_val(&span.links.links[..])
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

    fn length_ns(span: &SpanData) -> u128 {
        span.end_time.duration_since(span.start_time).unwrap().as_nanos()
    }

    fn between(one: &SpanData, other: &SpanData) -> u128 {
        other.start_time.duration_since(one.start_time).unwrap().as_nanos()
    }

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
        let work =
            FinishedTask { id, parent, context: None, request_id, task, queued_ns, started_ns, ended_ns };
        Event { pid: 7, what: EventKind::Task(Arc::clone(request), work) }
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
            events_waited: Some(true),
            split_seconds: Split::default(),
            origin,
            site: 0,
        };
        Event {
            pid: 7,
            what: EventKind::Stall {
                reactor: "9".into(),
                tid: 9,
                start_ns: 3_000_000,
                stall: Box::new(stall),
            },
        }
    }

    fn spans(tracer: &mut Tracer, events: impl IntoIterator<Item = Event>, are_last: bool) -> Vec<SpanData> {
        let events = events.into_iter().collect();
        tracer.spans(events, &mut Exemplars::default(), are_last).into_values().flatten().collect()
    }

    #[test]
    fn an_answered_request_is_exported_once() {
        let mut tracer = Tracer::default();
        let request = asked(1, Some(4_000_000));
        // The child ends before its parent.
        let both = [work(&request, 3, Some(2), Some(5_000_000)), work(&request, 2, None, Some(3_000_000))];
        let [child, parent, server] = spans(&mut tracer, both, false).try_into().unwrap();
        assert_eq!(server.span_kind, SpanKind::Server);
        assert_eq!((&*server.name, server.parent_span_id), ("GET", SpanId::INVALID));
        assert_eq!(length_ns(&server), 3_000_000);
        let id = |span: &SpanData| span.span_context.span_id();
        assert_eq!((child.parent_span_id, parent.parent_span_id), (id(&parent), id(&server)));
        assert_eq!(child.links[0].span_context.span_id(), id(&parent));
        assert_eq!(between(&server, &child), 4_000_000);
        for span in [&child, &parent] {
            assert_eq!(span.span_context.trace_id(), server.span_context.trace_id());
            assert_eq!(span.status, Status::Unset);
        }
        let named =
            |span: &SpanData| span.attributes.contains(&KeyValue::new("observer.request.id", "request-1"));
        assert!(named(&child) && named(&parent) && !named(&server));
        let later = spans(&mut tracer, [work(&request, 4, None, Some(3_000_000))], true);
        assert_eq!(later.len(), 1);
        assert_eq!(later[0].parent_span_id, id(&server));
    }

    #[test]
    fn a_request_without_an_answer_waits_and_says_so() {
        let mut tracer = Tracer::default();
        let request = asked(1, None);
        let waiting = spans(&mut tracer, [work(&request, 2, None, None), stall(&request)], false);
        let orphan = &waiting[0];
        assert_eq!(waiting.len(), 1);
        assert_eq!(orphan.status, Status::error("orphaned"));
        assert_eq!(length_ns(orphan), 7_000_000);
        let [server] = spans(&mut tracer, [], true).try_into().unwrap();
        assert!(
            server.attributes.iter().any(|attribute| attribute.key.as_str() == "observer.request.answered")
        );
        // The span ends with the end of the stall, the last event.
        assert_eq!(length_ns(&server), 252_000_000);
        assert_eq!((server.events.len(), &*server.events[0].name), (1, "stall"));
        // Later stalls get separate spans.
        let [late] = spans(&mut tracer, [stall(&request)], false).try_into().unwrap();
        assert_eq!((&*late.name, late.parent_span_id), ("stall", server.span_context.span_id()));
    }

    #[test]
    fn a_stall_without_a_request_is_a_trace_of_its_own() {
        let mut tracer = Tracer::default();
        let [stall] = spans(&mut tracer, [stall_with(None)], false).try_into().unwrap();
        assert_eq!((&*stall.name, stall.parent_span_id), ("stall", SpanId::INVALID));
        assert_eq!(length_ns(&stall), 250_000_000);
        assert!(tracer.requests.is_empty());
    }

    #[test]
    fn stalls_and_requests_are_limited() {
        let mut tracer = Tracer::default();
        let request = asked(1, None);
        spans(&mut tracer, (0..STALLS + 2).map(|_| stall(&request)), false);
        let most = u64::try_from(REMEMBERED).unwrap();
        let exported = spans(&mut tracer, (2..=most + 1).map(|id| stall(&asked(id, None))), false);
        assert_eq!(
            (exported.len(), exported[0].events.len(), exported[0].events.dropped_count),
            (1, STALLS, 2)
        );
        assert_eq!((tracer.requests.len(), tracer.order.len()), (REMEMBERED, REMEMBERED));
    }

    #[test]
    fn a_request_that_is_not_sampled_has_no_spans() {
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
    fn exemplars_name_metrics_of_the_catalog() {
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
        let batches = batches(spans, &mut resources, process);
        assert!(batches.iter().all(|batch| batch.request.spans.len() <= SPANS && batch.bytes > SPANS));
        assert_eq!(batches.iter().map(|batch| batch.items).sum::<u64>(), 20_001);
        assert!(super::batches(Spans::new(), &mut resources, process).is_empty());
    }
}
