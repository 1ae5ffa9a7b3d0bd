//! The map `ID_FILTER`, which programs check before they look up a target or its event loop. It counts entries by id,
//! and is mapped into memory because user space adds entries as well.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use memmap2::{MmapOptions, MmapRaw};
use observer_common::id_filter::{IdFilter as Words, place, share};

/// `ID_FILTER`, mapped into memory.
#[derive(Clone)]
pub(super) struct IdFilter {
    memory: Arc<MmapRaw>,
    /// Kept open: programs that are loaded later need its descriptor.
    _map: Arc<MapData>,
}

impl IdFilter {
    /// Maps the filter into memory.
    pub(super) fn of(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the map ID_FILTER is not an array") };
        let memory = MmapOptions::new().len(size_of::<Words>()).map_raw(map.fd().as_fd().as_raw_fd());
        Ok(Self { memory: Arc::new(memory.context("cannot mmap ID_FILTER")?), _map: Arc::new(map) })
    }

    /// Counts a process; must be called before it is added to `TARGETS`.
    pub(super) fn add_process(&self, pid: u32) {
        self.process(pid).fetch_add(1, Ordering::SeqCst);
    }

    /// Uncounts a process; must be called after it was removed from `TARGETS`, or not added.
    pub(super) fn remove_process(&self, pid: u32) {
        self.process(pid).fetch_sub(1, Ordering::SeqCst);
    }

    /// Counts a thread with its slot; must be called before it is added to `THREADS`.
    pub(super) fn add_thread(&self, tid: u32, slot: u32) {
        self.thread(tid).fetch_add(share(slot), Ordering::SeqCst);
    }

    /// Uncounts a thread with its slot; must be called after it was removed from `THREADS`, or not added.
    pub(super) fn remove_thread(&self, tid: u32, slot: u32) {
        self.thread(tid).fetch_sub(share(slot), Ordering::SeqCst);
    }

    fn process(&self, pid: u32) -> &AtomicU32 {
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; programs, too, change it only
        // by atomic instructions.
        unsafe { AtomicU32::from_ptr((&raw mut (*self.words()).processes).cast::<u32>().add(place(pid))) }
    }

    fn thread(&self, tid: u32) -> &AtomicU64 {
        // SAFETY: as in `process`.
        unsafe { AtomicU64::from_ptr((&raw mut (*self.words()).threads).cast::<u64>().add(place(tid))) }
    }

    fn words(&self) -> *mut Words {
        self.memory.as_mut_ptr().cast()
    }
}
