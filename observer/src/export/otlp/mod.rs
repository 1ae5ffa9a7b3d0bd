//! Pushes to an OpenTelemetry collector: settings say where, `metrics` what, `queue` keeps it until `transport` has
//! delivered it. Nobody who observes waits for any of that.

mod metrics;
mod queue;
mod resource;
pub(crate) mod settings;
mod signal;
#[cfg(test)]
mod testing;
mod transport;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use self::{
    queue::Queue, resource::Resources, settings::Settings, signal::Signal as _, transport::Transport,
};
use super::series::Cap;
use crate::{
    failure::Failure,
    model::{delivery::Ledger, snapshot::Snapshot},
    observation::Observation,
};

/// How long the end of an observation may wait for what is not delivered yet.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The way to the collector, found before anything is attached: what is wrong with it is the cheapest to find.
pub(crate) struct Collector {
    settings: Settings,
    transport: Transport,
}

impl Collector {
    /// Reads certificates; connects to nobody yet.
    pub(crate) fn find(settings: Settings) -> Result<Self, Failure> {
        let transport = Transport::new(settings.metrics.clone())?;
        Ok(Self { settings, transport })
    }
}

/// A push that goes on until it is finished.
pub(crate) struct Push {
    queue: Queue,
    resources: Resources,
    cap: Arc<Mutex<Cap>>,
    due: Interval,
}

impl Push {
    /// Figures are due at once and then at each interval.
    pub(crate) fn start(collector: Collector, observation: &mut Observation, cap: Arc<Mutex<Cap>>) -> Self {
        let ledger = Arc::new(Ledger::of(metrics::Request::NAME));
        observation.tell_of(Arc::clone(&ledger));
        let mut due = interval(collector.settings.interval);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            queue: Queue::start::<metrics::Request>(collector.transport, ledger),
            resources: Resources::new(&collector.settings, observation.started()),
            cap,
            due,
        }
    }

    /// Returns when figures are due.
    pub(crate) async fn due(&mut self) {
        self.due.tick().await;
    }

    /// Sends figures, some time soon.
    pub(crate) fn push(&mut self, snapshot: &Snapshot) {
        let mut cap = self.cap.lock().unwrap_or_else(PoisonError::into_inner);
        for batch in metrics::encode(snapshot, &mut cap, &mut self.resources) {
            self.queue.push(batch);
        }
    }

    /// Sends the last figures and delivers what is left, for a limited time.
    pub(crate) async fn finish(mut self, snapshot: &Snapshot) {
        self.push(snapshot);
        let lost = self.queue.finish(Instant::now() + LAST_WORDS).await;
        if lost > 0 {
            log::warn!("{lost} data points were not delivered: the collector did not take them in time");
        }
    }
}
