//! The reactors, in slots that both sides give away. What each is doing is mapped into memory, so that looking at it often
//! costs no system calls and nothing at all to the reactors; how long what they did has taken is read slot by slot.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, Map, MapData, Stack};
use memmap2::{MmapOptions, MmapRaw};
use observer_common::{
    id_filter::Seen,
    reactor::{Durations, Phase, Reactor},
};

use super::{
    entries::{Added, add},
    id_filter::IdFilter,
};

/// How often an entry is read at most until two readings agree.
const READS: usize = 8;

/// The maps `REACTORS`, `DURATIONS`, `THREADS` and `FREE_SLOTS`.
pub(crate) struct Reactors {
    memory: MmapRaw,
    slots: u32,
    /// Programs that are yet to be loaded need its descriptor.
    _doing: MapData,
    durations: Array<MapData, Durations>,
    threads: HashMap<MapData, u32, u32>,
    free: Stack<MapData, u32>,
    id_filter: IdFilter,
}

/// A reactor as the programs keep it.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// What it is doing.
    pub(crate) now: Reactor,
    /// How long what it did has taken.
    pub(crate) durations: Durations,
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

impl Reactors {
    /// Maps the reactors, of which there are so many slots, and frees all but the first, which is nobody's.
    pub(super) fn of(
        doing: Map,
        durations: Array<MapData, Durations>,
        threads: HashMap<MapData, u32, u32>,
        mut free: Stack<MapData, u32>,
        id_filter: IdFilter,
        slots: u32,
    ) -> Result<Self> {
        let Map::Array(doing) = doing else { bail!("the map of reactors is no array") };
        let length = slots as usize * size_of::<Reactor>();
        let memory = MmapOptions::new().len(length).map_raw(doing.fd().as_fd().as_raw_fd());
        let memory = memory.context("cannot map the reactors")?;
        for slot in (1..slots).rev() {
            free.push(slot, 0)?;
        }
        Ok(Self { memory, slots, _doing: doing, durations, threads, free, id_filter })
    }

    /// What a thread is doing, if it is a reactor.
    pub(crate) fn get(&self, tid: u32) -> Option<Reactor> {
        let slot = self.threads.get(&tid, 0).ok()?;
        (slot < self.slots).then(|| self.doing(slot))
    }

    /// Whether a thread is still in a slice that was in progress.
    pub(crate) fn is_still_in(&self, slice: &InSlice) -> bool {
        self.get(slice.tid)
            .is_some_and(|now| now.phase == Phase::Slice as u32 && now.phase_since_ns == slice.since_ns)
    }

    /// Adds one that the programs have not met yet; they may have meanwhile, and their entry wins. Tells whether there is one
    /// now: there may be no slot left.
    pub(crate) fn adopt(&mut self, tid: u32, entry: Reactor) -> Result<bool> {
        let Ok(slot) = self.free.pop(0) else { return Ok(false) };
        self.durations.set(slot, Durations::NONE, 0)?;
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; nobody else has the slot.
        unsafe { self.slot(slot).write_volatile(Reactor { tid, slot, ..entry }) };
        self.id_filter.add_thread(tid, slot);
        let added = add(&mut self.threads, tid, slot);
        if !matches!(added, Ok(Added::Now)) {
            self.give_back(tid, slot)?;
        }
        Ok(added? != Added::NoRoom)
    }

    /// Forgets one that is gone or no target's, unless the programs have already because its id is another thread's.
    pub(crate) fn let_go(&mut self, entry: &Reactor) -> Result<()> {
        let is_gone = |reactor: &Reactor| reactor.phase == Phase::Exited as u32;
        let is_same =
            |now: Reactor| (now.slot, now.tgid, is_gone(&now)) == (entry.slot, entry.tgid, is_gone(entry));
        if self.get(entry.tid).is_some_and(is_same) && self.threads.remove(&entry.tid).is_ok() {
            self.give_back(entry.tid, entry.slot)?;
        }
        Ok(())
    }

    /// Frees a slot that its thread is not to be found in any more.
    fn give_back(&mut self, tid: u32, slot: u32) -> Result<()> {
        self.id_filter.remove_thread(tid, slot);
        self.free.push(slot, 0).context("cannot free the slot of a reactor")
    }

    /// Slices in progress.
    pub(crate) fn in_slices(&self) -> impl Iterator<Item = InSlice> + '_ {
        let in_slice = self.had().filter(|(_, _, phase)| *phase == Phase::Slice as u32);
        let taken = in_slice.filter(|&(slot, tid, _)| self.is_in(tid, slot));
        taken.map(|(slot, ..)| self.doing(slot)).map(|reactor| InSlice {
            tid: reactor.tid,
            pid: reactor.tgid,
            since_ns: reactor.phase_since_ns,
            frame_pointer: reactor.frame_pointer,
        })
    }

    /// All reactors, each as it was between two events: one that was read while a slice ended would have that twice. One
    /// that is too busy to be read in between is so in slices too short to matter. Those that are parked are told so, if
    /// only what all of them are doing shows that: the programs find out when they wake up.
    pub(crate) fn all(&self) -> Vec<Raw> {
        let slots: Vec<_> = self.taken().collect();
        // Large values, which are not to be moved as more come.
        let mut all = Vec::with_capacity(slots.len());
        all.extend(slots.into_iter().filter_map(|slot| self.settled(slot)));
        let mut pools = std::collections::HashMap::<_, u32>::new();
        let pool = |reactor: &Reactor| (reactor.tgid, reactor.pattern.set);
        for Raw { now, .. } in &all {
            // Who is gone has left.
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

    /// With how long what it did has taken; `None` if its slot has become another's meanwhile.
    fn settled(&self, slot: u32) -> Option<Raw> {
        let state = |reactor: &Reactor| (reactor.phase, reactor.phase_since_ns);
        let mut before = self.doing(slot);
        let mut readings = 0;
        loop {
            let durations = self.durations.get(&slot, 0).ok()?;
            let now = self.doing(slot);
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

    /// Slots that their threads are to be found in.
    fn taken(&self) -> impl Iterator<Item = u32> + '_ {
        self.had().filter(|&(slot, tid, _)| self.is_in(tid, slot)).map(|(slot, ..)| slot)
    }

    /// Slots that somebody has or has had: who was last, and the phase of that.
    fn had(&self) -> impl Iterator<Item = (u32, u32, u32)> + '_ {
        (1..self.slots).map_while(|slot| {
            let reactor = self.slot(slot);
            // SAFETY: inside the mapping, as in `adopt`; volatile for the reason given in `doing`.
            let (tid, phase) = unsafe {
                ((&raw const (*reactor).tid).read_volatile(), (&raw const (*reactor).phase).read_volatile())
            };
            // Slots are given away in their order: behind the first that nobody has had yet there are no others.
            (tid != 0).then_some((slot, tid, phase))
        })
    }

    fn is_in(&self, tid: u32, slot: u32) -> bool {
        match self.id_filter.of_thread(tid) {
            Seen::Nobody => false,
            Seen::One(only) => only == slot,
            Seen::Several => self.threads.get(&tid, 0).is_ok_and(|there| there == slot),
        }
    }

    fn doing(&self, slot: u32) -> Reactor {
        const WORDS: usize = size_of::<Reactor>() / size_of::<u64>();
        let from = self.slot(slot).cast::<u64>();
        // SAFETY: inside the mapping, as in `adopt`, and any words are a `Reactor`. Volatile, because the programs write
        // there meanwhile: each field by itself is whole.
        unsafe {
            std::mem::transmute::<[u64; WORDS], Reactor>(std::array::from_fn(|n| from.add(n).read_volatile()))
        }
    }

    /// A slot below their number.
    fn slot(&self, slot: u32) -> *mut Reactor {
        self.memory.as_mut_ptr().cast::<Reactor>().wrapping_add(slot as usize)
    }
}
