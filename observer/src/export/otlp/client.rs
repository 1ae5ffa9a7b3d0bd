//! What the queue requires of a client: it sends one batch and says whether the collector accepted it.

use std::time::Duration;

use super::{settings::Endpoint, signal::Signal};

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

    /// Sends one request. A client may retry a failure by itself before it returns, but not if this attempt is the last.
    fn send(
        &self,
        request: &Self::Request,
        is_last: bool,
    ) -> impl Future<Output = Result<Accepted, Failed>> + Send;
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
