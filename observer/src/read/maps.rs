//! The maps shared with the programs, typed. Reading is a copy, value by value, while the programs go on: figures
//! of one value may be a few events apart from each other, never wrong by more than what happens meanwhile.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf, Stack},
};
use observer_common::{
    accept::{Accepting, Arrival, PortKey},
    deferred::{Class, ClassKey, DeferredTask, Extractor, Hook, Link, Place, TaskKey},
    gc::{Begun, Totals},
    histogram::Histogram,
    listener::Listener,
    loss::Loss,
    origin::{Answer, Connection, Descriptor, Request},
    reactor::{Pool, Stall},
};

use super::{capacity::Capacity, id_filter::IdFilter, reactors::Reactors, targets::Targets};
use crate::read::entries::entries;

/// All maps of the programs.
pub(crate) struct Maps {
    /// By process id.
    pub(crate) targets: Targets,
    /// Processes that were rejected, by id.
    pub(crate) rejected: HashMap<MapData, u32, u8>,
    /// Threads that wait for events.
    pub(crate) reactors: Reactors,
    /// How many threads wait on an epoll set.
    pools: HashMap<MapData, Pool, u32>,
    /// By inode number.
    pub(crate) listeners: HashMap<MapData, u64, Listener>,
    /// Ports whose new connections get a time stamp, with the key of the listener, or 0 if there are several.
    pub(crate) ports: HashMap<MapData, PortKey, u64>,
    /// Names of unix listeners whose new connections get a time stamp.
    pub(crate) unix_names: HashMap<MapData, u64, u8>,
    /// Connections that wait, by address.
    pub(crate) queued: HashMap<MapData, u64, Arrival>,
    /// Threads inside an accept call.
    pub(crate) accepting: HashMap<MapData, u32, Accepting>,
    /// Where on a kernel stack its thread's registers are; 0 while that is not known.
    pub(crate) registers: Array<MapData, u32>,
    stalls: RingBuf<MapData>,
    /// Pauses for garbage collections, by process id.
    pub(crate) gc_pauses: HashMap<MapData, u32, Histogram>,
    /// Collections in progress, by thread id.
    pub(crate) gc_begun: HashMap<MapData, u32, Begun>,
    /// Totals that runtimes keep themselves, by process id.
    pub(crate) gc_totals: HashMap<MapData, u32, Totals>,
    /// Whether there have been any.
    pub(crate) gc_totals_used: Array<MapData, u32>,
    /// Processes whose deferred work is followed, by id.
    pub(crate) followed: HashMap<MapData, u32, u32>,
    /// Connections that such processes have accepted.
    pub(crate) connections: HashMap<MapData, Descriptor, Connection>,
    /// Places in runtimes, and what they mean.
    pub(crate) hooks: HashMap<MapData, Place, Hook>,
    /// How to read those places.
    pub(crate) extractors: Array<MapData, Extractor>,
    /// Deferred work in flight.
    pub(crate) tasks: HashMap<MapData, TaskKey, DeferredTask>,
    /// Figures of deferred work, by kind.
    pub(crate) classes: HashMap<MapData, ClassKey, Class>,
    requests: RingBuf<MapData>,
    answers: RingBuf<MapData>,
    links: RingBuf<MapData>,
    kinds: RingBuf<MapData>,
    losses: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Takes the maps over from the loader.
    pub(crate) fn take(ebpf: &mut Ebpf, capacity: Capacity) -> Result<Self> {
        let id_filter = IdFilter::of(take(ebpf, "ID_FILTER")?)?;
        Ok(Self {
            targets: Targets::of(HashMap::try_from(take(ebpf, "TARGETS")?)?, id_filter.clone()),
            rejected: HashMap::try_from(take(ebpf, "REJECTED_PIDS")?)?,
            reactors: Reactors::of(
                take(ebpf, "REACTORS")?,
                Array::try_from(take(ebpf, "DURATIONS")?)?,
                HashMap::try_from(take(ebpf, "THREADS")?)?,
                Stack::try_from(take(ebpf, "FREE_SLOTS")?)?,
                id_filter,
                capacity.slots(),
            )?,
            pools: HashMap::try_from(take(ebpf, "POOLS")?)?,
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

    /// Forgets who waits on the sets of processes that are observed no more, or gone with nobody there to see; leaves those
    /// whose ids are others' by now for later.
    pub(crate) fn forget_pools(&mut self, pids: &mut BTreeSet<u32>) {
        let (others, gone) = pids.iter().partition::<BTreeSet<_>, _>(|pid| self.targets.get(pid, 0).is_ok());
        *pids = others;
        if gone.is_empty() {
            return;
        }
        for (pool, _) in entries::<Pool, u32>(&self.pools) {
            if gone.contains(&pool.tgid) {
                let _unless_it_left = self.pools.remove(&pool);
            }
        }
    }

    /// How many programs a target has started by now; `None` if it is none any more.
    pub(crate) fn execs(&self, pid: u32) -> Option<u32> {
        self.targets.get(&pid, 0).ok().map(|target| target.execs)
    }

    /// Stalls that have ended since the last time.
    pub(crate) fn stalls(&mut self) -> Vec<Stall> {
        drain(&mut self.stalls)
    }

    /// Requests that something was put off for since the last time.
    pub(crate) fn requests(&mut self) -> Vec<Request> {
        drain(&mut self.requests)
    }

    /// Answers to such requests since the last time.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        drain(&mut self.answers)
    }

    /// Deferred work that has ended since the last time.
    pub(crate) fn links(&mut self) -> Vec<Link> {
        drain(&mut self.links)
    }

    /// Kinds of deferred work that were met for the first time since the last time.
    pub(crate) fn kinds(&mut self) -> Vec<ClassKey> {
        drain(&mut self.kinds)
    }

    /// What is readable when there are any.
    pub(crate) fn kinds_descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the ring keeps its descriptor open while it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.kinds.as_raw_fd()) }.try_clone_to_owned()
    }

    /// How often the programs could not keep something for this cause.
    pub(crate) fn lost(&self, cause: Loss) -> Result<u64> {
        Ok(self.losses.get(&(cause as u32), 0)?.iter().sum())
    }
}

/// All that programs have sent through a ring which is for nothing else.
fn drain<T: aya::Pod>(ring: &mut RingBuf<MapData>) -> Vec<T> {
    let mut all = Vec::new();
    while let Some(entry) = ring.next() {
        if entry.len() >= size_of::<T>() {
            // SAFETY: as many bytes as that, and any bytes are one of these.
            all.push(unsafe { entry.as_ptr().cast::<T>().read_unaligned() });
        }
    }
    all
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
}
