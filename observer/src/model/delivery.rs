//! What became of figures and spans that were to be pushed: counted where they are sent, read by whoever takes snapshots.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Why something was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The collector was away for so long, or so much came at once, that there was no more room to keep it.
    BufferFull,
    /// The collector will not have it.
    Refused,
}

impl Reason {
    const ALL: [Self; 2] = [Self::BufferFull, Self::Refused];

    const fn name(self) -> &'static str {
        match self {
            Self::BufferFull => "buffer_full",
            Self::Refused => "refused",
        }
    }
}

/// The count of one signal. Any thread may add to it.
#[derive(Debug)]
pub(crate) struct ExportStats {
    signal: &'static str,
    delivered: AtomicU64,
    dropped: [AtomicU64; Reason::ALL.len()],
    failures: AtomicU64,
}

impl ExportStats {
    /// Nothing yet.
    pub(crate) fn of(signal: &'static str) -> Self {
        Self { signal, delivered: 0.into(), dropped: Default::default(), failures: 0.into() }
    }

    /// So many data points or spans have arrived.
    pub(crate) fn delivered(&self, items: u64) {
        self.delivered.fetch_add(items, Ordering::Relaxed);
    }

    /// So many are lost.
    pub(crate) fn dropped(&self, reason: Reason, items: u64) {
        self.dropped[reason as usize].fetch_add(items, Ordering::Relaxed);
    }

    /// An attempt to deliver has failed.
    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// How it stands now.
    pub(crate) fn read(&self) -> Delivery {
        let count = |reason: Reason| self.dropped[reason as usize].load(Ordering::Relaxed);
        Delivery {
            signal: self.signal,
            delivered: self.delivered.load(Ordering::Relaxed),
            dropped: Reason::ALL.map(|reason| Dropped { reason: reason.name(), count: count(reason) }),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }
}

/// What became of one signal so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Delivery {
    /// `metrics` or `traces`.
    pub(crate) signal: &'static str,
    /// Data points or spans that a collector has taken.
    pub(crate) delivered: u64,
    /// Those that were dropped, by reason.
    pub(crate) dropped: [Dropped; Reason::ALL.len()],
    /// Attempts that failed; what they were to deliver was tried again unless it counts as dropped.
    pub(crate) failures: u64,
}

/// Data points or spans that were dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Dropped {
    /// Why, as `observer_self_otlp_dropped_total` has it.
    pub(crate) reason: &'static str,
    /// How many.
    pub(crate) count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_count_of_its_own() {
        let stats = ExportStats::of("metrics");
        stats.delivered(7);
        stats.dropped(Reason::Refused, 2);
        stats.dropped(Reason::BufferFull, 1);
        stats.failed();
        let delivery = stats.read();
        assert_eq!((delivery.signal, delivery.delivered, delivery.failures), ("metrics", 7, 1));
        let dropped: Vec<_> =
            delivery.dropped.iter().map(|dropped| (dropped.reason, dropped.count)).collect();
        assert_eq!(dropped, [("buffer_full", 1), ("refused", 2)]);
    }
}
