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
use super::series::Cap;
use crate::{
    failure::Failure,
    model::{delivery::Ledger, snapshot::Snapshot, trace::Event},
    process::Process,
};

/// How long the end of an observation may wait for what is not delivered yet.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The way to the collector, found before anything is attached: what is wrong with it is the cheapest to find.
pub(crate) struct Collector {
    settings: Settings,
    metrics: Option<Transport>,
    traces: Option<Transport>,
}

impl Collector {
    /// Reads certificates; connects to nobody yet.
    pub(crate) fn find(settings: Settings) -> Result<Self, Failure> {
        let way = |endpoint: &Option<Endpoint>| endpoint.clone().map(Transport::new).transpose();
        let (metrics, traces) = (way(&settings.metrics)?, way(&settings.traces)?);
        Ok(Self { settings, metrics, traces })
    }
}

/// A push that goes on until it is finished.
pub(crate) struct Push {
    metrics: Option<Way>,
    traces: Option<Way>,
    cap: Arc<Mutex<Cap>>,
    tracer: Tracer,
    exemplars: Exemplars,
    resources: Resources,
}

/// How one signal is sent, and when.
struct Way {
    queue: Queue,
    due: Interval,
    ledger: Arc<Ledger>,
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
    pub(crate) fn start(collector: Collector, attached: SystemTime, cap: Arc<Mutex<Cap>>) -> Self {
        let Collector { settings, metrics, traces } = collector;
        Self {
            metrics: metrics.map(|way| Way::start::<MetricsRequest>(way, settings.interval)),
            traces: traces.map(|way| Way::start::<TraceRequest>(way, settings.delay)),
            cap,
            tracer: Tracer::default(),
            exemplars: Exemplars::default(),
            resources: Resources::new(&settings, attached),
        }
    }

    /// What becomes of what is pushed, by signal.
    pub(crate) fn ledgers(&self) -> impl Iterator<Item = Arc<Ledger>> {
        [&self.metrics, &self.traces].into_iter().flatten().map(|way| Arc::clone(&way.ledger))
    }

    /// The same of traces; `None` if none are pushed.
    pub(crate) fn trace_ledger(&self) -> Option<Arc<Ledger>> {
        self.traces.as_ref().map(|way| Arc::clone(&way.ledger))
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
        let Some(way) = &self.metrics else { return };
        let mut cap = self.cap.lock().unwrap_or_else(PoisonError::into_inner);
        for batch in metrics::encode(snapshot, &mut cap, &mut self.resources, &self.exemplars) {
            way.queue.push(batch);
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
        let Some(way) = &self.traces else { return };
        // Asked while it is there, a process that is gone later is still known.
        for process in live {
            self.resources.of(process);
        }
        let spans = self.tracer.spans(events, &mut self.exemplars, are_last);
        let process = |pid| known(pid).cloned().unwrap_or_else(|| Process::of(pid));
        for batch in traces::encode(spans, &mut self.resources, process) {
            way.queue.push(batch);
        }
        if self.metrics.is_none() {
            self.resources.keep(|pid| known(pid).is_some());
        }
    }

    /// Delivers what is left, for a limited time, or until there is a hurry.
    pub(crate) async fn finish(self, hurry: impl Future<Output = ()>) {
        let Self { mut metrics, mut traces, .. } = self;
        let end = Instant::now() + LAST_WORDS;
        let drained = async { join!(drain(metrics.as_mut(), end), drain(traces.as_mut(), end)) };
        select! {
            _ = drained => {}
            () = hurry => {}
        }
        for (way, what) in [(metrics, "data points"), (traces, "spans")] {
            let lost = way.map_or(0, |way| way.queue.give_up());
            if lost > 0 {
                log::warn!("{lost} {what} were not delivered: the collector did not take them in time");
            }
        }
    }
}

impl Way {
    fn start<S: Signal>(transport: Transport, period: Duration) -> Self {
        let ledger = Arc::new(Ledger::of(S::NAME));
        let mut due = interval(period);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { queue: Queue::start::<S>(transport, Arc::clone(&ledger)), due, ledger }
    }
}

/// What goes nowhere is never due.
async fn due(way: &mut Option<Way>) {
    match way {
        Some(way) => {
            way.due.tick().await;
        }
        None => pending().await,
    }
}

async fn drain(way: Option<&mut Way>, end: Instant) {
    if let Some(way) = way {
        way.queue.drain(end).await;
    }
}
