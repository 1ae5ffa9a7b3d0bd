//! The board on which reactors show since when they are in a slice. It is mapped into memory, so that looking at it
//! often costs no system calls and nothing at all to the reactors.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, Map, MapData};
use memmap2::{MmapOptions, MmapRaw};
use observer_common::reactor::Place;

/// The map `BOARD`.
pub(crate) struct Board {
    places: Array<MapData, Place>,
    count: usize,
    memory: MmapRaw,
}

/// A slice in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InSlice {
    /// The thread.
    pub(crate) tid: u32,
    /// Its process.
    pub(crate) pid: u32,
    /// When it began, monotonic nanoseconds.
    pub(crate) since_ns: u64,
    /// Frame pointer that the thread had when it last blocked in it; 0 if that is not known.
    pub(crate) frame_pointer: u64,
}

impl InSlice {
    /// Whether it is the same slice, seen again.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (self.tid, self.since_ns) == (other.tid, other.since_ns)
    }
}

impl Board {
    /// Maps the board, which has so many places.
    pub(crate) fn of(map: Map, count: u32) -> Result<Self> {
        let Map::Array(data) = &map else { bail!("the board of slices is no array") };
        let length = count as usize * size_of::<Place>();
        let memory = MmapOptions::new().len(length).map_raw_read_only(data.fd().as_fd().as_raw_fd());
        let memory = memory.context("cannot map the board of slices")?;
        Ok(Self { places: map.try_into()?, count: count as usize, memory })
    }

    /// Gives a place to a thread that the programs have not met yet.
    pub(crate) fn assign(&mut self, place: u32, tid: u32, pid: u32) -> Result<()> {
        let nobody = Place { tid, tgid: pid, ..Place::default() };
        self.places.set(place, nobody, 0).context("cannot write to the board of slices")
    }

    /// Slices in progress.
    pub(crate) fn in_slices(&self) -> impl Iterator<Item = InSlice> + '_ {
        let first: *const Place = self.memory.as_ptr().cast();
        let places = (1..self.count).map(move |place| {
            // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; any bytes are a `Place`.
            // Volatile, because the programs write there meanwhile: each field by itself is whole.
            unsafe {
                let place = first.add(place);
                InSlice {
                    tid: (&raw const (*place).tid).read_volatile(),
                    pid: (&raw const (*place).tgid).read_volatile(),
                    since_ns: (&raw const (*place).since_ns).read_volatile(),
                    frame_pointer: (&raw const (*place).frame_pointer).read_volatile(),
                }
            }
        });
        // Places are given away in their order: behind the first that nobody has had yet there are no others.
        places.take_while(|slice| slice.tid != 0).filter(|slice| slice.since_ns != 0)
    }
}
