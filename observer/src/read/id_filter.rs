//! Who is known at all (`ID_FILTER`): programs look where a target or its reactor is kept only if its id is counted here.
//! Memory that both sides add to.

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
use observer_common::id_filter::{IdFilter as Words, Seen, place, seen, share};

/// The map `ID_FILTER`, mapped.
#[derive(Clone)]
pub(super) struct IdFilter {
    memory: Arc<MmapRaw>,
    /// Programs that are yet to be loaded need its descriptor.
    _map: Arc<MapData>,
}

impl IdFilter {
    /// Maps it.
    pub(super) fn of(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the map of who is known is no array") };
        let memory = MmapOptions::new().len(size_of::<Words>()).map_raw(map.fd().as_fd().as_raw_fd());
        Ok(Self { memory: Arc::new(memory.context("cannot map who is known")?), _map: Arc::new(map) })
    }

    /// A process is about to become a target.
    pub(super) fn add_process(&self, pid: u32) {
        self.process(pid).fetch_add(1, Ordering::SeqCst);
    }

    /// A process is no target any more, or has not become one.
    pub(super) fn remove_process(&self, pid: u32) {
        self.process(pid).fetch_sub(1, Ordering::SeqCst);
    }

    /// A thread is about to be found in this slot.
    pub(super) fn add_thread(&self, tid: u32, slot: u32) {
        self.thread(tid).fetch_add(share(slot), Ordering::SeqCst);
    }

    /// A thread is not to be found in this slot any more.
    pub(super) fn remove_thread(&self, tid: u32, slot: u32) {
        self.thread(tid).fetch_sub(share(slot), Ordering::SeqCst);
    }

    /// Which thread this may be.
    pub(super) fn of_thread(&self, tid: u32) -> Seen {
        seen(self.thread(tid).load(Ordering::SeqCst))
    }

    fn process(&self, pid: u32) -> &AtomicU32 {
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; programs, too, add to it by
        // atomic instructions alone.
        unsafe { AtomicU32::from_ptr((&raw mut (*self.words()).processes).cast::<u32>().add(place(pid))) }
    }

    fn thread(&self, tid: u32) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr((&raw mut (*self.words()).threads).cast::<u64>().add(place(tid))) }
    }

    fn words(&self) -> *mut Words {
        self.memory.as_mut_ptr().cast()
    }
}
