//! Typed access to the maps of the programs. A read copies a value while the programs change it: the fields of one
//! value may be a few events apart, and are never wrong by more than what happens meanwhile.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf, Stack},
};
use observer_common::{
    accept::{AcceptCall, Arrival, PortKey},
    deferred::{Class, ClassKey, DeferredTask, Extractor, Hook, HookAddress, Link, TaskKey},
    gc::{GcInProgress, Totals},
    histogram::Histogram,
    listener::Listener,
    loss::Loss,
    origin::{Answer, Connection, Descriptor, Request},
    reactor::Stall,
};

use super::{capacity::Capacity, id_filter::IdFilter, reactors::Reactors, slots::Slots, targets::Targets};

/// All maps of the programs.
pub(crate) struct Maps {
    /// Observed processes, by process id.
    pub(crate) targets: Targets,
    /// Processes that selection rejected, by process id.
    pub(crate) rejected: HashMap<MapData, u32, u8>,
    /// Event loops, and the threads that wait in them.
    pub(crate) reactors: Reactors,
    /// Listeners, by inode number.
    pub(crate) listeners: HashMap<MapData, u64, Listener>,
    /// Ports whose new connections get a time stamp, with the key of the listener, or 0 if there are several listeners.
    pub(crate) ports: HashMap<MapData, PortKey, u64>,
    /// Names of unix listeners whose new connections get a time stamp.
    pub(crate) unix_names: HashMap<MapData, u64, u8>,
    /// Waiting connections, by socket address in the kernel.
    pub(crate) queued: HashMap<MapData, u64, Arrival>,
    /// Threads inside an accept call.
    pub(crate) accepting: HashMap<MapData, u32, AcceptCall>,
    /// Offset of a thread's saved registers on its kernel stack; 0 if unknown.
    pub(crate) registers: Array<MapData, u32>,
    stalls: RingBuf<MapData>,
    /// Pauses by garbage collections, by process id.
    pub(crate) gc_pauses: HashMap<MapData, u32, Histogram>,
    /// Collections in progress, by thread id.
    pub(crate) gc_begun: HashMap<MapData, u32, GcInProgress>,
    /// Totals that runtimes count, by process id.
    pub(crate) gc_totals: HashMap<MapData, u32, Totals>,
    /// 1 once `gc_totals` has had an entry.
    pub(crate) gc_totals_used: Array<MapData, u32>,
    /// Processes whose deferred tasks are followed, by process id.
    pub(crate) followed: HashMap<MapData, u32, u32>,
    /// Connections that these processes have accepted.
    pub(crate) connections: HashMap<MapData, Descriptor, Connection>,
    /// Attached hooks, by process and address.
    pub(crate) hooks: HashMap<MapData, HookAddress, Hook>,
    /// How hooks read key, class and request id.
    pub(crate) extractors: Array<MapData, Extractor>,
    /// Pending and running deferred tasks.
    pub(crate) tasks: HashMap<MapData, TaskKey, DeferredTask>,
    /// Counters of deferred tasks, by kind.
    pub(crate) classes: HashMap<MapData, ClassKey, Class>,
    requests: RingBuf<MapData>,
    answers: RingBuf<MapData>,
    links: RingBuf<MapData>,
    kinds: RingBuf<MapData>,
    losses: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Takes the maps from the loaded object.
    pub(crate) fn take(ebpf: &mut Ebpf, capacity: Capacity) -> Result<Self> {
        let id_filter = IdFilter::of(take(ebpf, "ID_FILTER")?)?;
        Ok(Self {
            targets: Targets::of(HashMap::try_from(take(ebpf, "TARGETS")?)?, id_filter.clone()),
            rejected: HashMap::try_from(take(ebpf, "REJECTED_PIDS")?)?,
            reactors: Self::take_reactors(ebpf, id_filter, capacity)?,
            listeners: HashMap::try_from(take(ebpf, "LISTENERS")?)?,
            ports: HashMap::try_from(take(ebpf, "PORTS")?)?,
            unix_names: HashMap::try_from(take(ebpf, "UNIX_NAMES")?)?,
            queued: HashMap::try_from(take(ebpf, "QUEUED")?)?,
            accepting: HashMap::try_from(take(ebpf, "ACCEPTING")?)?,
            registers: Array::try_from(take(ebpf, "REGISTERS")?)?,
            stalls: RingBuf::try_from(take(ebpf, "STALLS")?)?,
            gc_pauses: HashMap::try_from(take(ebpf, "GC_PAUSES")?)?,
            gc_begun: HashMap::try_from(take(ebpf, "GC_BEGUN")?)?,
            gc_totals: HashMap::try_from(take(ebpf, "GC_TOTALS")?)?,
            gc_totals_used: Array::try_from(take(ebpf, "GC_TOTALS_USED")?)?,
            followed: HashMap::try_from(take(ebpf, "FOLLOWED")?)?,
            connections: HashMap::try_from(take(ebpf, "CONNECTIONS")?)?,
            hooks: HashMap::try_from(take(ebpf, "HOOKS")?)?,
            extractors: Array::try_from(take(ebpf, "EXTRACTORS")?)?,
            tasks: HashMap::try_from(take(ebpf, "TASKS")?)?,
            classes: HashMap::try_from(take(ebpf, "CLASSES")?)?,
            requests: RingBuf::try_from(take(ebpf, "REQUESTS")?)?,
            answers: RingBuf::try_from(take(ebpf, "ANSWERS")?)?,
            links: RingBuf::try_from(take(ebpf, "LINKS")?)?,
            kinds: RingBuf::try_from(take(ebpf, "KINDS")?)?,
            losses: PerCpuArray::try_from(take(ebpf, "LOSSES")?)?,
        })
    }

    fn take_reactors(ebpf: &mut Ebpf, id_filter: IdFilter, capacity: Capacity) -> Result<Reactors> {
        let mut reactors = Reactors {
            reactors: Slots::of(take(ebpf, "REACTORS")?, capacity.slots(), "REACTORS")?,
            waiters: Slots::of(take(ebpf, "WAITERS")?, capacity.slots(), "WAITERS")?,
            durations: Array::try_from(take(ebpf, "DURATIONS")?)?,
            threads: HashMap::try_from(take(ebpf, "THREADS")?)?,
            sets: HashMap::try_from(take(ebpf, "SETS")?)?,
            gaps: HashMap::try_from(take(ebpf, "GAPS")?)?,
            set_files: HashMap::try_from(take(ebpf, "SET_FILES")?)?,
            free_reactors: Stack::try_from(take(ebpf, "FREE_REACTORS")?)?,
            free_waiters: Stack::try_from(take(ebpf, "FREE_WAITERS")?)?,
            id_filter,
            ended: Vec::new(),
            released: Vec::new(),
        };
        reactors.free_all()?;
        Ok(reactors)
    }

    /// Number of programs that a target has executed so far; `None` if it is not a target any more.
    pub(crate) fn execs(&self, pid: u32) -> Option<u32> {
        self.targets.get(&pid, 0).ok().map(|target| target.execs)
    }

    /// Stalls that have ended since the last call.
    pub(crate) fn stalls(&mut self) -> Vec<Stall> {
        drain(&mut self.stalls)
    }

    /// Requests since the last call for which a task was deferred.
    pub(crate) fn requests(&mut self) -> Vec<Request> {
        drain(&mut self.requests)
    }

    /// Answers to these requests since the last call.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        drain(&mut self.answers)
    }

    /// Deferred tasks that have ended since the last call.
    pub(crate) fn links(&mut self) -> Vec<Link> {
        drain(&mut self.links)
    }

    /// Kinds of deferred tasks that were seen for the first time since the last call.
    pub(crate) fn kinds(&mut self) -> Vec<ClassKey> {
        drain(&mut self.kinds)
    }

    /// A descriptor that becomes readable when there are new kinds.
    pub(crate) fn kinds_descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the ring keeps its descriptor open while it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.kinds.as_raw_fd()) }.try_clone_to_owned()
    }

    /// How many events the programs have lost for this cause.
    pub(crate) fn lost(&self, cause: Loss) -> Result<u64> {
        Ok(self.losses.get(&(cause as u32), 0)?.iter().sum())
    }
}

/// Takes all records from a ring, all of which have type `T`.
fn drain<T: aya::Pod>(ring: &mut RingBuf<MapData>) -> Vec<T> {
    let mut all = Vec::new();
    while let Some(entry) = ring.next() {
        if entry.len() >= size_of::<T>() {
            // SAFETY: the entry has at least that many bytes, and any bytes are a valid `T`.
            all.push(unsafe { entry.as_ptr().cast::<T>().read_unaligned() });
        }
    }
    all
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
}
