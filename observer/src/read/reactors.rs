//! The event loops, in slots that both sides assign. The current state of each is mapped into memory, so that frequent
//! reads need no system calls and do not disturb the loops. The histograms of durations are read slot by slot.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, Stack};
use memmap2::{MmapOptions, MmapRaw};
use observer_common::{
    id_filter::Seen,
    reactor::{Durations, Kind, Phase, Reactor},
};

use super::{
    entries::{Insertion, add},
    id_filter::IdFilter,
};

/// Maximum number of readings of an entry until two of them agree.
const READS: usize = 8;

/// The maps `REACTORS`, `DURATIONS`, `THREADS` and `FREE_SLOTS`.
pub(crate) struct Reactors {
    memory: MmapRaw,
    slots: u32,
    /// Kept open: programs that are loaded later need its descriptor.
    _states: MapData,
    durations: Array<MapData, Durations>,
    threads: HashMap<MapData, u32, u32>,
    free: Stack<MapData, u32>,
    id_filter: IdFilter,
}

/// The entry of an event loop, as the programs keep it.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// Its current state.
    pub(crate) now: Reactor,
    /// Histograms of its durations.
    pub(crate) durations: Durations,
}

/// A slice in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InSlice {
    /// Thread id.
    pub(crate) tid: u32,
    /// Process id.
    pub(crate) pid: u32,
    /// Start of the slice, in monotonic nanoseconds.
    pub(crate) since_ns: u64,
    /// Frame pointer of the thread when it last blocked in the slice; 0 if unknown.
    pub(crate) frame_pointer: u64,
    /// Descriptor of the epoll set that the thread waits on; `None` if it waits in another way.
    pub(crate) epoll_set: Option<u32>,
}

impl InSlice {
    /// The slice that an event loop is in.
    pub(crate) fn of(reactor: &Reactor) -> Self {
        Self {
            tid: reactor.tid,
            pid: reactor.tgid,
            since_ns: reactor.phase_since_ns,
            frame_pointer: reactor.frame_pointer,
            epoll_set: (reactor.pattern.kind == Kind::Epoll as u32).then_some(reactor.pattern.set),
        }
    }
}

impl InSlice {
    /// Whether both are the same slice.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (self.tid, self.since_ns) == (other.tid, other.since_ns)
    }
}

impl Reactors {
    /// Maps the event loops into memory. There are `slots` slots, all of which are marked as free except slot 0.
    pub(super) fn of(
        states: Map,
        durations: Array<MapData, Durations>,
        threads: HashMap<MapData, u32, u32>,
        mut free: Stack<MapData, u32>,
        id_filter: IdFilter,
        slots: u32,
    ) -> Result<Self> {
        let Map::Array(states) = states else { bail!("the map REACTORS is not an array") };
        let length = slots as usize * size_of::<Reactor>();
        let memory = MmapOptions::new().len(length).map_raw(states.fd().as_fd().as_raw_fd());
        let memory = memory.context("cannot mmap REACTORS")?;
        for slot in (1..slots).rev() {
            free.push(slot, 0)?;
        }
        Ok(Self { memory, slots, _states: states, durations, threads, free, id_filter })
    }

    /// The state of a thread; `None` if it is not an event loop.
    pub(crate) fn get(&self, tid: u32) -> Option<Reactor> {
        let slot = self.threads.get(&tid, 0).ok()?;
        (slot < self.slots).then(|| self.state(slot))
    }

    /// Whether a thread is still in the same slice.
    pub(crate) fn is_still_in(&self, slice: &InSlice) -> bool {
        self.get(slice.tid)
            .is_some_and(|now| now.phase == Phase::Slice as u32 && now.phase_since_ns == slice.since_ns)
    }

    /// Adds an event loop that the programs have not seen yet. If they have added it meanwhile, their entry is kept.
    /// Returns whether it has an entry now; `false` means that no slot is free.
    pub(crate) fn adopt(&mut self, tid: u32, entry: Reactor) -> Result<bool> {
        let Ok(slot) = self.free.pop(0) else { return Ok(false) };
        self.durations.set(slot, Durations::NONE, 0)?;
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; the slot is in no other use.
        unsafe { self.slot(slot).write_volatile(Reactor { tid, slot, ..entry }) };
        self.id_filter.add_thread(tid, slot);
        let added = add(&mut self.threads, tid, slot);
        if !matches!(added, Ok(Insertion::Inserted)) {
            self.free_slot(tid, slot)?;
        }
        Ok(added? != Insertion::Full)
    }

    /// Removes an event loop, unless the programs have replaced its entry because the thread id was reused.
    pub(crate) fn release(&mut self, entry: &Reactor) -> Result<()> {
        let is_gone = |reactor: &Reactor| reactor.phase == Phase::Exited as u32;
        let is_same =
            |now: Reactor| (now.slot, now.tgid, is_gone(&now)) == (entry.slot, entry.tgid, is_gone(entry));
        if self.get(entry.tid).is_some_and(is_same) && self.threads.remove(&entry.tid).is_ok() {
            self.free_slot(entry.tid, entry.slot)?;
        }
        Ok(())
    }

    /// Frees the slot of a thread that is not in `THREADS` any more.
    fn free_slot(&mut self, tid: u32, slot: u32) -> Result<()> {
        self.id_filter.remove_thread(tid, slot);
        self.free.push(slot, 0).context("cannot free the slot of an event loop")
    }

    /// Slices in progress.
    pub(crate) fn in_slices(&self) -> impl Iterator<Item = InSlice> + '_ {
        let in_slice = self.used_slots().filter(|(_, _, phase)| *phase == Phase::Slice as u32);
        let occupied = in_slice.filter(|&(slot, tid, _)| self.is_in(tid, slot));
        occupied.map(|(slot, ..)| InSlice::of(&self.state(slot)))
    }

    /// All event loops, each read consistently between two events: otherwise a slice that ends meanwhile could count
    /// twice. If a loop is too busy for that, its slices are too short for the difference to matter. Loops are reported
    /// as parked if that follows from the state of all loops of a pool: the programs only find out when they wake up.
    pub(crate) fn all(&self) -> Vec<Raw> {
        let slots: Vec<_> = self.occupied_slots().collect();
        // Reserved in advance: the values are large and should not be moved.
        let mut all = Vec::with_capacity(slots.len());
        all.extend(slots.into_iter().filter_map(|slot| self.consistent(slot)));
        let mut pools = std::collections::HashMap::<_, u32>::new();
        let pool = |reactor: &Reactor| (reactor.tgid, reactor.pattern.set);
        for Raw { now, .. } in &all {
            // Exited threads have left the pool.
            if now.phase != Phase::Exited as u32 {
                *pools.entry(pool(now)).or_default() += now.pattern.is_counted;
            }
        }
        for Raw { now, .. } in &mut all {
            let may_be = now.phase == Phase::Slice as u32 && now.may_be_parked_ns != 0;
            if may_be && pools.get(&pool(now)).is_some_and(|threads| *threads > 1) {
                now.phase = Phase::Parked as u32;
                now.phase_since_ns = now.may_be_parked_ns;
            }
        }
        all
    }

    /// Reads a slot until two readings of its state agree. `None` if the slot was reassigned meanwhile.
    fn consistent(&self, slot: u32) -> Option<Raw> {
        let state = |reactor: &Reactor| (reactor.phase, reactor.phase_since_ns);
        let mut before = self.state(slot);
        let mut readings = 0;
        loop {
            let durations = self.durations.get(&slot, 0).ok()?;
            let now = self.state(slot);
            readings += 1;
            if now.tid != before.tid {
                return None;
            }
            if readings == READS || state(&now) == state(&before) {
                return Some(Raw { now, durations });
            }
            before = now;
        }
    }

    /// Slots whose thread is in `THREADS`.
    fn occupied_slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.used_slots().filter(|&(slot, tid, _)| self.is_in(tid, slot)).map(|(slot, ..)| slot)
    }

    /// Slots that have ever been assigned, each with its last thread id and phase.
    fn used_slots(&self) -> impl Iterator<Item = (u32, u32, u32)> + '_ {
        (1..self.slots).map_while(|slot| {
            let reactor = self.slot(slot);
            // SAFETY: inside the mapping, as in `adopt`; volatile for the reason given in `state`.
            let (tid, phase) = unsafe {
                ((&raw const (*reactor).tid).read_volatile(), (&raw const (*reactor).phase).read_volatile())
            };
            // Slots are assigned in ascending order, so the first unused slot ends the iteration.
            (tid != 0).then_some((slot, tid, phase))
        })
    }

    fn is_in(&self, tid: u32, slot: u32) -> bool {
        match self.id_filter.slot_of(tid) {
            Seen::None => false,
            Seen::One(only) => only == slot,
            Seen::Several => self.threads.get(&tid, 0).is_ok_and(|found| found == slot),
        }
    }

    fn state(&self, slot: u32) -> Reactor {
        const WORDS: usize = size_of::<Reactor>() / size_of::<u64>();
        let from = self.slot(slot).cast::<u64>();
        // SAFETY: inside the mapping, as in `adopt`, and any words are a valid `Reactor`. Volatile, because the
        // programs write concurrently: each field is read in one piece.
        unsafe {
            std::mem::transmute::<[u64; WORDS], Reactor>(std::array::from_fn(|n| from.add(n).read_volatile()))
        }
    }

    /// Address of a slot, which must be below `slots`.
    fn slot(&self, slot: u32) -> *mut Reactor {
        self.memory.as_mut_ptr().cast::<Reactor>().wrapping_add(slot as usize)
    }
}
