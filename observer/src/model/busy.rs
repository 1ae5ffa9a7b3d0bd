//! Where an event loop's busy time goes, and what took most of it.

use observer_common::block::Block;
use serde::{Serialize, Serializer};

/// Where a reactor's busy time went, in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Split {
    /// On a CPU.
    pub(crate) cpu: f64,
    /// Runnable, waiting for a CPU.
    pub(crate) runqueue: f64,
    /// Blocked.
    pub(crate) blocked: Blocked,
    /// Of all these, what went into garbage collections.
    pub(crate) gc: f64,
}

impl Split {
    /// The part that went to one cause.
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

    /// Adds another's parts.
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

    /// All parts together.
    pub(crate) fn total(&self) -> f64 {
        Cause::PARTS.into_iter().map(|cause| self.of(cause)).sum()
    }
}

/// Blocked time by what it blocked in, in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Blocked {
    /// In another thread's or process's way: a futex, a file lock, a semaphore, the lock of an address space.
    pub(crate) lock: f64,
    /// In a file system.
    pub(crate) disk: f64,
    /// On a socket.
    pub(crate) network: f64,
    /// Asleep, of its own will.
    pub(crate) sleep: f64,
    /// For memory that had to be read first.
    pub(crate) page_fault: f64,
    /// In anything else: a pipe, a child process, a terminal; or stopped by a signal.
    pub(crate) other: f64,
}

/// What took most of a stall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// It ran.
    Cpu,
    /// It could have run, but others did.
    Runqueue,
    /// It waited for something.
    Blocked(Block),
    /// It, or another thread in its way, collected garbage: a part of the others.
    Gc,
}

impl Cause {
    /// Those that add up to the whole, in the order in which they are shown.
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

    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::PARTS.into_iter().chain([Self::Gc])
    }

    /// The largest part, with collections taken out of the time on a CPU.
    pub(crate) fn of(split: &Split) -> Self {
        let own = |cause: Self| match cause {
            Self::Cpu => split.cpu - split.gc,
            other => split.of(other),
        };
        Self::all().max_by(|a, b| own(*a).total_cmp(&own(*b))).expect("there are causes")
    }

    /// As labels and reports have it.
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

    /// Whether it waited for something.
    pub(crate) const fn is_blocked(self) -> bool {
        matches!(self, Self::Blocked(_))
    }

    /// What the scheduler makes of it: `cpu`, `runqueue` or `blocked`. Collections compute, most of the time.
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

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
