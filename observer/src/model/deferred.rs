//! Work that was put off: how much of which kind, how long it waited and ran, and which request each piece is due to.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{
    histogram::Histogram,
    lag::LATE,
    request::{Request, hexadecimal},
};

/// One kind of deferred work of a process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Deferred {
    /// What the kind is called.
    pub(crate) task: String,
    /// Whether it is one kind. Else this is work of any kind, told when it starts, that has not started.
    #[serde(skip)]
    pub(crate) is_kind_known: bool,
    /// Pieces put off; where only their start tells the kind, those that have started.
    pub(crate) enqueued: u64,
    /// Of these, the ones that have started.
    pub(crate) started: u64,
    /// Of these, the ones that have ended.
    pub(crate) finished: u64,
    /// Pieces that were forgotten, or whose process ended, before they started.
    pub(crate) orphaned: u64,
    /// Pieces that have not started, now.
    pub(crate) pending: u64,
    /// How long the longest waiting of those has waited, in seconds; `None` if none waits.
    pub(crate) oldest_seconds: Option<f64>,
    /// Put off -> started, in seconds.
    pub(crate) wait: Histogram,
    /// Started -> worked on for the last time, in seconds, of those that have ended.
    pub(crate) run: Histogram,
    /// The latest pieces that are over and whose request is known, oldest first; only in a report.
    pub(crate) links: Vec<Link>,
}

/// Half of the work that is put off to be done soon starts in less than this, in seconds.
const SOON: f64 = 0.010;

/// Whether work that waited like this was to be done soon and could not: it has to be when event loops were this late.
/// Timers wait because they are meant to.
pub(crate) fn is_held_up(wait: &Histogram, lag: f64) -> bool {
    let is_soon = wait.quantile(0.5).is_some_and(|half| half < SOON);
    // What waited for much longer did not wait for the loop alone.
    is_soon && lag >= LATE && wait.max() >= LATE && wait.max() <= 2.0 * lag
}

impl Deferred {
    /// Whether a piece waits for far longer than any that has started: the kind is one that starts sooner.
    pub(crate) fn is_overdue(&self) -> bool {
        /// From so many on it is known how long they wait.
        const ENOUGH: u64 = 20;
        /// Times the longest wait, and seconds.
        const FAR: f64 = 10.0;
        const LONG: f64 = 1.0;

        let limit = (FAR * self.wait.max()).max(LONG);
        self.is_kind_known
            && self.wait.count() >= ENOUGH
            && self.oldest_seconds.is_some_and(|oldest| oldest >= limit)
    }

    /// Of so many pieces that were forgotten, those that somebody has to know of. Not of work of any kind: timers that are
    /// cancelled are such, and few that are set are not.
    pub(crate) const fn dropped(&self, orphaned: u64) -> u64 {
        if self.is_kind_known { orphaned } else { 0 }
    }
}

/// A piece of deferred work that is over, and the request it is due to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Link {
    /// Its number.
    #[serde(serialize_with = "hexadecimal")]
    pub(crate) id: u64,
    /// The number of the piece that put it off, for the same request; `None` if the request itself did.
    #[serde(serialize_with = "hexadecimal_or_none")]
    pub(crate) parent: Option<u64>,
    /// The request.
    pub(crate) origin: Arc<Request>,
    /// Where in a trace the process itself said that it was when it put this off, by OpenTelemetry's thread context
    /// (OTEP 4947); `None` if it said nothing. It counts for more than the request's `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) context: Option<TraceContext>,
    /// What the runtime itself calls the request, where its profile knows; nothing is told by it.
    pub(crate) request_id: Option<String>,
    /// When it was put off, monotonic nanoseconds.
    pub(crate) queued_ns: u64,
    /// How long it waited: until it started or, if it never did, until it was forgotten. In seconds.
    pub(crate) wait_seconds: f64,
    /// How long it ran; `None` if it never started.
    pub(crate) run_seconds: Option<f64>,
}

/// A span of a trace, in hexadecimal digits as OpenTelemetry writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct TraceContext {
    /// The trace: 32 digits.
    pub(crate) trace_id: String,
    /// The span in it: 16 digits.
    pub(crate) span_id: String,
}

fn hexadecimal_or_none<S: Serializer>(number: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    match number {
        Some(number) => hexadecimal(number, serializer),
        None => serializer.serialize_none(),
    }
}

/// A place in a runtime that is watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct HookFigures {
    /// The profile that names it.
    pub(crate) profile: String,
    /// What it means: `snapshot`, `restore`, `leave`, `forget` or `clear`.
    pub(crate) verb: &'static str,
    /// The function and its module.
    pub(crate) place: String,
    /// How often the process came there.
    pub(crate) hits: u64,
    /// How often that meant something: for all but a snapshot, that what was meant was known.
    pub(crate) matches: u64,
}

impl HookFigures {
    /// Whether nothing tells these from others but the copy of the module that they are of.
    pub(crate) fn is_of_same_place(&self, other: &Self) -> bool {
        (&self.profile, self.verb, &self.place) == (&other.profile, other.verb, &other.place)
    }

    /// Adds what was counted in another copy.
    pub(crate) fn add(&mut self, other: &Self) {
        self.hits += other.hits;
        self.matches += other.matches;
    }

    /// Whether this never meant anything, though the process came here often: something about this runtime is not as its profile
    /// says. Where tasks start that says nothing before some are known to have been enqueued: the end is attached to first.
    pub(crate) fn never_matches(&self, enqueued: u64) -> bool {
        /// From so many on.
        const ENOUGH: u64 = 100;

        let is_evidence = self.verb == "snapshot" || (self.verb == "restore" && enqueued >= ENOUGH);
        self.matches == 0 && self.hits >= ENOUGH && is_evidence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_never_matches_is_no_fault_before_tasks_are_known() {
        let hook = |verb, hits, matches| HookFigures {
            profile: "p".into(),
            verb,
            place: "f in m".into(),
            hits,
            matches,
        };
        assert!(hook("snapshot", 100, 0).never_matches(0));
        assert!(hook("restore", 100, 0).never_matches(100));
        assert!(!hook("restore", 1000, 0).never_matches(99));
        assert!(!hook("restore", 1000, 1).never_matches(100));
        assert!(!hook("restore", 99, 0).never_matches(100));
        assert!(!hook("forget", 1000, 0).never_matches(100));
    }
}
