//! The event loops and the threads that wait in them, in slots that both sides assign. Their current state is mapped into
//! memory. The histograms of durations are read slot by slot.

use std::{mem::offset_of, sync::atomic::Ordering::SeqCst};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, MapData, Stack};
use observer_common::{
    reactor::{ABANDONED_NS, Durations, Gap, Reactor, SetDescriptor},
    waiter::{Kind, NO_SET, Phase, RunState, WaitPattern, Waiter},
};

use super::{
    entries::{Insertion, add},
    id_filter::IdFilter,
    slots::Slots,
};

/// Maximum number of readings of an entry until two of them agree.
const READS: usize = 8;

/// The maps of event loops and of waiters.
pub(crate) struct Reactors {
    pub(super) reactors: Slots<Reactor>,
    pub(super) waiters: Slots<Waiter>,
    /// `DURATIONS`.
    pub(super) durations: Array<MapData, Durations>,
    /// Slots of waiters by thread id.
    pub(super) threads: HashMap<MapData, u32, u32>,
    /// Slots of loops by the address of the `struct file`.
    pub(super) sets: HashMap<MapData, u64, u32>,
    pub(super) gaps: HashMap<MapData, u32, Gap>,
    pub(super) set_files: HashMap<MapData, SetDescriptor, u64>,
    pub(super) free_reactors: Stack<MapData, u32>,
    pub(super) free_waiters: Stack<MapData, u32>,
    pub(super) id_filter: IdFilter,
    /// Loops that have ended, and waiters that were released. Their slots are freed at the next reading, because a program
    /// may just be using them.
    pub(super) ended: Vec<u32>,
    pub(super) released: Vec<u32>,
}

/// What identifies an event loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ReactorId {
    /// Its slot.
    pub(crate) slot: u32,
    /// When it was seen first, in monotonic nanoseconds.
    pub(crate) created_ns: u64,
}

impl ReactorId {
    /// Of this entry.
    pub(crate) const fn of(reactor: &Reactor) -> Self {
        Self { slot: reactor.slot, created_ns: reactor.created_ns }
    }
}

/// An event loop, as the programs keep it.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// Its current state.
    pub(crate) now: Reactor,
    /// The thread whose slices are those of the loop; [`Waiter::EMPTY`] if it has left the loop.
    pub(crate) waiter: Waiter,
    /// Histograms of its durations.
    pub(crate) durations: Durations,
}

impl Raw {
    /// What identifies it.
    pub(crate) const fn id(&self) -> ReactorId {
        ReactorId::of(&self.now)
    }

    /// Start of the slice in progress, in monotonic nanoseconds; `None` if there is none.
    pub(crate) fn slice_since_ns(&self) -> Option<u64> {
        slice_since_ns(&self.now, &self.waiter)
    }

    /// Start of the wait in progress of a loop with one thread, in monotonic nanoseconds.
    pub(crate) fn wait_since_ns(&self) -> Option<u64> {
        let waits = self.now.is_shared == 0
            && self.now.members != 0
            && self.waiter.tid != 0
            && self.waiter.phase == Phase::Waiting as u32
            && self.waiter.phase_since_ns != 0;
        waits.then_some(self.waiter.phase_since_ns)
    }

    /// Part of a slice in which the loop's thread is now; `None` if that is unknown.
    pub(crate) fn present_part(&self) -> Option<usize> {
        let is_its = Some(self.waiter.phase_since_ns) == self.slice_since_ns();
        is_its.then(|| self.waiter.run.wrapping_add(self.waiter.block) as usize)
    }
}

fn slice_since_ns(reactor: &Reactor, waiter: &Waiter) -> Option<u64> {
    if reactor.members == 0 {
        return None;
    }
    if reactor.is_shared != 0 {
        return (reactor.gap_since_ns != 0).then_some(reactor.gap_since_ns);
    }
    (waiter.tid != 0 && waiter.phase == Phase::Slice as u32).then_some(waiter.phase_since_ns)
}

/// A slice in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InSlice {
    /// The event loop.
    pub(crate) reactor: ReactorId,
    /// Its thread.
    pub(crate) tid: u32,
    /// Process of the thread.
    pub(crate) pid: u32,
    /// Start of the slice, in monotonic nanoseconds.
    pub(crate) since_ns: u64,
    /// Frame pointer of the thread when it last blocked in the slice; 0 if unknown.
    pub(crate) frame_pointer: u64,
    /// Descriptor of the epoll set that the thread waits on; `None` if it waits in another way.
    pub(crate) epoll_set: Option<u32>,
}

impl InSlice {
    /// The slice that an event loop is in; `None` if its thread is unknown.
    pub(crate) fn of(reactor: &Reactor, waiter: &Waiter) -> Option<Self> {
        let since_ns = slice_since_ns(reactor, waiter)?;
        let is_its = waiter.tid != 0 && waiter.phase_since_ns == since_ns;
        is_its.then_some(Self {
            reactor: ReactorId::of(reactor),
            tid: waiter.tid,
            pid: waiter.tgid,
            since_ns,
            frame_pointer: waiter.frame_pointer,
            epoll_set: (waiter.pattern.kind == Kind::Epoll as u32).then_some(waiter.pattern.set),
        })
    }

    /// Whether both are the same slice.
    pub(crate) fn is(&self, other: &Self) -> bool {
        (self.tid, self.since_ns) == (other.tid, other.since_ns)
    }
}

/// A thread that was waiting for events before the programs were attached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adopted {
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) kind: Kind,
    /// The descriptor that it waits on, as in [`WaitPattern`].
    pub(crate) set: u32,
}

impl Adopted {
    /// The descriptor whose file identifies the loop; `None` if there is no such file.
    const fn descriptor(&self) -> Option<SetDescriptor> {
        let has_file = !matches!(self.kind, Kind::Poll) && self.set != NO_SET;
        if has_file { Some(SetDescriptor { tgid: self.pid, fd: self.set }) } else { None }
    }

    /// The entry of the thread at `now`.
    const fn waiter(&self, now: u64) -> Waiter {
        Waiter {
            tid: self.tid,
            tgid: self.pid,
            phase: Phase::Waiting as u32,
            phase_since_ns: now,
            run: RunState::Blocked as u32,
            run_since_ns: now,
            pattern: WaitPattern { kind: self.kind as u32, set: self.set, is_firm: 1, ..WaitPattern::NONE },
            ..Waiter::EMPTY
        }
    }
}

impl Reactors {
    /// Marks all slots as free except slot 0.
    pub(super) fn free_all(&mut self) -> Result<()> {
        for slot in self.reactors.numbers().collect::<Vec<_>>().into_iter().rev() {
            self.free_reactors.push(slot, 0)?;
            self.free_waiters.push(slot, 0)?;
        }
        Ok(())
    }

    /// Whether the programs know a thread.
    pub(crate) fn is_known(&self, tid: u32) -> bool {
        self.threads.get(&tid, 0).is_ok()
    }

    /// The present state of an event loop; `None` if it has ended.
    pub(crate) fn get(&self, id: ReactorId) -> Option<Reactor> {
        let is_it = |reactor: &Reactor| reactor.created_ns == id.created_ns && reactor.tgid != 0;
        self.reactors.get(id.slot).filter(is_it).filter(|_| !self.ended.contains(&id.slot))
    }

    /// Descriptor of the epoll set of a loop, in the process that waited on it first; `None` if it is no epoll loop.
    pub(crate) fn epoll_set(&self, id: ReactorId) -> Option<u32> {
        let reactor = self.get(id)?;
        (reactor.kind == Kind::Epoll as u32).then_some(reactor.set)
    }

    /// Whether an event loop is still in the same slice.
    pub(crate) fn is_still_in(&self, slice: &InSlice) -> bool {
        let now = self.with_waiter(slice.reactor.slot);
        now.is_some_and(|(reactor, waiter)| {
            reactor.created_ns == slice.reactor.created_ns
                && waiter.tid == slice.tid
                && slice_since_ns(&reactor, &waiter) == Some(slice.since_ns)
        })
    }

    /// Asks for the files of these threads' sets, which the walk over open files then finds.
    pub(crate) fn ask_for_files(&mut self, threads: &[Adopted]) -> Result<()> {
        let known: Vec<_> = self.set_files.keys().flatten().collect();
        for descriptor in known {
            let _present = self.set_files.remove(&descriptor);
        }
        for descriptor in threads.iter().filter_map(Adopted::descriptor) {
            // If the map is full, the thread is adopted without a file.
            let _full = add(&mut self.set_files, descriptor, 0)?;
        }
        Ok(())
    }

    /// Adds a thread that the programs have not seen yet, as waiting since `now`. If they have added it meanwhile, their
    /// entry is kept. Returns whether it has an entry now; `false` means that no slot is free.
    pub(crate) fn adopt(&mut self, thread: Adopted, now: u64) -> Result<bool> {
        let descriptor = thread.descriptor();
        let file = descriptor.and_then(|descriptor| self.set_files.get(&descriptor, 0).ok()).unwrap_or(0);
        let Ok(slot) = self.free_waiters.pop(0) else { return Ok(false) };
        let is_stale = u16::from(descriptor.is_some() && file == 0);
        self.waiters.set(slot, Waiter { slot, is_stale, ..thread.waiter(now) });
        self.id_filter.add_thread(thread.tid, slot);
        let added = add(&mut self.threads, thread.tid, slot)?;
        if added != Insertion::Inserted {
            self.free_waiter(thread.tid, slot)?;
            return Ok(added == Insertion::Exists);
        }
        let Some(reactor) = self.join(&thread, slot, file, now)? else { return Ok(false) };
        self.count(reactor, offset_of!(Reactor, inside), 1);
        if let (Some(is_inside), Some(of)) = (
            self.waiters.u16(slot, offset_of!(Waiter, is_inside)),
            self.waiters.u32(slot, offset_of!(Waiter, reactor)),
        ) {
            is_inside.store(1, SeqCst);
            of.store(reactor, SeqCst);
        }
        Ok(true)
    }

    /// Corrects what [`adopt`](Self::adopt) has added of a thread that is not in that wait any more. Its return may have come
    /// before the programs knew it. `is_there` says whether the thread exists.
    pub(crate) fn correct(&mut self, thread: Adopted, is_there: bool) {
        let Ok(slot) = self.threads.get(&thread.tid, 0) else { return };
        let Some(waiter) = self.waiters.get(slot) else { return };
        if !is_there {
            self.release(&waiter);
        } else if waiter.is_inside != 0 {
            // It joins again at its next wait.
            self.leave(slot);
        }
    }

    /// Makes a thread a member of the loop of this file, which is created if there is none. `None` if no slot is free.
    fn join(&mut self, thread: &Adopted, waiter: u32, file: u64, now: u64) -> Result<Option<u32>> {
        let existing = if file == 0 { None } else { self.sets.get(&file, 0).ok() };
        if let Some((slot, entry)) = existing.and_then(|slot| Some((slot, self.reactors.get(slot)?)))
            && entry.kind == thread.kind as u32
            && (entry.inside != 0 || (entry.members != 0 && now.saturating_sub(entry.left_ns) < ABANDONED_NS))
        {
            self.count(slot, offset_of!(Reactor, members), 1);
            if entry.is_shared == 0
                && let (Some(since), Some(is_shared)) = (
                    self.reactors.u64(slot, offset_of!(Reactor, shared_since_ns)),
                    self.reactors.u32(slot, offset_of!(Reactor, is_shared)),
                )
            {
                // Both have waited since about now, and so has the loop.
                since.store(now, SeqCst);
                is_shared.store(1, SeqCst);
            }
            return Ok(Some(slot));
        }
        let Ok(slot) = self.free_reactors.pop(0) else { return Ok(None) };
        self.durations.set(slot, Durations::NONE, 0)?;
        let entry = Reactor {
            created_ns: now,
            tid: thread.tid,
            tgid: thread.pid,
            slot,
            members: 1,
            waiter,
            set: thread.set,
            kind: thread.kind as u32,
            file,
            left_ns: now,
            ..Reactor::EMPTY
        };
        self.reactors.set(slot, entry);
        if file != 0 {
            self.sets.insert(file, slot, 0)?;
        }
        Ok(Some(slot))
    }

    /// Removes all threads of a process that is not a target any more.
    pub(crate) fn release_process(&mut self, pid: u32) {
        let of_process: Vec<_> = self.used_waiters().filter(|waiter| waiter.tgid == pid).collect();
        for waiter in of_process {
            self.release(&waiter);
        }
    }

    /// Removes a thread, unless its slot is another one's by now.
    fn release(&mut self, waiter: &Waiter) {
        if self.threads.get(&waiter.tid, 0).is_ok_and(|slot| slot == waiter.slot)
            && self.threads.remove(&waiter.tid).is_ok()
        {
            self.id_filter.remove_thread(waiter.tid, waiter.slot);
            self.leave(waiter.slot);
            self.released.push(waiter.slot);
        }
    }

    /// Hands a loop over to another process whose threads wait in it: the one that it belongs to is not a target any more.
    /// Returns whether there is one.
    pub(crate) fn hand_over(&self, reactor: &Reactor) -> bool {
        let Some(heir) = self.used_waiters().find(|waiter| waiter.reactor == reactor.slot) else {
            return false;
        };
        if let (Some(tid), Some(tgid)) = (
            self.reactors.u32(reactor.slot, offset_of!(Reactor, tid)),
            self.reactors.u32(reactor.slot, offset_of!(Reactor, tgid)),
        ) {
            tid.store(heir.tid, SeqCst);
            tgid.store(heir.tgid, SeqCst);
        }
        true
    }

    /// Whether the set of a loop has been given to another loop, because this one seemed to be abandoned.
    pub(crate) fn is_replaced(&self, reactor: &Reactor) -> bool {
        reactor.file != 0 && self.sets.get(&reactor.file, 0).is_ok_and(|slot| slot != reactor.slot)
    }

    /// Has the thread of a long slice look up its set at its next wait.
    pub(crate) fn look_up_again(&self, raw: &Raw) {
        if let Some(is_stale) = self.waiters.u16(raw.waiter.slot, offset_of!(Waiter, is_stale)) {
            is_stale.store(1, SeqCst);
        }
    }

    /// Threads that wait for events. Slots that have been freed still have their last one.
    fn used_waiters(&self) -> impl Iterator<Item = Waiter> + '_ {
        // Slots are assigned in ascending order, so the first unused slot ends the iteration.
        self.waiters.numbers().map_while(|slot| self.waiters.get(slot).filter(|waiter| waiter.tid != 0))
    }

    /// Ends the membership of a waiter in its loop.
    fn leave(&self, slot: u32) {
        let (Some(is_inside), Some(reactor)) = (
            self.waiters.u16(slot, offset_of!(Waiter, is_inside)),
            self.waiters.u32(slot, offset_of!(Waiter, reactor)),
        ) else {
            return;
        };
        let reactor = reactor.swap(0, SeqCst);
        let was_inside = is_inside.swap(0, SeqCst) != 0;
        if reactor != 0 {
            if was_inside {
                self.count(reactor, offset_of!(Reactor, inside), 1_u32.wrapping_neg());
            }
            self.count(reactor, offset_of!(Reactor, members), 1_u32.wrapping_neg());
        }
    }

    /// Adds to a counter of a loop.
    fn count(&self, slot: u32, offset: usize, by: u32) {
        if let Some(counter) = self.reactors.u32(slot, offset) {
            counter.fetch_add(by, SeqCst);
        }
    }

    /// Frees the slot of a thread that is not in `THREADS` any more.
    fn free_waiter(&mut self, tid: u32, slot: u32) -> Result<()> {
        self.id_filter.remove_thread(tid, slot);
        self.free_waiters.push(slot, 0).context("cannot free the slot of a thread")
    }

    /// Ends an event loop: no thread belongs to it any more.
    pub(crate) fn end(&mut self, reactor: &Reactor) {
        if reactor.file != 0 && self.sets.get(&reactor.file, 0).is_ok_and(|slot| slot == reactor.slot) {
            let _absent = self.sets.remove(&reactor.file);
        }
        let _absent = self.gaps.remove(&reactor.slot);
        if !self.ended.contains(&reactor.slot) {
            self.ended.push(reactor.slot);
        }
    }

    /// Frees the slots of loops that have ended before the last reading, and of released waiters.
    fn free_ended(&mut self) -> Result<()> {
        for slot in std::mem::take(&mut self.released) {
            self.free_waiters.push(slot, 0).context("cannot free the slot of a thread")?;
        }
        for slot in std::mem::take(&mut self.ended) {
            let Some(reactor) = self.reactors.get(slot) else { continue };
            if reactor.members != 0 {
                // Its last threads are just exiting.
                self.ended.push(slot);
                continue;
            }
            let _absent = self.gaps.remove(&slot);
            if let Some(tgid) = self.reactors.u32(slot, offset_of!(Reactor, tgid)) {
                tgid.store(0, SeqCst);
            }
            self.free_reactors.push(slot, 0).context("cannot free the slot of an event loop")?;
        }
        Ok(())
    }

    /// Slices in progress.
    pub(crate) fn in_slices(&self) -> impl Iterator<Item = InSlice> + '_ {
        self.used().filter_map(|slot| {
            let (reactor, waiter) = self.with_waiter(slot)?;
            InSlice::of(&reactor, &waiter)
        })
    }

    /// All event loops, each read consistently between two events: otherwise a slice that ends meanwhile could count
    /// twice. If a loop is too busy for that, its slices are too short for the difference to matter.
    pub(crate) fn all(&mut self) -> Result<Vec<Raw>> {
        self.free_ended()?;
        let slots: Vec<_> = self.used().collect();
        // Reserved in advance: the values are large and should not be moved.
        let mut all = Vec::with_capacity(slots.len());
        all.extend(slots.into_iter().filter_map(|slot| self.consistent(slot)));
        Ok(all)
    }

    /// Reads a slot until two readings of its state agree. `None` if the slot was reassigned meanwhile.
    fn consistent(&self, slot: u32) -> Option<Raw> {
        let state = |(reactor, waiter): &(Reactor, Waiter)| {
            (reactor.gap_since_ns, reactor.gaps_ns, waiter.phase, waiter.phase_since_ns)
        };
        let mut before = self.with_waiter(slot)?;
        let mut readings = 0;
        loop {
            let durations = self.durations.get(&slot, 0).ok()?;
            let now = self.with_waiter(slot)?;
            readings += 1;
            if now.0.created_ns != before.0.created_ns || now.0.tgid == 0 {
                return None;
            }
            if readings == READS || state(&now) == state(&before) {
                return Some(Raw { now: now.0, waiter: now.1, durations });
            }
            before = now;
        }
    }

    /// An event loop with the thread whose slices are its own.
    fn with_waiter(&self, slot: u32) -> Option<(Reactor, Waiter)> {
        let reactor = self.reactors.get(slot)?;
        let waiter = self.waiters.get(reactor.waiter).filter(|waiter| waiter.reactor == slot);
        Some((reactor, waiter.unwrap_or(Waiter::EMPTY)))
    }

    /// Slots of event loops.
    fn used(&self) -> impl Iterator<Item = u32> + '_ {
        // Slots are assigned in ascending order, so the first unused slot ends the iteration.
        let assigned = self.reactors.numbers().map_while(|slot| {
            let reactor = self.reactors.get(slot)?;
            (reactor.created_ns != 0).then_some((slot, reactor.tgid))
        });
        assigned.filter(|&(slot, tgid)| tgid != 0 && !self.ended.contains(&slot)).map(|(slot, _)| slot)
    }
}
