//! The causes of busy time and of stalls. A new cause has its field and its place in `PARTS` here, its sum in
//! `probes/reactor.rs`, its words in `export/words.rs` and its colour in `export/live/theme.rs`.
//!
//! The programs distinguish it either by what a blocked thread waits for (`observer-common/src/block.rs`) or as a state
//! of a thread that has no CPU (`RunState` in `observer-common/src/reactor.rs`).

use observer_common::block::Block;
use serde::{Serialize, Serializer};

/// Busy time by state and cause, in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Split {
    /// On a CPU.
    pub(crate) cpu: f64,
    /// In the run queue.
    pub(crate) runqueue: f64,
    /// Blocked.
    pub(crate) blocked: Blocked,
    /// The part of all these that was spent in garbage collections.
    pub(crate) gc: f64,
}

impl Split {
    /// The time with this cause.
    pub(crate) const fn of(&self, cause: Cause) -> f64 {
        match cause {
            Cause::Cpu => self.cpu,
            Cause::Runqueue => self.runqueue,
            Cause::Blocked(Block::Lock) => self.blocked.lock,
            Cause::Blocked(Block::Disk) => self.blocked.disk,
            Cause::Blocked(Block::Network) => self.blocked.network,
            Cause::Blocked(Block::Sleep) => self.blocked.sleep,
            Cause::Blocked(Block::PageFault) => self.blocked.page_fault,
            Cause::Blocked(Block::Other) => self.blocked.other,
            Cause::Gc => self.gc,
        }
    }

    /// Adds another's times.
    pub(crate) fn add(&mut self, other: &Self) {
        self.cpu += other.cpu;
        self.runqueue += other.runqueue;
        self.blocked.lock += other.blocked.lock;
        self.blocked.disk += other.blocked.disk;
        self.blocked.network += other.blocked.network;
        self.blocked.sleep += other.blocked.sleep;
        self.blocked.page_fault += other.blocked.page_fault;
        self.blocked.other += other.blocked.other;
        self.gc += other.gc;
    }

    /// The sum of all parts; garbage collections are included in them.
    pub(crate) fn total(&self) -> f64 {
        Cause::PARTS.into_iter().map(|cause| self.of(cause)).sum()
    }
}

/// Blocked time by cause, in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Blocked {
    /// Waiting for another thread or process: a futex, a file lock, a semaphore, the lock of an address space.
    pub(crate) lock: f64,
    /// In a file system.
    pub(crate) disk: f64,
    /// On a socket.
    pub(crate) network: f64,
    /// In a call that sleeps, such as `nanosleep`.
    pub(crate) sleep: f64,
    /// On a page fault that had to read memory first.
    pub(crate) page_fault: f64,
    /// On anything else: a pipe, a child process, a terminal; or stopped by a signal.
    pub(crate) other: f64,
}

/// The cause that took most of a stall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// On a CPU.
    Cpu,
    /// In the run queue.
    Runqueue,
    /// Blocked.
    Blocked(Block),
    /// In a garbage collection, on this thread or on another one that it waited for. Overlaps the other causes.
    Gc,
}

impl Cause {
    /// The causes that add up to the busy time, in display order.
    pub(crate) const PARTS: [Self; 8] = [
        Self::Cpu,
        Self::Runqueue,
        Self::Blocked(Block::Lock),
        Self::Blocked(Block::Disk),
        Self::Blocked(Block::Network),
        Self::Blocked(Block::Sleep),
        Self::Blocked(Block::PageFault),
        Self::Blocked(Block::Other),
    ];

    /// All causes.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::PARTS.into_iter().chain([Self::Gc])
    }

    /// The cause with the most time. Garbage collections do not count as time on a CPU here.
    pub(crate) fn of(split: &Split) -> Self {
        let own = |cause: Self| match cause {
            Self::Cpu => split.cpu - split.gc,
            other => split.of(other),
        };
        Self::all().max_by(|a, b| own(*a).total_cmp(&own(*b))).expect("there are causes")
    }

    /// Name in labels and reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Runqueue => "runqueue",
            Self::Blocked(Block::Lock) => "lock",
            Self::Blocked(Block::Disk) => "disk",
            Self::Blocked(Block::Network) => "network",
            Self::Blocked(Block::Sleep) => "sleep",
            Self::Blocked(Block::PageFault) => "page_fault",
            Self::Blocked(Block::Other) => "other",
            Self::Gc => "gc",
        }
    }

    /// Whether the thread was blocked.
    pub(crate) const fn is_blocked(self) -> bool {
        matches!(self, Self::Blocked(_))
    }

    /// State of the thread: `cpu`, `runqueue` or `blocked`. Garbage collections are mostly on a CPU.
    pub(crate) const fn state(self) -> &'static str {
        match self {
            Self::Cpu | Self::Gc => "cpu",
            Self::Runqueue => "runqueue",
            Self::Blocked(_) => "blocked",
        }
    }

    pub(super) fn index(self) -> usize {
        Self::all().position(|cause| cause == self).expect("one of all")
    }
}

#[cfg(test)]
impl schemars::JsonSchema for Cause {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Cause".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let names: Vec<_> = Self::all().map(Self::name).collect();
        schemars::json_schema!({
            "description": "The cause that took most of a stall.",
            "type": "string",
            "enum": names,
        })
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
