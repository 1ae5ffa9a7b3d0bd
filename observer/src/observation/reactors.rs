//! The event loops of targets: the calls that they were in when observer attached, their stalls, and their metrics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use anyhow::Result;
use observer_common::{
    accept::AcceptCall,
    reactor::{Phase, Stall as RawStall},
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
        snapshot::Reactor,
        stall::Stalls,
        trace::EventKind,
    },
    probes::{gc, reactor},
    process::{
        self,
        wait_call::{self, Call, WaitCall},
    },
    read::{
        entries::insert_new,
        maps::Maps,
        reactors::{InSlice, Raw},
    },
    stacks::watch::Watcher,
};

/// All event loops of targets.
pub(super) struct Reactors {
    /// System calls that count as waits for events.
    waits: Vec<WaitCall>,
    stall_threshold: Duration,
    watcher: Watcher,
    /// State of each thread that the programs do not keep, by thread id.
    threads: BTreeMap<u32, Thread>,
    /// Whose names are read again next.
    to_rename: RoundRobin,
    /// Running threads as of the last refresh, each with its lag.
    running: Vec<(Raw, Histogram)>,
    /// When that was, in monotonic nanoseconds.
    refreshed_ns: u64,
    /// Final metrics of exited threads, each with its process id.
    finished: Vec<(u32, Reactor)>,
    /// Processes whose pools are removed at the next refresh. Until then, their threads may be about to change the
    /// counters of a pool.
    orphaned_pools: BTreeSet<u32>,
}

/// A thread.
struct Thread {
    /// Its process.
    pid: u32,
    name: String,
    prober: Prober,
    stalls: Stalls,
}

impl Reactors {
    pub(super) fn of(parameters: &Parameters) -> Self {
        Self {
            waits: parameters.calls.clone(),
            stall_threshold: parameters.stall_threshold,
            watcher: Watcher::new(parameters.stall_threshold),
            threads: BTreeMap::new(),
            to_rename: RoundRobin::default(),
            running: Vec::new(),
            refreshed_ns: 0,
            finished: Vec::new(),
            orphaned_pools: BTreeSet::new(),
        }
    }

    /// Adds the waits and accepts that threads of these processes entered before the programs were attached. Entries
    /// of the programs take precedence.
    pub(super) fn adopt_calls(
        &self,
        maps: &mut Maps,
        missing: &mut MissingSources,
        pids: impl IntoIterator<Item = u32>,
    ) -> Result<()> {
        for pid in pids {
            for (tid, call) in wait_call::blocked_in(pid, &self.waits) {
                let is_added = match call {
                    Call::Wait { .. } if maps.reactors.get(tid).is_some() => true,
                    Call::Wait { kind, set } => {
                        let entry = reactor::waiting(pid, clock::monotonic_ns(), kind, set);
                        maps.reactors.adopt(tid, entry)?
                    }
                    Call::Accept { fd } => match process::socket_inode(pid, fd) {
                        Some(inode) => {
                            let call = AcceptCall { inode, ..AcceptCall::default() };
                            insert_new(&mut maps.accepting, tid, call)?
                        }
                        None => true,
                    },
                };
                if !is_added {
                    missing.add(
                        format!("some threads of process {pid}"),
                        "there are more than --capacity allows",
                    );
                }
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
        let in_progress: Vec<_> = in_progress
            .map(|slice| InSlice {
                // Another thread may be about to take the events of a shared set.
                epoll_set: slice.epoll_set.filter(|&set| !maps.is_shared(slice.pid, set)),
                ..slice
            })
            .collect();
        self.watcher
            .check(in_progress.into_iter(), clock::monotonic_ns(), |slice| maps.reactors.is_still_in(slice));
        if self.watcher.may_not_ask() {
            let reason = "pidfd_getfd is refused: no loop is reported as LATE for events that waited during its stalls";
            missing.add("whether events wait for a stalled loop", reason);
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
            if !targets.is_target(maps, raw.tgid) {
                continue;
            }
            links.record_event(raw.tgid, || EventKind::Stall(raw.tid, raw.start_ns, Box::new(stall.clone())));
            self.thread(raw.tid, raw.tgid).stalls.add(stall, sample);
        }
    }

    fn thread(&mut self, tid: u32, pid: u32) -> &mut Thread {
        let threshold = self.stall_threshold;
        let thread = self.threads.entry(tid).or_insert_with(|| Thread::of(pid, tid, threshold));
        if thread.pid != pid {
            // The id was that of another process's thread before.
            *thread = Thread::of(pid, tid, threshold);
        }
        thread
    }

    /// Reads the state of all threads, and removes exited ones from the map.
    pub(super) fn refresh(&mut self, maps: &mut Maps, targets: &Targets) -> Result<()> {
        maps.forget_pools(&mut self.orphaned_pools);
        // Read before the threads, so that no age in progress is overestimated.
        let now = clock::monotonic_ns();
        self.running.clear();
        for mut raw in maps.reactors.all() {
            let (tid, pid) = (raw.now.tid, raw.now.tgid);
            if !targets.is_target(maps, pid) {
                self.release_rejected(maps, &raw)?;
                continue;
            }
            // Of threads that exit together, the last to exit may be the first whose exit is seen. The exits of the
            // others are not seen any more once the process is not a target. So all threads of an exited process are
            // final.
            let is_process_gone = !targets.live().contains_key(&pid) && maps.targets.get(&pid, 0).is_err();
            if is_process_gone {
                self.orphaned_pools.insert(pid);
            }
            let thread = self.thread(tid, pid);
            if is_process_gone || reactor::is_final(&raw) {
                maps.reactors.release(&raw.now)?;
                raw.now.phase = Phase::Exited as u32;
                let lag = reactor::lag(&raw, &mut thread.prober, now);
                let reactor = thread.decode(&raw, &lag, now);
                self.threads.remove(&tid);
                self.finished.push((pid, reactor));
            } else {
                raw.now.gc.ns += gc::in_progress(maps, &raw.now, now);
                let lag = reactor::lag(&raw, &mut thread.prober, now);
                if let Some(slice) = self.stall_in_progress(&raw, now) {
                    self.watcher.ensure_read(slice, |slice| maps.reactors.is_still_in(slice));
                }
                self.running.push((raw, lag));
            }
        }
        self.refreshed_ns = now;
        let surplus = self.finished.len().saturating_sub(EXITED_LIMIT);
        self.finished.drain(..surplus);
        Ok(())
    }

    /// Removes a thread whose process was rejected. A thread of a candidate is kept until the decision.
    fn release_rejected(&mut self, maps: &mut Maps, raw: &Raw) -> Result<()> {
        if maps.targets.get(&raw.now.tgid, 0).is_err() {
            self.orphaned_pools.insert(raw.now.tgid);
            maps.reactors.release(&raw.now)?;
        }
        Ok(())
    }

    /// The slice of a thread, if it is already a stall.
    fn stall_in_progress(&self, raw: &Raw, now: u64) -> Option<InSlice> {
        let age = Duration::from_nanos(now.saturating_sub(raw.now.phase_since_ns));
        let is_stall = reactor::is_in_slice(raw) && age >= self.stall_threshold;
        is_stall.then(|| InSlice::of(&raw.now))
    }

    /// All event loops by process, as of the last refresh.
    pub(super) fn snapshot(&self) -> HashMap<u32, Vec<Reactor>> {
        let mut reactors = HashMap::<u32, Vec<Reactor>>::new();
        for (pid, finished) in &self.finished {
            reactors.entry(*pid).or_default().push(finished.clone());
        }
        for (raw, lag) in &self.running {
            let pid = raw.now.tgid;
            let Some(thread) = self.threads.get(&raw.now.tid).filter(|thread| thread.pid == pid) else {
                continue;
            };
            let mut reactor = thread.decode(raw, lag, self.refreshed_ns);
            if let Some(slice) = self.stall_in_progress(raw, self.refreshed_ns) {
                let events_seen = self.watcher.events_waited(slice.tid, slice.since_ns);
                let stall = reactor::stall_in_progress(raw, self.refreshed_ns, events_seen);
                let sample = self.watcher.stack_so_far(slice, stall.cause.is_blocked());
                let mut stalls = thread.stalls.clone();
                stalls.add_in_progress(&stall, sample.clone());
                reactor.stalls = stalls.ranked(lag_weight(&reactor.lag));
                reactor.current_slice_events_wait = stall.events_waited;
                reactor.current_stack = Some(sample);
            }
            reactors.entry(pid).or_default().push(reactor);
        }
        reactors
    }

    /// Forgets all threads of processes that are not targets.
    pub(super) fn forget(&mut self, pids: &BTreeSet<u32>) {
        self.threads.retain(|_, thread| !pids.contains(&thread.pid));
        self.running.retain(|(raw, _)| !pids.contains(&raw.now.tgid));
    }

    /// Reads the names of a process's threads again.
    pub(super) fn rename_of(&mut self, pid: u32) {
        for (&tid, thread) in self.threads.iter_mut().filter(|(_, thread)| thread.pid == pid) {
            thread.rename(tid);
        }
    }

    /// Reads some of the names again: a thread may have renamed itself.
    pub(super) fn rename_some(&mut self) {
        for tid in self.to_rename.next(&self.threads) {
            if let Some(thread) = self.threads.get_mut(&tid) {
                thread.rename(tid);
            }
        }
    }

    /// Reads all names again.
    pub(super) fn rename_all(&mut self) {
        for _ in 0..self.threads.len().div_ceil(BATCH) {
            self.rename_some();
        }
    }
}

impl Thread {
    fn of(pid: u32, tid: u32, stall_threshold: Duration) -> Self {
        let stalls = Stalls::over(stall_threshold.as_secs_f64());
        Self { pid, name: process::thread_name(pid, tid), prober: Prober::default(), stalls }
    }

    /// Reads its name again. An exited thread keeps its name.
    fn rename(&mut self, tid: u32) {
        let now = process::thread_name(self.pid, tid);
        if !now.is_empty() {
            self.name = now;
        }
    }

    /// Its metrics as of `now`, with the stalls that have ended.
    fn decode(&self, raw: &Raw, lag: &Histogram, now: u64) -> Reactor {
        let mut reactor = reactor::decode(self.name.clone(), raw, lag.clone(), now);
        reactor.stalls = self.stalls.ranked(lag_weight(&reactor.lag));
        reactor
    }
}

/// The integral of lag over time, in seconds squared.
fn lag_weight(lag: &Histogram) -> f64 {
    lag.sum() * PROBE_SECONDS
}
