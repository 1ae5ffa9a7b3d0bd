//! Inserts an entry into a hash map to which the programs may add the same key concurrently, and reads all entries.

use anyhow::Result;
use aya::maps::{HashMap, MapData, MapError};
use nix::libc;

use super::batch;

/// `BPF_NOEXIST`: an insertion fails if the key exists, so that the programs' entry is kept.
pub(crate) const NO_EXIST: u64 = 1;

/// Outcome of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Insertion {
    /// The entry was inserted.
    Inserted,
    /// The key exists; its entry was not changed.
    Exists,
    /// The map is full.
    Full,
}

/// Inserts an entry unless the key exists.
pub(super) fn add<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<Insertion, MapError> {
    match map.insert(key, value, NO_EXIST) {
        Ok(()) => Ok(Insertion::Inserted),
        Err(MapError::SyscallError(error)) => match error.io_error.raw_os_error() {
            Some(libc::EEXIST) => Ok(Insertion::Exists),
            Some(libc::E2BIG) => Ok(Insertion::Full),
            _ => Err(error.into()),
        },
        Err(other) => Err(other),
    }
}

/// Inserts an entry unless the key exists. Returns whether the key exists now; `false` means that the map is full.
pub(crate) fn insert_new<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<bool, MapError> {
    Ok(add(map, key, value)? != Insertion::Full)
}

/// All entries of a map. An entry that is removed meanwhile is omitted.
pub(crate) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> Vec<(K, V)> {
    let one_by_one = |_| {
        map.keys().filter_map(|key| key.ok().and_then(|key| Some((key, map.get(&key, 0).ok()?)))).collect()
    };
    batch::entries(map).unwrap_or_else(one_by_one)
}
