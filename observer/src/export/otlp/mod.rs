//! Pushes to an OpenTelemetry collector: settings say where, `metrics` and `traces` what, `queue` keeps it until `transport`
//! has delivered it. Nobody who observes waits for any of that.

mod signal;
pub(crate) mod settings;
mod transport;
mod queue;
mod attribute;
mod resource;
mod context;
mod exemplars;
mod metrics;
mod traces;
#[cfg(test)]
mod testing;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use self::{context::is_understood, transport::understand_answer};
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
    exemplars::Exemplars,
    queue::Queue,
    resource::Resources,
    settings::{Endpoint, Settings},
    signal::{MetricsRequest, Signal, TraceRequest},
    traces::Tracer,
    transport::Transport,
};
use super::series::SeriesLimiter;
use crate::{
    failure::Failure,
    model::{delivery::ExportStats, snapshot::Snapshot, trace::Event},
    process::Process,
};

/// How long the end of an observation may wait for what is not delivered yet.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The transport to the collector, found before anything is attached: what is wrong with it is the cheapest to find.
pub(crate) struct Collector {
    settings: Settings,
    metrics: Option<Transport>,
    traces: Option<Transport>,
}

impl Collector {
    /// Reads certificates; connects to nobody yet.
    pub(crate) fn find(settings: Settings) -> Result<Self, Failure> {
        let transport = |endpoint: &Option<Endpoint>| endpoint.clone().map(Transport::new).transpose();
        let (metrics, traces) = (transport(&settings.metrics)?, transport(&settings.traces)?);
        Ok(Self { settings, metrics, traces })
    }
}

/// A push that goes on until it is finished.
pub(crate) struct Push {
    metrics: Option<Pipeline>,
    traces: Option<Pipeline>,
    cap: Arc<Mutex<SeriesLimiter>>,
    tracer: Tracer,
    exemplars: Exemplars,
    resources: Resources,
}

/// How one signal is sent, and when.
struct Pipeline {
    queue: Queue,
    due: Interval,
    stats: Arc<ExportStats>,
}

/// What is to be pushed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Due {
    /// Figures.
    Metrics,
    /// What has happened since the last time.
    Traces,
}

impl Push {
    /// Metrics are due at once and then at each interval, and so are traces. Series begin when observer attached.
    pub(crate) fn start(collector: Collector, attached: SystemTime, cap: Arc<Mutex<SeriesLimiter>>) -> Self {
        let Collector { settings, metrics, traces } = collector;
        Self {
            metrics: metrics.map(|transport| Pipeline::start::<MetricsRequest>(transport, settings.interval)),
            traces: traces.map(|transport| Pipeline::start::<TraceRequest>(transport, settings.delay)),
            cap,
            tracer: Tracer::default(),
            exemplars: Exemplars::default(),
            resources: Resources::new(&settings, attached),
        }
    }

    /// What becomes of what is pushed, by signal.
    pub(crate) fn export_stats(&self) -> impl Iterator<Item = Arc<ExportStats>> {
        [&self.metrics, &self.traces].into_iter().flatten().map(|pipeline| Arc::clone(&pipeline.stats))
    }

    /// The same of traces; `None` if none are pushed.
    pub(crate) fn trace_stats(&self) -> Option<Arc<ExportStats>> {
        self.traces.as_ref().map(|pipeline| Arc::clone(&pipeline.stats))
    }

    /// Returns when something is due.
    pub(crate) async fn due(&mut self) -> Due {
        select! {
            () = due(&mut self.metrics) => Due::Metrics,
            () = due(&mut self.traces) => Due::Traces,
        }
    }

    /// Queues all samples of a snapshot for delivery.
    pub(crate) fn push_metrics(&mut self, snapshot: &Snapshot) {
        let Some(pipeline) = &self.metrics else { return };
        let mut cap = self.cap.lock().unwrap_or_else(PoisonError::into_inner);
        for batch in metrics::encode(snapshot, &mut cap, &mut self.resources, &self.exemplars) {
            pipeline.queue.push(batch);
        }
        self.exemplars.clear();
    }

    /// Queues spans of what has happened since the last time. `live` are the processes under observation, `known` finds those
    /// that are gone as well.
    pub(crate) fn push_traces<'p>(
        &mut self,
        events: VecDeque<Event>,
        live: impl Iterator<Item = &'p Process>,
        known: impl Fn(u32) -> Option<&'p Process>,
        are_last: bool,
    ) {
        let Some(pipeline) = &self.traces else { return };
        // Asked while it is there, a process that is gone later is still known.
        for process in live {
            self.resources.of(process);
        }
        let spans = self.tracer.spans(events, &mut self.exemplars, are_last);
        let process = |pid| known(pid).cloned().unwrap_or_else(|| Process::of(pid));
        for batch in traces::encode(spans, &mut self.resources, process) {
            pipeline.queue.push(batch);
        }
        if self.metrics.is_none() {
            self.resources.keep(|pid| known(pid).is_some());
        }
    }

    /// Delivers what is left, for a limited time, or until there is a hurry.
    pub(crate) async fn finish(self, hurry: impl Future<Output = ()>) {
        let Self { mut metrics, mut traces, .. } = self;
        let end = Instant::now() + SHUTDOWN_TIMEOUT;
        let drained = async { join!(drain(metrics.as_mut(), end), drain(traces.as_mut(), end)) };
        select! {
            _ = drained => {}
            () = hurry => {}
        }
        for (pipeline, what) in [(metrics, "data points"), (traces, "spans")] {
            let lost = pipeline.map_or(0, |pipeline| pipeline.queue.give_up());
            if lost > 0 {
                log::warn!("{lost} {what} were not delivered: the collector did not take them in time");
            }
        }
    }
}

impl Pipeline {
    fn start<S: Signal>(transport: Transport, period: Duration) -> Self {
        let stats = Arc::new(ExportStats::of(S::NAME));
        let mut due = interval(period);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { queue: Queue::start::<S>(transport, Arc::clone(&stats)), due, stats }
    }
}

/// What goes nowhere is never due.
async fn due(pipeline: &mut Option<Pipeline>) {
    match pipeline {
        Some(pipeline) => {
            pipeline.due.tick().await;
        }
        None => pending().await,
    }
}

async fn drain(pipeline: Option<&mut Pipeline>, end: Instant) {
    if let Some(pipeline) = pipeline {
        pipeline.queue.drain(end).await;
    }
}
