//! The signals that end an observation or reload its configuration.

use anyhow::Result;
use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
};

/// The signals that end an observation gracefully or reload its configuration.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    /// Whether SIGHUP reloads the configuration instead of ending the observation.
    reloads: bool,
}

impl Signals {
    pub(crate) fn catch(reloads: bool) -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            reloads,
        })
    }

    /// Waits for a signal that ends the observation.
    pub(crate) async fn terminated(&mut self) {
        let reloads = self.reloads;
        select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv(), if !reloads => {}
        }
    }

    /// Waits for any signal. Returns whether it ends the observation, instead of reloading the configuration.
    pub(crate) async fn next(&mut self) -> bool {
        select! {
            _ = self.interrupt.recv() => true,
            _ = self.terminate.recv() => true,
            _ = self.hang_up.recv() => !self.reloads,
        }
    }
}
