//! Export statistics of the data that is pushed. The exporter counts; snapshots read.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Why data was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// The buffer was full: the collector was unavailable for too long, or too much came at once.
    BufferFull,
    /// The collector refused the data.
    Refused,
}

impl DropReason {
    const ALL: [Self; 2] = [Self::BufferFull, Self::Refused];

    const fn name(self) -> &'static str {
        match self {
            Self::BufferFull => "buffer_full",
            Self::Refused => "refused",
        }
    }
}

/// Counters of one signal. Any thread may add to them.
#[derive(Debug)]
pub(crate) struct ExportStats {
    signal: &'static str,
    delivered: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
    failures: AtomicU64,
}

impl ExportStats {
    /// All counters are 0.
    pub(crate) fn of(signal: &'static str) -> Self {
        Self { signal, delivered: 0.into(), dropped: Default::default(), failures: 0.into() }
    }

    /// Counts data points or spans that were delivered.
    pub(crate) fn delivered(&self, items: u64) {
        self.delivered.fetch_add(items, Ordering::Relaxed);
    }

    /// Counts data points or spans that were dropped.
    pub(crate) fn dropped(&self, reason: DropReason, items: u64) {
        self.dropped[reason as usize].fetch_add(items, Ordering::Relaxed);
    }

    /// Counts an attempt to deliver that failed.
    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// The current values.
    pub(crate) fn read(&self) -> Delivery {
        let count = |reason: DropReason| self.dropped[reason as usize].load(Ordering::Relaxed);
        Delivery {
            signal: self.signal,
            delivered: self.delivered.load(Ordering::Relaxed),
            dropped: DropReason::ALL.map(|reason| Dropped { reason: reason.name(), count: count(reason) }),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }
}

/// Export statistics of one signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Delivery {
    /// `metrics` or `traces`.
    pub(crate) signal: &'static str,
    /// Data points or spans that a collector accepted.
    pub(crate) delivered: u64,
    /// Data points or spans that were dropped, by reason.
    pub(crate) dropped: [Dropped; DropReason::ALL.len()],
    /// Attempts that failed. Their data was sent again unless it counts as dropped.
    pub(crate) failures: u64,
}

/// Data points or spans that were dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Dropped {
    /// The reason, as in the label of `observer_self_otlp_dropped_total`.
    pub(crate) reason: &'static str,
    /// How many.
    pub(crate) count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_separately() {
        let stats = ExportStats::of("metrics");
        stats.delivered(7);
        stats.dropped(DropReason::Refused, 2);
        stats.dropped(DropReason::BufferFull, 1);
        stats.failed();
        let delivery = stats.read();
        assert_eq!((delivery.signal, delivery.delivered, delivery.failures), ("metrics", 7, 1));
        let dropped: Vec<_> =
            delivery.dropped.iter().map(|dropped| (dropped.reason, dropped.count)).collect();
        assert_eq!(dropped, [("buffer_full", 1), ("refused", 2)]);
    }
}
