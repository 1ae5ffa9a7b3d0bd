//! The event loops of targets: the calls that they were in when observer attached, their stalls, and their metrics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use aya::Ebpf;
use observer_common::{
    accept::AcceptCall,
    reactor::{ABANDONED_NS, EXAMINED_NS, Reactor as RawReactor, Stall as RawStall},
};

use super::{
    links::Links,
    missing::MissingSources,
    parameters::Parameters,
    round_robin::{BATCH, RoundRobin},
    targets::{EXITED_LIMIT, Targets},
};
use crate::{
    kernel::clock,
    model::{
        histogram::Histogram,
        lag::{PROBE_SECONDS, Prober},
        snapshot::{Duty, Reactor},
        stall::Stalls,
        trace::EventKind,
    },
    probes::{gc, listener, reactor},
    process::{
        self,
        epoll_set::{self, Served},
        wait_call::{self, Call, WaitCall},
    },
    read::{
        entries::insert_new,
        maps::Maps,
        reactors::{Adopted, InSlice, Raw, ReactorId},
    },
    stacks::watch::Watcher,
};

/// All event loops of targets.
pub(super) struct Reactors {
    /// System calls that count as waits for events.
    waits: Vec<WaitCall>,
    stall_threshold: Duration,
    watcher: Watcher,
    /// What the programs do not keep of each loop.
    loops: BTreeMap<ReactorId, EventLoop>,
    /// Number of loops so far by process and by the thread that waited first.
    counts: HashMap<(u32, u32), u32>,
    /// Whose names are read again next.
    to_rename: RoundRobin<ReactorId>,
    /// Whose sets are examined next.
    to_examine: RoundRobin<ReactorId>,
    /// Loops as of the last refresh, each with its lag.
    running: Vec<(Raw, Histogram)>,
    /// When that was, in monotonic nanoseconds.
    refreshed_ns: u64,
    /// Final metrics of loops that have ended, each with its process id.
    finished: Vec<(u32, Reactor)>,
}

/// An event loop.
struct EventLoop {
    /// Its process.
    pid: u32,
    /// The thread that waited in it first.
    tid: u32,
    /// The id of that thread, with a number if it waited first in other loops before.
    id: Arc<str>,
    /// The name of that thread.
    name: String,
    prober: Prober,
    /// Waiting time so far, in nanoseconds.
    wait_ns: u64,
    stalls: Stalls,
    /// What it serves; `None` before anything is known.
    duty: Option<Duty>,
    /// Start of the latest slice in which its set was examined, in monotonic nanoseconds.
    examined_ns: u64,
}

/// How long a loop is kept whose only thread waits elsewhere, in nanoseconds.
const AWAY_NS: u64 = 10_000_000_000;

impl Reactors {
    pub(super) fn of(parameters: &Parameters) -> Self {
        Self {
            waits: parameters.calls.clone(),
            stall_threshold: parameters.stall_threshold,
            watcher: Watcher::new(parameters.stall_threshold),
            loops: BTreeMap::new(),
            counts: HashMap::new(),
            to_rename: RoundRobin::default(),
            to_examine: RoundRobin::default(),
            running: Vec::new(),
            refreshed_ns: 0,
            finished: Vec::new(),
        }
    }

    /// Adds the waits and accepts that threads of these processes entered before the programs were attached. Entries
    /// of the programs take precedence.
    pub(super) fn adopt_calls(
        &self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        missing: &mut MissingSources,
        pids: impl IntoIterator<Item = u32>,
    ) -> Result<()> {
        let mut waiting = Vec::new();
        for pid in pids {
            for (tid, call) in wait_call::blocked_in(pid, &self.waits) {
                match call {
                    Call::Wait { .. } if maps.reactors.is_known(tid) => {}
                    Call::Wait { kind, set } => waiting.push(Adopted { pid, tid, kind, set }),
                    Call::Unwatched(_) => {}
                    Call::Accept { fd } => {
                        let inode = process::socket_inode(pid, fd);
                        let call = inode.map(|inode| AcceptCall { inode, ..AcceptCall::default() });
                        let is_added =
                            call.map_or(Ok(true), |call| insert_new(&mut maps.accepting, tid, call))?;
                        note_full(missing, pid, is_added);
                    }
                }
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        maps.reactors.ask_for_files(&waiting)?;
        listener::visit_files(ebpf)?;
        let now = clock::monotonic_ns();
        for thread in waiting {
            let Adopted { pid, tid, kind, set } = thread;
            let is_added = maps.reactors.adopt(thread, now)?;
            note_full(missing, pid, is_added);
            if wait_call::call_of(pid, tid, &self.waits) != Some(Call::Wait { kind, set }) {
                maps.reactors.correct(thread, process::has_thread(pid, tid));
            }
        }
        Ok(())
    }

    /// When the event loops were last refreshed, in monotonic nanoseconds.
    pub(super) const fn refreshed_ns(&self) -> u64 {
        self.refreshed_ns
    }

    /// How often to [`watch`](Self::watch).
    pub(super) const fn watch_period(&self) -> Duration {
        self.watcher.period()
    }

    /// Whether there are slices whose stacks are to be read.
    pub(super) fn has_long_slices(&self, maps: &Maps) -> bool {
        self.watcher.has_long_slices(maps.reactors.in_slices(), clock::monotonic_ns())
    }

    /// Reads the stacks of slices that may become stalls.
    pub(super) fn watch(&mut self, maps: &Maps, targets: &Targets, missing: &mut MissingSources) {
        // Stacks of processes that are not targets are not even read.
        let in_progress = maps.reactors.in_slices().filter(|slice| targets.is_target(maps, slice.pid));
        self.watcher.check(in_progress, clock::monotonic_ns(), |slice| maps.reactors.is_still_in(slice));
        if self.watcher.may_not_ask() {
            let reason = "pidfd_getfd is refused: no loop is reported as LATE for events that waited during its stalls";
            missing.add("whether events wait for a stalled loop", reason);
        }
    }

    /// Examines the sets of some loops that may be those of workers.
    pub(super) fn examine_some(&mut self, maps: &Maps, is_listener: impl Fn(u64) -> bool) {
        for id in self.to_examine.next(&self.loops) {
            let event_loop = self.loops.get_mut(&id).filter(|event_loop| event_loop.is_undecided());
            if let Some((event_loop, set)) = event_loop.zip(maps.reactors.epoll_set(id))
                && let Some(served) = epoll_set::served(event_loop.pid, set, &is_listener)
            {
                event_loop.note_served(served, false);
            }
        }
    }

    /// Examines the sets of such loops during long slices, once in each.
    pub(super) fn examine_busy(&mut self, maps: &Maps, is_listener: impl Fn(u64) -> bool) {
        let now = clock::monotonic_ns();
        for slice in maps.reactors.in_slices() {
            let is_long = now.saturating_sub(slice.since_ns) >= EXAMINED_NS;
            let event_loop = self.loops.get_mut(&slice.reactor).filter(|event_loop| {
                is_long && event_loop.is_undecided() && event_loop.examined_ns != slice.since_ns
            });
            if let Some((event_loop, set)) = event_loop.zip(slice.epoll_set) {
                event_loop.examined_ns = slice.since_ns;
                let served = epoll_set::served(slice.pid, set, &is_listener);
                if let Some(served) = served.filter(|_| maps.reactors.is_still_in(&slice)) {
                    event_loop.note_served(served, true);
                }
            }
        }
    }

    /// Attributes each stall that has ended to the code that was seen in it.
    pub(super) fn add_stalls(
        &mut self,
        stalls: Vec<RawStall>,
        maps: &Maps,
        targets: &Targets,
        links: &mut Links,
    ) {
        for raw in stalls {
            let events_seen = self.watcher.events_waited(raw.tid, raw.start_ns);
            let stall = reactor::stall(&raw, links.request(raw.request), events_seen);
            let sample = self.watcher.seen(raw.tid, raw.start_ns, stall.cause.is_blocked());
            let stall = stall.corrected_by(&sample);
            if !targets.is_target(maps, raw.tgid) {
                continue;
            }
            let id = ReactorId { slot: raw.reactor, created_ns: raw.created_ns };
            let Some(reactor) = maps.reactors.get(id) else { continue };
            let event_loop = self.event_loop(&reactor);
            links.record_event(raw.tgid, || EventKind::Stall {
                reactor: Arc::clone(&event_loop.id),
                tid: raw.tid,
                start_ns: raw.start_ns,
                stall: Box::new(stall.clone()),
            });
            event_loop.stalls.add(stall, sample);
        }
    }

    /// What is kept of an event loop.
    fn event_loop(&mut self, reactor: &RawReactor) -> &mut EventLoop {
        let id = ReactorId::of(reactor);
        if !self.loops.contains_key(&id) {
            let count = self.counts.entry((reactor.tgid, reactor.tid)).or_default();
            *count += 1;
            self.loops.insert(id, EventLoop::of(reactor, *count, self.stall_threshold));
        }
        self.loops.get_mut(&id).expect("it is there now")
    }

    /// Reads the state of all event loops, and removes those that have ended from the maps.
    pub(super) fn refresh(&mut self, maps: &mut Maps, targets: &Targets) -> Result<()> {
        // Read before the loops, so that no age in progress is overestimated.
        let now = clock::monotonic_ns();
        self.running.clear();
        for raw in maps.reactors.all()? {
            let pid = raw.now.tgid;
            let is_live = targets.live().contains_key(&pid);
            // The programs may know a target that is not known here yet.
            if !is_live && maps.targets.get(&pid, 0).is_err() {
                maps.reactors.release_process(pid);
                if maps.reactors.hand_over(&raw.now) {
                    self.loops.remove(&raw.id());
                } else {
                    self.end(maps, raw, now, targets.is_target(maps, pid));
                }
            } else if targets.is_target(maps, pid) {
                self.refresh_loop(maps, raw, now);
            }
        }
        let pids = self.pids();
        self.counts.retain(|(pid, _), _| pids.contains(pid) || targets.live().contains_key(pid));
        self.refreshed_ns = now;
        let surplus = self.finished.len().saturating_sub(EXITED_LIMIT);
        self.finished.drain(..surplus);
        Ok(())
    }

    /// Updates a loop, or ends it if it is over.
    fn refresh_loop(&mut self, maps: &mut Maps, mut raw: Raw, now: u64) {
        let since_left = now.saturating_sub(raw.now.left_ns);
        let is_over = if raw.now.members == 0 {
            // Its thread may only be elsewhere for a while.
            raw.now.is_over != 0 || maps.reactors.is_replaced(&raw.now) || since_left > AWAY_NS
        } else {
            raw.now.inside == 0 && since_left > ABANDONED_NS && maps.reactors.is_replaced(&raw.now)
        };
        if is_over {
            self.end(maps, raw, now, true);
            return;
        }
        if let Some(since_ns) = raw.slice_since_ns() {
            raw.waiter.gc_ns += gc::in_progress(maps, raw.waiter.tid, since_ns, now);
            if now.saturating_sub(since_ns) > ABANDONED_NS / 2 {
                maps.reactors.look_up_again(&raw);
            }
        }
        let lag = self.event_loop(&raw.now).lag(&mut raw, now);
        if let Some(slice) = self.stall_in_progress(&raw, now) {
            self.watcher.ensure_read(slice, |slice| maps.reactors.is_still_in(slice));
        }
        self.running.push((raw, lag));
    }

    /// Ends a loop. `is_reported` says whether it belongs to a target.
    fn end(&mut self, maps: &mut Maps, mut raw: Raw, now: u64, is_reported: bool) {
        raw.now.members = 0;
        maps.reactors.end(&raw.now);
        if is_reported {
            let lag = self.event_loop(&raw.now).lag(&mut raw, now);
            let mut finished = self.loops[&raw.id()].decode(&raw, &lag, now);
            finished.exited = true;
            self.finished.push((raw.now.tgid, finished));
        }
        self.loops.remove(&raw.id());
    }

    /// The slice of an event loop, if it is already a stall.
    fn stall_in_progress(&self, raw: &Raw, now: u64) -> Option<InSlice> {
        let slice = InSlice::of(&raw.now, &raw.waiter)?;
        let age = Duration::from_nanos(now.saturating_sub(slice.since_ns));
        (age >= self.stall_threshold).then_some(slice)
    }

    /// The processes that have event loops now.
    pub(super) fn pids(&self) -> BTreeSet<u32> {
        self.loops.values().map(|event_loop| event_loop.pid).collect()
    }

    /// All event loops by process, as of the last refresh.
    pub(super) fn snapshot(&self) -> HashMap<u32, Vec<Reactor>> {
        let mut reactors = HashMap::<u32, Vec<Reactor>>::new();
        for (pid, finished) in &self.finished {
            reactors.entry(*pid).or_default().push(finished.clone());
        }
        for (raw, lag) in &self.running {
            let Some(event_loop) = self.loops.get(&raw.id()) else { continue };
            let mut reactor = event_loop.decode(raw, lag, self.refreshed_ns);
            if let Some(slice) = self.stall_in_progress(raw, self.refreshed_ns) {
                let events_seen = self.watcher.events_waited(slice.tid, slice.since_ns);
                let stall = reactor::stall_in_progress(raw, slice.since_ns, self.refreshed_ns, events_seen);
                let sample = self.watcher.stack_so_far(slice, stall.cause.is_blocked());
                let stall = stall.corrected_by(&sample);
                let mut stalls = event_loop.stalls.clone();
                stalls.add_in_progress(&stall, sample.clone());
                reactor.stalls = stalls.ranked(lag_weight(&reactor.lag));
                reactor.current_slice_events_wait = stall.events_waited;
                reactor.current_stack = Some(sample);
            }
            reactors.entry(raw.now.tgid).or_default().push(reactor);
        }
        reactors
    }

    /// Forgets all loops of processes that are not targets.
    pub(super) fn forget(&mut self, pids: &BTreeSet<u32>) {
        self.loops.retain(|_, event_loop| !pids.contains(&event_loop.pid));
        self.running.retain(|(raw, _)| !pids.contains(&raw.now.tgid));
    }

    /// Reads the names of a process's loops again.
    pub(super) fn rename_of(&mut self, pid: u32) {
        for event_loop in self.loops.values_mut().filter(|event_loop| event_loop.pid == pid) {
            event_loop.rename();
        }
    }

    /// Reads some of the names again: a thread may have renamed itself.
    pub(super) fn rename_some(&mut self) {
        for id in self.to_rename.next(&self.loops) {
            if let Some(event_loop) = self.loops.get_mut(&id) {
                event_loop.rename();
            }
        }
    }

    /// Reads all names again.
    pub(super) fn rename_all(&mut self) {
        for _ in 0..self.loops.len().div_ceil(BATCH) {
            self.rename_some();
        }
    }
}

impl EventLoop {
    /// Of the loop with this number among those that its thread waited in first.
    fn of(reactor: &RawReactor, number: u32, stall_threshold: Duration) -> Self {
        let (pid, tid) = (reactor.tgid, reactor.tid);
        Self {
            pid,
            tid,
            id: if number == 1 { tid.to_string() } else { format!("{tid}.{number}") }.into(),
            name: process::thread_name(pid, tid),
            prober: Prober::default(),
            wait_ns: 0,
            stalls: Stalls::over(stall_threshold.as_secs_f64()),
            duty: None,
            examined_ns: 0,
        }
    }

    /// Whether another look at its set may show that it is a worker, or none.
    fn is_undecided(&self) -> bool {
        self.duty != Some(Duty::Several)
    }

    /// Adds what its epoll set was seen to hold. `in_slice` says whether that was during a slice.
    fn note_served(&mut self, served: Served, in_slice: bool) {
        match served {
            Served::Several => self.duty = Some(Duty::Several),
            Served::OneConnection if self.duty.is_none() => self.duty = Some(Duty::OneConnection),
            // A server without connections waits in the same way.
            Served::Listeners if in_slice && self.duty.is_none() => self.duty = Some(Duty::OneAtATime),
            Served::Listeners | Served::OneConnection | Served::Other => {}
        }
    }

    /// Its lag up to `now`. Its waiting time is corrected so that it never decreases: its entry may have changed since `now`.
    fn lag(&mut self, raw: &mut Raw, now: u64) -> Histogram {
        let wait_ns = reactor::wait_ns(raw, now);
        raw.now.wait_ns += self.wait_ns.saturating_sub(wait_ns);
        self.wait_ns = self.wait_ns.max(wait_ns);
        reactor::lag(raw, &mut self.prober, now)
    }

    /// Reads its name again. The name of an exited thread is kept.
    fn rename(&mut self) {
        let now = process::thread_name(self.pid, self.tid);
        if !now.is_empty() {
            self.name = now;
        }
    }

    /// Its metrics as of `now`, with the stalls that have ended.
    fn decode(&self, raw: &Raw, lag: &Histogram, now: u64) -> Reactor {
        let mut reactor = reactor::decode(self.id.to_string(), self.name.clone(), raw, lag.clone(), now);
        reactor.stalls = self.stalls.ranked(lag_weight(&reactor.lag));
        reactor.duty = self.duty.unwrap_or_default();
        reactor
    }
}

/// Reports that there is no room for a thread, unless it has been added.
fn note_full(missing: &mut MissingSources, pid: u32, is_added: bool) {
    if !is_added {
        missing.add(format!("some threads of process {pid}"), "there are more than --capacity allows");
    }
}

/// The integral of lag over time, in seconds squared.
fn lag_weight(lag: &Histogram) -> f64 {
    lag.sum() * PROBE_SECONDS
}
