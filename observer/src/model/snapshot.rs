//! A snapshot: everything known at one moment. It is serialized unchanged as the JSON report `observer.report/1`.

use observer_common::listener::{DEPTHS, depth_bound};
use serde::Serialize;

use super::{
    busy::Split,
    deferred::{Deferred, HookCounters},
    delivery::Delivery,
    frame::StackSample,
    histogram::Histogram,
    late::{LATE, Lateness},
    stall::Stalls,
    workload::Workload,
};

/// Name and version of the report's schema.
pub(crate) const SCHEMA: &str = "observer.report/1";

/// Everything known about an observation at one moment.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Snapshot {
    /// Name and version of this schema.
    pub(crate) schema: &'static str,
    /// Wall time at which the programs were attached, RFC 3339.
    pub(crate) started: String,
    /// Time since the programs were attached.
    pub(crate) duration_seconds: f64,
    /// Sorted by process id.
    pub(crate) targets: Vec<Target>,
    /// Groups of processes that serve one connection at a time each. Sorted by the id of the parent.
    pub(crate) workers: Vec<Workers>,
    /// observer itself.
    #[serde(rename = "self")]
    pub(crate) own: Own,
}

impl Snapshot {
    /// The snapshot while nothing is observed.
    pub(crate) fn turned_off() -> Self {
        Self {
            schema: SCHEMA,
            started: String::new(),
            duration_seconds: 0.0,
            targets: Vec::new(),
            workers: Vec::new(),
            own: Own {
                version: env!("CARGO_PKG_VERSION"),
                service: Service { is_off: true, ..Service::default() },
                ..Own::default()
            },
        }
    }
}

/// A process under observation.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Target {
    /// Process id.
    pub(crate) pid: u32,
    /// Name of its main thread.
    pub(crate) comm: String,
    /// Path of its executable.
    pub(crate) exe: String,
    /// Id of the process that started it; 0 if unknown.
    pub(crate) parent: u32,
    /// Its container, pod or service.
    #[serde(flatten)]
    pub(crate) workload: Workload,
    /// Whether it has exited.
    pub(crate) exited: bool,
    /// Its listeners. A listener that several targets share is listed once: with the only process that accepts from
    /// it, or else with the first that had it open.
    pub(crate) listeners: Vec<Listener>,
    /// Its event loops.
    pub(crate) reactors: Vec<Reactor>,
    /// What its main thread waits for events with, if that is not watched: `poll` or `select`. Its lag is unknown then.
    pub(crate) unwatched_waits: Option<&'static str>,
    /// Its deferred tasks, by kind.
    pub(crate) deferred: Vec<Deferred>,
    /// How often a task ran without a known enqueue. As a rule, it was enqueued before observer attached.
    pub(crate) unmatched: u64,
    /// Hooks in its runtime.
    pub(crate) hooks: Vec<HookCounters>,
    /// Garbage collections of its runtime; `None` if it has none, or if no profile says how to watch them.
    pub(crate) gc: Option<Gc>,
}

/// Garbage collections of a process.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Gc {
    /// Number of collections.
    pub(crate) count: u64,
    /// Their total time in seconds; `None` if the runtime counts them without measuring.
    pub(crate) seconds: Option<f64>,
    /// How long each occupied its thread, in seconds; `None` if only totals are known.
    pub(crate) pause: Option<Histogram>,
}

/// A listening socket and its accept queue.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Listener {
    /// `tcp` or `unix`.
    pub(crate) protocol: &'static str,
    /// `0.0.0.0:8080`, `[::]:443`, `unix:/run/app.sock`.
    pub(crate) address: String,
    /// Number within an SO_REUSEPORT group, that is among listeners of the same target and address, from 1; `None`
    /// outside a group.
    pub(crate) member: Option<usize>,
    /// Maximum number of connections in the queue.
    pub(crate) limit: u32,
    /// Connections in the queue now.
    pub(crate) depth: u32,
    /// Most connections seen in the queue.
    pub(crate) peak: u32,
    /// Handshakes in progress.
    pub(crate) half_open: u32,
    /// How long the first connection in the queue has waited, in seconds; `None` if the queue is empty.
    pub(crate) oldest_seconds: Option<f64>,
    /// Whether that connection was queued before observer attached. Its age is a lower bound then.
    pub(crate) oldest_is_lower_bound: bool,
    /// Connections that joined the queue while observed.
    pub(crate) arrivals: u64,
    /// Connections accepted while observed.
    pub(crate) accepts: u64,
    /// Of those, connections that were queued before observer attached. Their wait is unknown and not in `wait`.
    pub(crate) accepts_unknown_wait: u64,
    /// Connections that their clients reset while they waited. The kernel keeps them in the queue.
    pub(crate) aborted: u64,
    /// Connections and segments that the kernel dropped because of this listener, for any reason. Segments that
    /// `TCP_DEFER_ACCEPT` sets aside are not counted.
    pub(crate) drops: u32,
    /// Of those, connections dropped because the queue was full. `None` where they may be another listener's: the
    /// kernel's counter is of the whole network namespace.
    pub(crate) overflows: Option<u64>,
    /// Time from the end of the handshake until accept returned, in seconds.
    pub(crate) wait: Histogram,
    /// Connections in the queue when one was accepted, including that one.
    pub(crate) depth_on_accept: Depths,
    /// Whether it no longer listens.
    pub(crate) closed: bool,
}

/// Depths of the queue at each accept.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Depths {
    /// Accepts by depth: 0, 1, 2, up to 4, up to 8 … up to 32,768, and above.
    pub(crate) counts: [u64; DEPTHS],
    /// Sum of all depths, in connections.
    pub(crate) sum: u64,
}

impl Depths {
    /// Sum of all depths, in connections.
    #[expect(clippy::cast_precision_loss, reason = "exporters take floats; exact up to 2^53")]
    pub(crate) fn sum(&self) -> f64 {
        self.sum as f64
    }

    /// Upper bound in connections, and number of accepts at a depth up to it, of every bucket but the last, which has
    /// no bound.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.counts.iter().enumerate().scan(0, |below, (bucket, count)| {
            *below += count;
            depth_bound(bucket).map(|bound| (bound, *below))
        })
    }
}

/// An event loop.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Reactor {
    /// Identifies the loop within its process: the id of the thread that waited first, with a number if that thread waited
    /// first in other loops before.
    pub(crate) id: String,
    /// Id of the thread that waited first.
    #[serde(skip)]
    pub(crate) tid: u32,
    /// Id of its only thread; `None` if several threads have waited in it.
    #[serde(rename = "tid")]
    pub(crate) only_tid: Option<u32>,
    /// Number of threads that belong to it.
    pub(crate) threads: u32,
    /// Name of the thread that waited first.
    pub(crate) name: String,
    /// Finished slices.
    pub(crate) slices: u64,
    /// Finished waits.
    pub(crate) waits: u64,
    /// Events that those waits returned. io_uring does not report them.
    pub(crate) events: u64,
    /// Of these, events that were already waiting when the loop looked for them.
    pub(crate) events_delayed: u64,
    /// Time in which at least one thread waited, including the wait in progress.
    pub(crate) wait_seconds: f64,
    /// Time in slices, that is, while no thread waited, including the slice in progress.
    pub(crate) busy_seconds: f64,
    /// Busy time divided by busy and waiting time; `None` while both are 0.
    pub(crate) utilization: Option<f64>,
    /// Age of the slice in progress; `None` during a wait.
    pub(crate) current_slice_seconds: Option<f64>,
    /// Whether events wait for the end of that slice, if it is a stall already; `None` if that is unknown.
    pub(crate) current_slice_events_wait: Option<bool>,
    /// Its stack, if the slice in progress is a stall already.
    pub(crate) current_stack: Option<StackSample>,
    /// Delay in seconds that an event arriving at a random moment would see: a count for each millisecond observed.
    pub(crate) lag: Histogram,
    /// Lengths of finished slices, in seconds.
    pub(crate) slice: Histogram,
    /// Time from when the waiting loop became runnable until it ran, in seconds.
    pub(crate) wakeup: Histogram,
    /// Lengths of the slices at whose end events were waiting, in seconds: upper bounds of the delays of these events.
    pub(crate) event_delay: Histogram,
    /// Busy time by state and cause.
    pub(crate) split_seconds: Split,
    /// Slices of the stall threshold or more.
    pub(crate) stalls: Stalls,
    /// Whether it has ended: its threads have exited, or wait elsewhere.
    pub(crate) exited: bool,
    /// What it serves.
    #[serde(skip)]
    pub(crate) duty: Duty,
    /// Whether it is no event loop but a worker, see `workers`: it keeps nobody waiting but the client that it serves.
    pub(crate) is_worker: bool,
}

impl Reactor {
    /// Whether it was late since the start.
    pub(crate) fn lateness(&self) -> Lateness {
        if self.is_worker {
            return Lateness::of_worker(self.wakeup.max());
        }
        let has_waited = self.stalls.late > 0 || self.wakeup.max() >= LATE || self.is_awaited();
        Lateness::of(self.lag.max(), has_waited)
    }

    /// Whether events are waiting for the end of a long slice now.
    pub(crate) fn is_awaited(&self) -> bool {
        self.current_slice_events_wait == Some(true)
    }
}

/// What the thread that waits on a set serves, as far as the set shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Duty {
    /// Several clients, or unknown.
    #[default]
    Several,
    /// One connection, for as long as it lasts.
    OneConnection,
    /// The connections of a listener, one after another: while it serves one, its set holds only the listener.
    OneAtATime,
}

/// A group of workers: processes with the same parent and the same executable.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Workers {
    /// Process id of their parent.
    pub(crate) parent: u32,
    /// Name of the parent, or of the first worker if the parent is not observed.
    pub(crate) comm: String,
    /// Path of their executable.
    pub(crate) exe: String,
    /// Workers that are running.
    pub(crate) running: usize,
    /// Of those, workers that are busy now.
    pub(crate) busy: usize,
    /// Workers that have exited, as far as they are still known: see `targets`.
    pub(crate) exited: usize,
    /// Time in which they were busy, in seconds, including slices in progress.
    pub(crate) busy_seconds: f64,
    /// Time in which they waited for work, in seconds.
    pub(crate) wait_seconds: f64,
    /// Busy time divided by busy and waiting time; `None` while both are 0.
    pub(crate) utilization: Option<f64>,
    /// Lengths of finished slices, in seconds.
    pub(crate) slice: Histogram,
    /// Busy time by state and cause.
    pub(crate) split_seconds: Split,
    /// Slices of the stall threshold or more. The share of a site is its share of their time.
    pub(crate) stalls: Stalls,
}

/// observer itself.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Own {
    /// Version of observer.
    pub(crate) version: &'static str,
    /// Release of the running kernel.
    pub(crate) kernel: String,
    /// Kernel memory of the programs' maps.
    pub(crate) map_memory_bytes: u64,
    /// State of observer as a service.
    #[serde(skip)]
    pub(crate) service: Service,
    /// Data that the programs could not record, by cause.
    pub(crate) lost: Vec<Lost>,
    /// Sources that are unavailable, each with the reason.
    pub(crate) missing: Vec<Missing>,
    /// Export statistics by signal; empty if nothing is pushed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) otlp: Vec<Delivery>,
}

/// State of observer as a service.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Service {
    /// Unix time of the last refresh, in seconds; `None` while nothing is observed.
    pub(crate) refreshed: Option<f64>,
    /// Whether observer is detached because its kill switch exists.
    pub(crate) is_off: bool,
    /// Reloads of the configuration that were accepted.
    pub(crate) accepted: u64,
    /// Reloads of the configuration that were refused, because it was invalid.
    pub(crate) refused: u64,
    /// Whether observer has just started, and is still attaching to the runtimes of targets.
    pub(crate) is_attaching: bool,
    /// Processes whose runtimes wait to be attached to.
    pub(crate) waiting: u64,
}

/// Data that the programs could not record.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Lost {
    /// The cause, as in the label of `observer_self_lost_total`.
    pub(crate) cause: &'static str,
    /// How often.
    pub(crate) count: u64,
}

/// A tracepoint or another source of metrics that is unavailable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Missing {
    /// Name of the source.
    pub(crate) source: String,
    /// Why it is unavailable.
    pub(crate) reason: String,
}

impl Listener {
    /// Name in labels and reports: the address, with the number of the member in an SO_REUSEPORT group.
    pub(crate) fn name(&self) -> String {
        match self.member {
            Some(member) => format!("{}#{member}", self.address),
            None => self.address.clone(),
        }
    }
}

impl Target {
    /// Its event loops that are not workers.
    pub(crate) fn loops(&self) -> impl Iterator<Item = &Reactor> {
        self.reactors.iter().filter(|reactor| !reactor.is_worker)
    }

    /// Whether all that there is to report about it is part of its group of workers.
    pub(crate) fn is_only_worker(&self) -> bool {
        !self.reactors.is_empty() && self.is_silent()
    }

    /// Whether there is nothing to report about it, or only as a worker.
    pub(crate) fn is_silent(&self) -> bool {
        self.listeners.is_empty() && self.loops().next().is_none() && self.deferred.is_empty()
    }
}
