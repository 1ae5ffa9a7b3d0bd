//! Adding an entry to a hash map that the programs may add at the same time, and reading all entries.

use anyhow::Result;
use aya::maps::{HashMap, MapData, MapError};
use nix::libc;

use super::batch;

/// What an insertion does if the key is there: leaves the programs' own entry alone.
pub(crate) const NO_EXIST: u64 = 1;

/// What became of an entry that was to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// It is there now.
    Now,
    /// There was one, which was left alone.
    ThereAlready,
    /// The map is full.
    NoRoom,
}

/// Adds an entry unless the programs have made one meanwhile.
pub(super) fn add<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<Added, MapError> {
    match map.insert(key, value, NO_EXIST) {
        Ok(()) => Ok(Added::Now),
        Err(MapError::SyscallError(error)) => match error.io_error.raw_os_error() {
            Some(libc::EEXIST) => Ok(Added::ThereAlready),
            Some(libc::E2BIG) => Ok(Added::NoRoom),
            _ => Err(error.into()),
        },
        Err(other) => Err(other),
    }
}

/// The same. Tells whether there is an entry now: a full map has room for no more.
pub(crate) fn insert_new<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<bool, MapError> {
    Ok(add(map, key, value)? != Added::NoRoom)
}

/// All entries. An entry that is removed meanwhile is left out.
pub(crate) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> Vec<(K, V)> {
    let one_by_one = |_| {
        map.keys().filter_map(|key| key.ok().and_then(|key| Some((key, map.get(&key, 0).ok()?)))).collect()
    };
    batch::entries(map).unwrap_or_else(one_by_one)
}
