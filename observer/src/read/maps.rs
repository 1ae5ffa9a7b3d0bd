//! The maps shared with the programs, typed. Reading is a copy, value by value, while the programs go on: figures
//! of one value may be a few events apart from each other, never wrong by more than what happens meanwhile.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
};
use nix::libc;
use observer_common::{
    accept::{Accepting, PortKey},
    listener::Listener,
    loss::Loss,
    process::Target,
    reactor::Reactor,
};

/// What an insertion does if the key is there: leaves the programs' own entry alone.
const NO_EXIST: u64 = 1;

/// All maps of the programs.
pub(crate) struct Maps {
    /// By process id.
    pub(crate) targets: HashMap<MapData, u32, Target>,
    /// By thread id.
    pub(crate) reactors: HashMap<MapData, u32, Reactor>,
    /// By inode number.
    pub(crate) listeners: HashMap<MapData, u64, Listener>,
    /// Ports whose new connections get a time stamp.
    pub(crate) ports: HashMap<MapData, PortKey, u8>,
    /// Threads inside an accept call.
    pub(crate) accepting: HashMap<MapData, u32, Accepting>,
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
            accepting: HashMap::try_from(take(ebpf, "ACCEPTING")?)?,
            losses: PerCpuArray::try_from(take(ebpf, "LOSSES")?)?,
        })
    }

    /// What the programs could not keep, by cause.
    pub(crate) fn losses(&self) -> Result<Vec<(&'static str, u64)>> {
        Loss::ALL
            .iter()
            .map(|(loss, name)| Ok((*name, self.losses.get(&(*loss as u32), 0)?.iter().sum())))
            .collect()
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

/// All entries. An entry that is removed meanwhile is left out.
pub(crate) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> Vec<(K, V)> {
    map.keys().filter_map(|key| key.ok().and_then(|key| Some((key, map.get(&key, 0).ok()?)))).collect()
}
