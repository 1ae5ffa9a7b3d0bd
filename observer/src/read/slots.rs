//! An array map of the programs that is mapped into memory, so that frequent reads need no system calls and do not
//! disturb the targets.

use std::{
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData};
use memmap2::{MmapOptions, MmapRaw};

/// An array with one entry for each slot.
pub(super) struct Slots<T> {
    memory: MmapRaw,
    count: u32,
    /// Kept open: programs that are loaded later need its descriptor.
    _map: MapData,
    entry: PhantomData<T>,
}

impl<T: aya::Pod> Slots<T> {
    /// Maps an array of `count` entries into memory.
    pub(super) fn of(map: Map, count: u32, name: &str) -> Result<Self> {
        let Map::Array(map) = map else { bail!("the map {name} is not an array") };
        let length = count as usize * size_of::<T>();
        let memory = MmapOptions::new().len(length).map_raw(map.fd().as_fd().as_raw_fd());
        let memory = memory.with_context(|| format!("cannot mmap {name}"))?;
        Ok(Self { memory, count, _map: map, entry: PhantomData })
    }

    /// The entry in a slot; `None` if there is no such slot. Each of its words is read in one piece.
    pub(super) fn get(&self, slot: u32) -> Option<T> {
        let from = self.at(slot)?.cast::<u64>();
        let mut value = MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast::<u64>();
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; entries consist of words, and any
        // words are a valid entry. Volatile, because the programs write concurrently.
        unsafe {
            for word in 0..size_of::<T>() / size_of::<u64>() {
                to.add(word).write(from.add(word).read_volatile());
            }
            Some(value.assume_init())
        }
    }

    /// Writes an entry that nothing else uses.
    pub(super) fn set(&self, slot: u32, entry: T) {
        if let Some(at) = self.at(slot) {
            // SAFETY: as in `get`.
            unsafe { at.write_volatile(entry) };
        }
    }

    /// The field at this offset of an entry in bytes, which the programs change as well.
    pub(super) fn u16(&self, slot: u32, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: as in `get`; fields are aligned, and the programs change them in one piece.
        self.field(slot, offset).map(|field| unsafe { AtomicU16::from_ptr(field.cast()) })
    }

    /// As [`u16`](Self::u16).
    pub(super) fn u32(&self, slot: u32, offset: usize) -> Option<&AtomicU32> {
        // SAFETY: as above.
        self.field(slot, offset).map(|field| unsafe { AtomicU32::from_ptr(field.cast()) })
    }

    /// As [`u16`](Self::u16).
    pub(super) fn u64(&self, slot: u32, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: as above.
        self.field(slot, offset).map(|field| unsafe { AtomicU64::from_ptr(field.cast()) })
    }

    fn field(&self, slot: u32, offset: usize) -> Option<*mut u8> {
        let entry = self.at(slot)?.cast::<u8>();
        (offset < size_of::<T>()).then(|| entry.wrapping_add(offset))
    }

    /// All slots except slot 0, which is never used.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> + use<T> {
        1..self.count
    }

    fn at(&self, slot: u32) -> Option<*mut T> {
        (slot < self.count).then(|| self.memory.as_mut_ptr().cast::<T>().wrapping_add(slot as usize))
    }
}
