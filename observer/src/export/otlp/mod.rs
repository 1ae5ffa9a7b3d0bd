//! Pushes metrics and traces to an OpenTelemetry collector. `settings` says where; `metrics` and `traces` encode a
//! snapshot and events; `queue` keeps the result until `metrics_client` or `span_client` has sent it. Nothing that
//! observes waits for them.

mod time;
mod signal;
pub(crate) mod settings;
mod client;
mod connection;
mod metrics_client;
mod span_client;
mod queue;
mod resource;
mod context;
mod exemplars;
mod metrics;
mod traces;
#[cfg(test)]
mod testing;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use self::{context::is_valid, metrics_client::parse_answer};
pub(crate) use queue::BUFFER;

use std::{
    collections::VecDeque,
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Result;
use tokio::{
    join, select,
    time::{Instant, Interval, MissedTickBehavior, interval},
};

use self::{
    client::Client,
    connection::Connection,
    exemplars::Exemplars,
    metrics_client::MetricsClient,
    queue::Queue,
    resource::Resources,
    settings::{Endpoint, Settings},
    span_client::SpanClient,
    traces::Tracer,
};
use super::series::SeriesLimiter;
use crate::{
    failure::Failure,
    model::{delivery::ExportStats, snapshot::Snapshot, trace::Event},
    process::Process,
};

/// How long the end of an observation waits until everything is delivered.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// A collector and the connections to it. They are created before anything is attached, so that an error in their settings is
/// reported first.
pub(crate) struct Collector {
    settings: Settings,
    metrics: Option<(Endpoint, Connection)>,
    traces: Option<(Endpoint, Connection)>,
}

impl Collector {
    /// Reads certificates; does not connect. Must be called inside a Tokio runtime.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let connection = |endpoint: &Option<Endpoint>| {
            let connected = |endpoint: &Endpoint| Ok((endpoint.clone(), Connection::new(endpoint)?));
            endpoint.as_ref().map(connected).transpose()
        };
        let (metrics, traces) = (connection(&settings.metrics)?, connection(&settings.traces)?);
        Ok(Self { settings, metrics, traces })
    }
}

/// Pushes both signals until it is finished.
pub(crate) struct Push {
    metrics: Option<Pipeline<MetricsClient>>,
    traces: Option<Pipeline<SpanClient>>,
    limiter: Arc<Mutex<SeriesLimiter>>,
    tracer: Tracer,
    exemplars: Exemplars,
    resources: Resources,
}

/// The queue of one signal, and when it is pushed.
struct Pipeline<C: Client> {
    queue: Queue<C>,
    due: Interval,
    stats: Arc<ExportStats>,
}

/// Which signal is due.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Due {
    /// Metrics.
    Metrics,
    /// Spans of the events since the last push.
    Traces,
}

impl Push {
    /// Both signals are due at once and then at each interval. Counters start when observer attached.
    pub(crate) fn start(
        collector: Collector,
        attached: SystemTime,
        limiter: Arc<Mutex<SeriesLimiter>>,
    ) -> Self {
        let Collector { settings, metrics, traces } = collector;
        Self {
            metrics: metrics.map(|(endpoint, connection)| {
                Pipeline::start(settings.interval, |_| MetricsClient::new(endpoint, connection))
            }),
            traces: traces.map(|(endpoint, connection)| {
                Pipeline::start(settings.delay, |stats| SpanClient::new(endpoint, connection, stats))
            }),
            limiter,
            tracer: Tracer::default(),
            exemplars: Exemplars::default(),
            resources: Resources::new(&settings, attached),
        }
    }

    /// The export statistics of each signal.
    pub(crate) fn export_stats(&self) -> impl Iterator<Item = Arc<ExportStats>> {
        let metrics = self.metrics.as_ref().map(|pipeline| Arc::clone(&pipeline.stats));
        metrics.into_iter().chain(self.trace_stats())
    }

    /// The export statistics of traces; `None` if traces are not pushed.
    pub(crate) fn trace_stats(&self) -> Option<Arc<ExportStats>> {
        self.traces.as_ref().map(|pipeline| Arc::clone(&pipeline.stats))
    }

    /// Waits until a signal is due.
    pub(crate) async fn due(&mut self) -> Due {
        select! {
            () = due(&mut self.metrics) => Due::Metrics,
            () = due(&mut self.traces) => Due::Traces,
        }
    }

    /// Queues all samples of a snapshot.
    pub(crate) fn push_metrics(&mut self, snapshot: &Snapshot) {
        let Some(pipeline) = &self.metrics else { return };
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        for batch in metrics::encode(snapshot, &mut limiter, &mut self.resources, &self.exemplars) {
            pipeline.queue.push(batch);
        }
        self.exemplars.clear();
    }

    /// Queues the spans of events. `live` are the processes under observation; `known` also finds processes that have exited.
    pub(crate) fn push_traces<'p>(
        &mut self,
        events: VecDeque<Event>,
        live: impl Iterator<Item = &'p Process>,
        known: impl Fn(u32) -> Option<&'p Process>,
        are_last: bool,
    ) {
        let Some(pipeline) = &self.traces else { return };
        // Reads the resource while the process is running: it is needed after the exit as well.
        for process in live {
            self.resources.of(process);
        }
        let spans = self.tracer.spans(events, &mut self.exemplars, are_last);
        let process = |pid| known(pid).cloned().unwrap_or_else(|| Process::of(pid));
        for batch in traces::batches(spans, &mut self.resources, process) {
            pipeline.queue.push(batch);
        }
        if self.metrics.is_none() {
            self.resources.keep(|pid| known(pid).is_some());
        }
    }

    /// Delivers what is queued, for [`SHUTDOWN_TIMEOUT`] at most or until `hurry` is ready.
    pub(crate) async fn finish(self, hurry: impl Future<Output = ()>) {
        let Self { mut metrics, mut traces, .. } = self;
        let end = Instant::now() + SHUTDOWN_TIMEOUT;
        let drained = async { join!(drain(metrics.as_mut(), end), drain(traces.as_mut(), end)) };
        select! {
            _ = drained => {}
            () = hurry => {}
        }
        let lost = [
            (metrics.map_or(0, Pipeline::give_up), "data points"),
            (traces.map_or(0, Pipeline::give_up), "spans"),
        ];
        for (lost, what) in lost.into_iter().filter(|(lost, _)| *lost > 0) {
            log::warn!("{lost} {what} were not delivered: the collector did not accept them in time");
        }
    }
}

impl<C: Client> Pipeline<C> {
    fn start(period: Duration, client: impl FnOnce(Arc<ExportStats>) -> C) -> Self {
        let stats = Arc::new(ExportStats::of(C::SIGNAL.name()));
        let mut due = interval(period);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { queue: Queue::start(client(Arc::clone(&stats)), Arc::clone(&stats)), due, stats }
    }

    fn give_up(self) -> u64 {
        self.queue.give_up()
    }
}

/// Waits until a signal is due, which never happens if it is not pushed.
async fn due<C: Client>(pipeline: &mut Option<Pipeline<C>>) {
    match pipeline {
        Some(pipeline) => {
            pipeline.due.tick().await;
        }
        None => pending().await,
    }
}

async fn drain<C: Client>(pipeline: Option<&mut Pipeline<C>>, end: Instant) {
    if let Some(pipeline) = pipeline {
        pipeline.queue.drain(end).await;
    }
}
