//! The map `TARGETS`. Almost every event looks up a process in it, so each entry is counted in `ID_FILTER` as well.

use std::ops::Deref;

use aya::maps::{HashMap, MapData, MapError};
use observer_common::process::Target;

use super::{
    entries::{Insertion, add},
    id_filter::IdFilter,
};

/// The map `TARGETS`, by process id. Dereferences to the map for reading.
pub(crate) struct Targets {
    map: HashMap<MapData, u32, Target>,
    id_filter: IdFilter,
}

impl Targets {
    pub(super) const fn of(map: HashMap<MapData, u32, Target>, id_filter: IdFilter) -> Self {
        Self { map, id_filter }
    }

    /// Inserts an entry unless the key exists. Returns whether the key exists now; `false` means that the map is full.
    pub(crate) fn insert_new(&mut self, pid: u32, target: Target) -> Result<bool, MapError> {
        Ok(self.add(pid, target)? != Insertion::Full)
    }

    /// Inserts or replaces an entry. Returns `false` if the map is full.
    pub(crate) fn set(&mut self, pid: u32, target: Target) -> Result<bool, MapError> {
        let added = self.add(pid, target)?;
        if added == Insertion::Exists {
            self.map.insert(pid, target, 0)?;
        }
        Ok(added != Insertion::Full)
    }

    /// Removes an entry. Returns whether it existed.
    pub(crate) fn remove(&mut self, pid: u32) -> bool {
        let existed = self.map.remove(&pid).is_ok();
        if existed {
            self.id_filter.remove_process(pid);
        }
        existed
    }

    fn add(&mut self, pid: u32, target: Target) -> Result<Insertion, MapError> {
        self.id_filter.add_process(pid);
        let added = add(&mut self.map, pid, target);
        if !matches!(added, Ok(Insertion::Inserted)) {
            self.id_filter.remove_process(pid);
        }
        added
    }
}

impl Deref for Targets {
    type Target = HashMap<MapData, u32, Target>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}
