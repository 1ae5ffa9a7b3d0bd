//! The two signals that observer pushes, and what a client of either offers to the queue.

use std::time::Duration;

use super::settings::Endpoint;

/// Metrics or traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    Metrics,
    Traces,
}

impl Signal {
    /// Its name in messages, metrics and environment variables.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::Traces => "traces",
        }
    }

    /// Its HTTP path below the address of a collector.
    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Metrics => "v1/metrics",
            Self::Traces => "v1/traces",
        }
    }
}

/// What is sent in one request.
#[derive(Debug)]
pub(super) struct Batch<R> {
    pub(super) request: R,
    /// Memory that it takes while it waits.
    pub(super) bytes: usize,
    /// Data points or spans in it.
    pub(super) items: u64,
}

/// Sends batches of one signal to a collector.
pub(super) trait Client: Send + Sync + 'static {
    type Request: Send + Sync + 'static;
    const SIGNAL: Signal;
    /// Batches that are sent at the same time.
    const CONCURRENCY: usize;

    fn endpoint(&self) -> &Endpoint;

    /// Sends one request. A failure that the client has retried by itself counts as one.
    fn send(&self, request: &Self::Request) -> impl Future<Output = Result<Accepted, Failed>> + Send;
}

/// A collector's answer to a request that it accepted, perhaps in part.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Accepted {
    /// Data points or spans that it rejected.
    pub(super) rejected: u64,
    /// Why, in the collector's words.
    pub(super) why: String,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) why: String,
    pub(super) retry: Retry,
}

/// When a request that failed may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Retry {
    /// At any time.
    Later,
    /// When the collector is reachable again, which is not soon: at the end of a run it is not tried again.
    Unreachable,
    /// Not before this time has passed: the collector asked for it.
    After(Duration),
    /// Never: the collector refuses this request.
    Never,
}
