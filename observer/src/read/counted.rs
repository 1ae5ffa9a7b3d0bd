//! Maps whose entries programs look for by almost every event: how many there are is counted by id (`PRESENCE`), so that
//! they look only where there is somebody. The counts are memory that both sides add to.

use std::{
    ops::Deref,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, Map, MapData, MapError};
use memmap2::{MmapOptions, MmapRaw};
use observer_common::presence::{Presence, place};

use super::maps::{Added, add};

/// The map `PRESENCE`, mapped.
pub(super) struct Counts {
    memory: Arc<MmapRaw>,
    /// Programs that are yet to be loaded need its descriptor.
    _map: MapData,
}

impl Counts {
    /// Maps the counts.
    pub(super) fn of(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the map of who is known is no array") };
        let memory = MmapOptions::new().len(size_of::<Presence>()).map_raw(map.fd().as_fd().as_raw_fd());
        Ok(Self { memory: Arc::new(memory.context("cannot map who is known")?), _map: map })
    }

    /// A map by thread id.
    pub(super) fn threads<V: aya::Pod>(&self, map: HashMap<MapData, u32, V>) -> Counted<V> {
        Counted { map, memory: self.memory.clone(), first: std::mem::offset_of!(Presence, threads) }
    }

    /// A map by process id.
    pub(super) fn processes<V: aya::Pod>(&self, map: HashMap<MapData, u32, V>) -> Counted<V> {
        Counted { map, memory: self.memory.clone(), first: std::mem::offset_of!(Presence, processes) }
    }
}

/// Such a map, by id; can be read like any other.
pub(crate) struct Counted<V> {
    map: HashMap<MapData, u32, V>,
    memory: Arc<MmapRaw>,
    /// Where its counts begin in the memory, in bytes.
    first: usize,
}

impl<V: aya::Pod> Counted<V> {
    /// Adds an entry unless there is one. Tells whether there is one now: a full map has room for no more.
    pub(crate) fn insert_new(&mut self, id: u32, value: V) -> Result<bool, MapError> {
        Ok(self.add(id, value)? != Added::NoRoom)
    }

    /// Adds an entry, over what may be there. Tells whether there was room.
    pub(crate) fn set(&mut self, id: u32, value: V) -> Result<bool, MapError> {
        let added = self.add(id, value)?;
        if added == Added::ThereAlready {
            self.map.insert(id, value, 0)?;
        }
        Ok(added != Added::NoRoom)
    }

    /// Removes an entry. Tells whether there was one.
    pub(crate) fn remove(&mut self, id: u32) -> bool {
        let was_there = self.map.remove(&id).is_ok();
        if was_there {
            self.count(id).fetch_sub(1, Ordering::SeqCst);
        }
        was_there
    }

    fn add(&mut self, id: u32, value: V) -> Result<Added, MapError> {
        self.count(id).fetch_add(1, Ordering::SeqCst);
        let added = add(&mut self.map, id, value);
        if !matches!(added, Ok(Added::Now)) {
            self.count(id).fetch_sub(1, Ordering::SeqCst);
        }
        added
    }

    fn count(&self, id: u32) -> &AtomicU32 {
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; programs, too, add to it by
        // atomic instructions alone.
        unsafe { AtomicU32::from_ptr(self.memory.as_mut_ptr().add(self.first).cast::<u32>().add(place(id))) }
    }
}

impl<V> Deref for Counted<V> {
    type Target = HashMap<MapData, u32, V>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}
