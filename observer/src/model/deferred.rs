//! Deferred tasks by kind: how many, how long they waited and ran, and the origin of each.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{
    histogram::Histogram,
    late::LATE,
    request::{Request, hexadecimal},
};

/// The deferred tasks of one kind, in one process.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Deferred {
    /// Name of the kind.
    pub(crate) task: String,
    /// Whether all are of one kind. Otherwise these are tasks that have not started, of kinds that are known only at
    /// the start.
    #[serde(skip)]
    pub(crate) is_kind_known: bool,
    /// Tasks enqueued; where the kind is known only at the start, tasks started.
    pub(crate) enqueued: u64,
    /// Of these, tasks that have started.
    pub(crate) started: u64,
    /// Of these, tasks that have finished.
    pub(crate) finished: u64,
    /// Tasks that were dropped, or whose process exited, before they started.
    pub(crate) orphaned: u64,
    /// Tasks that have not started, now.
    pub(crate) pending: u64,
    /// How long the longest waiting of those has waited, in seconds; `None` if none waits.
    pub(crate) oldest_seconds: Option<f64>,
    /// Time from the enqueue to the start, in seconds.
    pub(crate) wait: Histogram,
    /// Time from the start until the task last ran, in seconds, of finished tasks.
    pub(crate) run: Histogram,
    /// The latest tasks that have ended and whose origin is known, oldest first; only in a report.
    pub(crate) links: Vec<Link>,
}

/// A kind whose median wait is below this, in seconds, is meant to start at once.
const PROMPT_WAIT: f64 = 0.010;

/// Whether tasks that are meant to start at once were delayed by an event loop that was late by `lag` seconds. Kinds
/// that wait on purpose, such as timers, are excluded by their median wait.
pub(crate) fn is_held_up(wait: &Histogram, lag: f64) -> bool {
    let is_prompt = wait.quantile(0.5).is_some_and(|median| median < PROMPT_WAIT);
    // A wait that is much longer than the lag has another cause.
    is_prompt && lag >= LATE && wait.max() >= LATE && wait.max() <= 2.0 * lag
}

impl Deferred {
    /// Whether a task has waited far longer than any that started, so that it may never start.
    pub(crate) fn is_overdue(&self) -> bool {
        /// Number of started tasks from which their longest wait is meaningful.
        const MIN_COUNT: u64 = 20;
        /// The wait is far too long from this multiple of the longest wait on, and from this number of seconds on.
        const MIN_MULTIPLE: f64 = 10.0;
        const MIN_SECONDS: f64 = 1.0;

        let limit = (MIN_MULTIPLE * self.wait.max()).max(MIN_SECONDS);
        self.is_kind_known
            && self.wait.count() >= MIN_COUNT
            && self.oldest_seconds.is_some_and(|oldest| oldest >= limit)
    }

    /// The number of dropped tasks to report, of `orphaned`. None if the kind is unknown: those are mostly timers,
    /// most of which are cancelled.
    pub(crate) const fn dropped(&self, orphaned: u64) -> u64 {
        if self.is_kind_known { orphaned } else { 0 }
    }
}

/// A deferred task that has ended, with its origin.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Link {
    /// Id of the task.
    #[serde(serialize_with = "hexadecimal")]
    #[cfg_attr(test, schemars(with = "String"))]
    pub(crate) id: u64,
    /// Id of the task that enqueued it, for the same request; `None` if the request itself did.
    #[serde(serialize_with = "hexadecimal_or_none")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub(crate) parent: Option<u64>,
    /// The origin of the task.
    pub(crate) origin: Arc<Request>,
    /// Span that the process was in when it enqueued the task, as it published it by OpenTelemetry's thread context
    /// (OTEP 4947); `None` if it published none. It takes precedence over the request's `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) context: Option<TraceContext>,
    /// The runtime's own id of the request, where its profile reads one. It is only reported, not used to match tasks.
    pub(crate) request_id: Option<String>,
    /// Time of the enqueue, in monotonic nanoseconds.
    pub(crate) queued_ns: u64,
    /// How long it waited until it started or, if it never did, until it was dropped, in seconds.
    pub(crate) wait_seconds: f64,
    /// How long it ran, in seconds; `None` if it never started.
    pub(crate) run_seconds: Option<f64>,
}

/// A span of a trace, in hexadecimal digits as in OpenTelemetry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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

/// A hook in the runtime of a process, with its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct HookCounters {
    /// The profile that defines it.
    pub(crate) profile: String,
    /// Its verb: `snapshot`, `restore`, `leave`, `forget` or `clear`.
    pub(crate) verb: &'static str,
    /// The function and its module.
    pub(crate) place: String,
    /// How often it fired.
    pub(crate) hits: u64,
    /// How often it matched: a `snapshot` recorded a task, or another verb found the task that it fired for.
    pub(crate) matches: u64,
}

impl HookCounters {
    /// Whether both are the same hook, in two copies of a module.
    pub(crate) fn is_of_same_place(&self, other: &Self) -> bool {
        (&self.profile, self.verb, &self.place) == (&other.profile, other.verb, &other.place)
    }

    /// Adds the counters of the hook in another copy.
    pub(crate) fn add(&mut self, other: &Self) {
        self.hits += other.hits;
        self.matches += other.matches;
    }

    /// Whether this hook fired often and never matched, so that the runtime is not as its profile says. For a
    /// `restore` that is evidence only once tasks are known to have been enqueued, because it is attached to before
    /// the hooks that enqueue.
    pub(crate) fn never_matches(&self, enqueued: u64) -> bool {
        /// Number of hits, and of enqueued tasks, from which this is evidence.
        const MIN_COUNT: u64 = 100;

        let is_evidence = self.verb == "snapshot" || (self.verb == "restore" && enqueued >= MIN_COUNT);
        self.matches == 0 && self.hits >= MIN_COUNT && is_evidence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_never_matches_is_no_fault_before_tasks_are_known() {
        let hook = |verb, hits, matches| HookCounters {
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
