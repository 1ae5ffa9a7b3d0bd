//! The maps shared with the programs, typed. Reading is a copy, value by value, while the programs go on: figures
//! of one value may be a few events apart from each other, never wrong by more than what happens meanwhile.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
};
use nix::libc;
use observer_common::{
    accept::{Accepting, Arrival, PortKey},
    gc::{Begun, Totals},
    histogram::Histogram,
    listener::Listener,
    loss::Loss,
    process::Target,
    reactor::Reactor,
};

/// What an insertion does if the key is there: leaves the programs' own entry alone.
const NO_EXIST: u64 = 1;

/// How often an entry is read at most until two readings agree.
const READS: usize = 8;

/// All maps of the programs.
pub(crate) struct Maps {
    /// By process id.
    pub(crate) targets: HashMap<MapData, u32, Target>,
    /// By thread id.
    pub(crate) reactors: HashMap<MapData, u32, Reactor>,
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
    /// Pauses for garbage collections, by process id.
    pub(crate) gc_pauses: HashMap<MapData, u32, Histogram>,
    /// Collections in progress, by thread id.
    pub(crate) gc_begun: HashMap<MapData, u32, Begun>,
    /// Totals that runtimes keep themselves, by process id.
    pub(crate) gc_totals: HashMap<MapData, u32, Totals>,
    /// Whether there have been any.
    pub(crate) gc_totals_used: Array<MapData, u32>,
    losses: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Takes the maps over from the loader.
    pub(crate) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            targets: HashMap::try_from(take(ebpf, "TARGETS")?)?,
            reactors: HashMap::try_from(take(ebpf, "REACTORS")?)?,
            listeners: HashMap::try_from(take(ebpf, "LISTENERS")?)?,
            ports: HashMap::try_from(take(ebpf, "PORTS")?)?,
            unix_names: HashMap::try_from(take(ebpf, "UNIX_NAMES")?)?,
            queued: HashMap::try_from(take(ebpf, "QUEUED")?)?,
            accepting: HashMap::try_from(take(ebpf, "ACCEPTING")?)?,
            gc_pauses: HashMap::try_from(take(ebpf, "GC_PAUSES")?)?,
            gc_begun: HashMap::try_from(take(ebpf, "GC_BEGUN")?)?,
            gc_totals: HashMap::try_from(take(ebpf, "GC_TOTALS")?)?,
            gc_totals_used: Array::try_from(take(ebpf, "GC_TOTALS_USED")?)?,
            losses: PerCpuArray::try_from(take(ebpf, "LOSSES")?)?,
        })
    }

    /// How often the programs could not keep something for this cause.
    pub(crate) fn lost(&self, cause: Loss) -> Result<u64> {
        Ok(self.losses.get(&(cause as u32), 0)?.iter().sum())
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
}

/// Adds an entry unless the programs have made one meanwhile. Tells whether there is an entry now: a full map has
/// room for no more.
pub(crate) fn insert_new<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<bool, MapError> {
    match map.insert(key, value, NO_EXIST) {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(error)) => match error.io_error.raw_os_error() {
            Some(libc::EEXIST) => Ok(true),
            Some(libc::E2BIG) => Ok(false),
            _ => Err(error.into()),
        },
        Err(other) => Err(other),
    }
}

/// All reactors, each as it was between two events: one that was read while a slice ended would have that twice. One
/// that is too busy to be read in between is so in slices too short to matter.
pub(crate) fn reactors(map: &HashMap<MapData, u32, Reactor>) -> Vec<(u32, Reactor)> {
    let mut reactors = entries(map);
    for (tid, reactor) in &mut reactors {
        for _ in 0..READS {
            let Ok(again) = map.get(tid, 0) else { break };
            let is_settled = (again.phase, again.phase_since_ns) == (reactor.phase, reactor.phase_since_ns);
            *reactor = again;
            if is_settled {
                break;
            }
        }
    }
    reactors
}

/// All entries. An entry that is removed meanwhile is left out.
pub(crate) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> Vec<(K, V)> {
    map.keys().filter_map(|key| key.ok().and_then(|key| Some((key, map.get(&key, 0).ok()?)))).collect()
}
