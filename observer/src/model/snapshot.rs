//! Everything known at one moment. Serialized as it stands, it is the JSON report `observer.report/1`.

use observer_common::listener::{DEPTHS, depth_bound};
use serde::Serialize;

use super::{
    busy::Split,
    deferred::{Deferred, HookFigures},
    delivery::Delivery,
    frame::Look,
    histogram::Histogram,
    place::Place,
    stall::Stalls,
};

/// Name and version of the report's shape.
pub(crate) const SCHEMA: &str = "observer.report/1";

/// One moment of one observation.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    /// [`SCHEMA`].
    pub(crate) schema: &'static str,
    /// Wall time at which the programs were attached, RFC 3339.
    pub(crate) started: String,
    /// Since the programs were attached.
    pub(crate) duration_seconds: f64,
    /// By process id.
    pub(crate) targets: Vec<Target>,
    /// About observer itself.
    #[serde(rename = "self")]
    pub(crate) own: Own,
}

impl Snapshot {
    /// What there is to tell while nothing is observed.
    pub(crate) fn turned_off() -> Self {
        Self {
            schema: SCHEMA,
            started: String::new(),
            duration_seconds: 0.0,
            targets: Vec::new(),
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
pub(crate) struct Target {
    /// Process id.
    pub(crate) pid: u32,
    /// Name of its main thread.
    pub(crate) comm: String,
    /// Path of its executable.
    pub(crate) exe: String,
    /// Where it belongs.
    #[serde(flatten)]
    pub(crate) place: Place,
    /// Whether it is gone.
    pub(crate) exited: bool,
    /// What it listens on. A listener that several targets share is listed once, with the lowest process id.
    pub(crate) listeners: Vec<Listener>,
    /// Its threads that wait for events.
    pub(crate) reactors: Vec<Reactor>,
    /// Work that it puts off, by kind.
    pub(crate) deferred: Vec<Deferred>,
    /// Times that work went on which was not known to have been put off: mostly before observer came.
    pub(crate) unmatched: u64,
    /// Places in its runtime that are watched for that.
    pub(crate) hooks: Vec<HookFigures>,
    /// Garbage collections of its runtime; `None` if it has no such, or nobody knows how to watch it.
    pub(crate) gc: Option<Gc>,
}

/// Garbage collections of a process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Gc {
    /// How many there were.
    pub(crate) count: u64,
    /// How long they took together; `None` if the runtime counts them without measuring.
    pub(crate) seconds: Option<f64>,
    /// How long each kept its thread, in seconds; `None` where only totals are known.
    pub(crate) pause: Option<Histogram>,
}

/// A listening socket and its accept queue.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Listener {
    /// `tcp` or `unix`.
    pub(crate) protocol: &'static str,
    /// `0.0.0.0:8080`, `[::]:443`, `unix:/run/app.sock`.
    pub(crate) address: String,
    /// Number among listeners of the same target and address (an SO_REUSEPORT group), from 1; `None` if it is alone.
    pub(crate) member: Option<usize>,
    /// Most connections that may wait.
    pub(crate) limit: u32,
    /// Connections that wait now.
    pub(crate) depth: u32,
    /// Most connections seen to wait.
    pub(crate) peak: u32,
    /// Handshakes that have begun and are not done, now.
    pub(crate) half_open: u32,
    /// How long the connection that waits longest has waited, in seconds; `None` if none waits.
    pub(crate) oldest_seconds: Option<f64>,
    /// Whether that one waited already when observer attached: it has waited at least so long.
    pub(crate) oldest_is_lower_bound: bool,
    /// Connections that joined the queue while observed.
    pub(crate) arrivals: u64,
    /// Connections accepted while observed.
    pub(crate) accepts: u64,
    /// Of those, the ones that were queued before observer looked: their wait is unknown and not in `wait`.
    pub(crate) accepts_unknown_wait: u64,
    /// Connections that their clients reset while they waited. The kernel keeps them in the queue all the same.
    pub(crate) aborted: u64,
    /// What the kernel dropped because of this listener, for any reason: connections, and segments that begin none.
    pub(crate) drops: u32,
    /// Of those, the ones dropped because the queue was full; `None` where the kernel's counter, one for the whole
    /// network namespace, may mean another listener.
    pub(crate) overflows: Option<u64>,
    /// Handshake done -> accept returned, in seconds.
    pub(crate) wait: Histogram,
    /// Connections that waited when one was accepted.
    pub(crate) depth_on_accept: Depths,
    /// Whether it no longer listens.
    pub(crate) closed: bool,
}

/// How deep the queue was at each accept.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Depths {
    /// Accepts by depth: 0, 1, 2, up to 4, up to 8 … up to 32,768, and above.
    pub(crate) counts: [u64; DEPTHS],
    /// Sum of all depths, in connections.
    pub(crate) sum: u64,
}

impl Depths {
    /// All depths together, in connections.
    #[expect(clippy::cast_precision_loss, reason = "exporters take floats; exact up to 2^53")]
    pub(crate) fn sum(&self) -> f64 {
        self.sum as f64
    }

    /// Upper bound in connections and how many accepts met no deeper queue, for every bucket but the last.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.counts.iter().enumerate().scan(0, |below, (bucket, count)| {
            *below += count;
            depth_bound(bucket).map(|bound| (bound, *below))
        })
    }
}

/// A thread that waits for events.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Reactor {
    /// Thread id.
    pub(crate) tid: u32,
    /// Its name.
    pub(crate) name: String,
    /// Finished slices: stretches between one wait and the next.
    pub(crate) slices: u64,
    /// Finished waits.
    pub(crate) waits: u64,
    /// Events those waits returned; a ring does not tell.
    pub(crate) events: u64,
    /// Time spent waiting, or parked while other threads waited on the same epoll set; what is in progress included.
    pub(crate) wait_seconds: f64,
    /// Time spent in slices, the slice in progress included.
    pub(crate) busy_seconds: f64,
    /// Busy time as a share of busy and waiting time; `None` while there is neither.
    pub(crate) utilization: Option<f64>,
    /// Age of the slice in progress; `None` while it waits.
    pub(crate) current_slice_seconds: Option<f64>,
    /// What it is doing, if that slice is late already.
    pub(crate) current_stack: Option<Look>,
    /// Delay that something due at a random instant meets, in seconds: a count for each millisecond observed.
    pub(crate) lag: Histogram,
    /// Lengths of finished slices, in seconds.
    pub(crate) slice: Histogram,
    /// Made runnable -> running after a wait, in seconds.
    pub(crate) wakeup: Histogram,
    /// Where busy time went.
    pub(crate) split_seconds: Split,
    /// Slices that took too long.
    pub(crate) stalls: Stalls,
    /// Whether the thread is gone.
    pub(crate) exited: bool,
}

/// About observer itself.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Own {
    /// Version of observer.
    pub(crate) version: &'static str,
    /// Release of the running kernel.
    pub(crate) kernel: String,
    /// What the programs' maps take of the kernel's memory.
    pub(crate) map_memory_bytes: u64,
    /// How observer fares as a service.
    #[serde(skip)]
    pub(crate) service: Service,
    /// What the programs could not keep, by cause.
    pub(crate) lost: Vec<Lost>,
    /// What goes unseen here, each with its reason.
    pub(crate) missing: Vec<Missing>,
    /// What became of what was pushed, by signal; nothing if nothing is to be pushed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) otlp: Vec<Delivery>,
}

/// What becomes of observer as a service.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Service {
    /// Unix time of the last refresh, in seconds; `None` while nothing is observed.
    pub(crate) refreshed: Option<f64>,
    /// Whether it was turned off by its kill switch.
    pub(crate) is_off: bool,
    /// How often its configuration was read again and taken.
    pub(crate) accepted: u64,
    /// How often it was read again and not understood.
    pub(crate) refused: u64,
    /// Processes whose runtimes wait to be attached to.
    pub(crate) waiting: u64,
}

/// Something the programs could not keep.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Lost {
    /// Why, as `observer_self_lost_total` has it.
    pub(crate) cause: &'static str,
    /// How often.
    pub(crate) count: u64,
}

/// A tracepoint or another source of figures that is not to be had here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Missing {
    /// What it is called.
    pub(crate) source: String,
    /// Why not.
    pub(crate) reason: String,
}

impl Listener {
    /// What people and labels call it: its address, and its number where several share that.
    pub(crate) fn name(&self) -> String {
        match self.member {
            Some(member) => format!("{}#{member}", self.address),
            None => self.address.clone(),
        }
    }
}

impl Target {
    /// Whether there is anything to tell about it.
    pub(crate) fn is_silent(&self) -> bool {
        self.listeners.is_empty() && self.reactors.is_empty() && self.deferred.is_empty()
    }
}
