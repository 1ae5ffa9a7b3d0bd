//! Processes under observation, which programs look for by almost every event: each is counted in `ID_FILTER` as well.

use std::ops::Deref;

use aya::maps::{HashMap, MapData, MapError};
use observer_common::process::Target;

use super::{
    entries::{Added, add},
    id_filter::IdFilter,
};

/// The map `TARGETS`, by process id; can be read like any other.
pub(crate) struct Targets {
    map: HashMap<MapData, u32, Target>,
    id_filter: IdFilter,
}

impl Targets {
    pub(super) const fn of(map: HashMap<MapData, u32, Target>, id_filter: IdFilter) -> Self {
        Self { map, id_filter }
    }

    /// Adds an entry unless there is one. Tells whether there is one now: a full map has room for no more.
    pub(crate) fn insert_new(&mut self, pid: u32, target: Target) -> Result<bool, MapError> {
        Ok(self.add(pid, target)? != Added::NoRoom)
    }

    /// Adds an entry, over what may be there. Tells whether there was room.
    pub(crate) fn set(&mut self, pid: u32, target: Target) -> Result<bool, MapError> {
        let added = self.add(pid, target)?;
        if added == Added::ThereAlready {
            self.map.insert(pid, target, 0)?;
        }
        Ok(added != Added::NoRoom)
    }

    /// Removes an entry. Tells whether there was one.
    pub(crate) fn remove(&mut self, pid: u32) -> bool {
        let was_there = self.map.remove(&pid).is_ok();
        if was_there {
            self.id_filter.remove_process(pid);
        }
        was_there
    }

    fn add(&mut self, pid: u32, target: Target) -> Result<Added, MapError> {
        self.id_filter.add_process(pid);
        let added = add(&mut self.map, pid, target);
        if !matches!(added, Ok(Added::Now)) {
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
