//! Whether an event loop is late. That it is busy for long is no evidence: it is late only if something has waited for it.

/// Delay from which something is reported as LATE, in seconds: people notice such a delay. It is also the default stall
/// threshold.
pub(crate) const LATE: f64 = 0.050;

/// What is known of an event loop's delays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lateness {
    /// It looked for events at least every [`LATE`] seconds.
    InTime,
    /// It did not, but nothing is known to have waited for it that long.
    Busy,
    /// An event waited, or the loop had to wait for a CPU after an event.
    Late,
}

impl Lateness {
    /// Of a worker whose wake-ups took up to this many seconds. That it is busy keeps nobody waiting; connections that no
    /// worker has accepted are in the accept queue.
    pub(crate) fn of_worker(wakeup: f64) -> Self {
        if wakeup < LATE { Self::InTime } else { Self::Late }
    }

    /// Of a loop with this lag in seconds. `has_waited` says whether something is known to have waited for it: events
    /// during a stall, or the loop for a CPU after an event.
    pub(crate) fn of(lag: f64, has_waited: bool) -> Self {
        if lag < LATE {
            Self::InTime
        } else if has_waited {
            Self::Late
        } else {
            Self::Busy
        }
    }
}
