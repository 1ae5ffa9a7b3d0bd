//! The reactors of an observation: what their threads were doing before it began, their stalls, and their last figures.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, time::Duration};

use anyhow::Result;
use observer_common::{accept::Accepting, reactor::Phase};

use super::{ENDED, Observation};
use crate::{
    kernel::clock,
    model::{
        histogram::Histogram,
        lag::{PROBE_SECONDS, Prober},
        snapshot::Reactor,
        stall::Stalls,
        trace::What,
    },
    probes::reactor,
    process::{
        self,
        wait_call::{self, Call},
    },
    read::{
        entries::insert_new,
        reactors::{InSlice, Raw},
    },
};

/// A reactor's thread.
pub(super) struct Thread {
    /// Its process.
    pub(super) pid: u32,
    pub(super) name: String,
    prober: Prober,
    stalls: Stalls,
}

/// Reactors whose threads go on.
pub(super) struct Running {
    pub(super) reactors: Vec<Raw>,
    /// When they were read, monotonic nanoseconds.
    pub(super) now: u64,
}

impl Observation {
    /// Adds the waits and accepts that threads of these processes were inside before the programs could see them enter. What
    /// happens meanwhile the programs see themselves: their entries win.
    pub(super) fn adopt_calls(&mut self, pids: BTreeSet<u32>) -> Result<()> {
        for pid in pids {
            for (tid, call) in wait_call::blocked_in(pid, &self.waits) {
                let has_room = match call {
                    Call::Wait { .. } if self.maps.reactors.get(tid).is_some() => true,
                    Call::Wait { kind, set } => {
                        let entry = reactor::waiting(pid, clock::monotonic_ns(), kind, set);
                        self.maps.reactors.adopt(tid, entry)?
                    }
                    Call::Accept { fd } => match process::socket_inode(pid, fd) {
                        Some(inode) => {
                            let call = Accepting { inode, ..Accepting::default() };
                            insert_new(&mut self.maps.accepting, tid, call)?
                        }
                        None => true,
                    },
                };
                if !has_room {
                    self.note_missing(format!("some threads of process {pid}"), "there are too many".into());
                }
            }
        }
        Ok(())
    }

    /// How often to [`watch`](Self::watch).
    pub(crate) fn watch_period(&self) -> Duration {
        self.watcher.period()
    }

    /// What is readable when [`name_new`](Self::name_new) has something to do.
    pub(crate) fn kinds_descriptor(&self) -> io::Result<OwnedFd> {
        self.maps.kinds_descriptor()
    }

    /// Finds out what new kinds of deferred work are called, before that can change.
    pub(crate) fn name_new(&mut self) {
        self.follower.name_new(&mut self.maps);
    }

    /// Takes in the stalls that have ended, and looks at slices that may become one.
    pub(crate) fn watch(&mut self) -> Result<()> {
        self.collect_stalls()?;
        // Of those that nobody has asked for not even the stacks are read.
        let in_progress = self.maps.reactors.in_slices().filter(|slice| self.is_target(slice.pid));
        let in_progress: Vec<_> = in_progress.collect();
        self.watcher.glance(in_progress.into_iter(), clock::monotonic_ns());
        Ok(())
    }

    /// Puts each stall that has ended down to what was seen of it.
    fn collect_stalls(&mut self) -> Result<()> {
        let stalls = self.maps.stalls();
        if !stalls.is_empty() {
            // Nobody is told of a stall of a process that is not wanted.
            self.select()?;
        }
        // Their requests were passed on before them.
        self.follower.collect(&mut self.maps);
        for raw in stalls {
            let look = self.watcher.seen(raw.tid, raw.start_ns);
            if !self.is_target(raw.tgid) {
                continue;
            }
            let origin = self.follower.request(raw.request);
            let stall = reactor::stall(&raw, origin);
            let what = || What::Stall(raw.tid, raw.start_ns, Box::new(stall.clone()));
            self.follower.happened(raw.tgid, what);
            self.thread(raw.tid, raw.tgid).stalls.add(stall, look);
        }
        Ok(())
    }

    /// What is kept of a reactor's thread.
    fn thread(&mut self, tid: u32, pid: u32) -> &mut Thread {
        let threshold = self.stall_threshold;
        let thread = self.threads.entry(tid).or_insert_with(|| Thread::of(pid, tid, threshold));
        if thread.pid != pid {
            // The one before had the same id.
            *thread = Thread::of(pid, tid, threshold);
        }
        thread
    }

    /// Takes final figures out of the map, so that it holds no more than live threads. Returns those that go on.
    pub(super) fn collect_finished(&mut self) -> Result<Running> {
        self.collect_stalls()?;
        self.maps.forget_pools(&mut self.poolless);
        // Before they are read: what is in progress is no older than that.
        let now = clock::monotonic_ns();
        let mut reactors = self.maps.reactors.all();
        let mut others = BTreeSet::new();
        for raw in &mut reactors {
            let (tid, pid) = (raw.now.tid, raw.now.tgid);
            if !self.is_target(pid) {
                self.forget_stranger(raw)?;
                others.insert(raw.now.slot);
                continue;
            }
            // Of threads that exit together, the last to be counted may be the first to be heard of: of the others nobody
            // will hear when the process is no target any more.
            let is_process_gone = !self.live.contains_key(&pid) && self.maps.targets.get(&pid, 0).is_err();
            if is_process_gone {
                self.poolless.insert(pid);
            }
            if is_process_gone || reactor::is_final(raw) {
                self.maps.reactors.let_go(&raw.now)?;
                raw.now.phase = Phase::Exited as u32;
                let reactor = self.thread(tid, pid).figures(raw, now);
                self.threads.remove(&tid);
                self.finished.push((pid, reactor));
                others.insert(raw.now.slot);
            }
        }
        let surplus = self.finished.len().saturating_sub(ENDED);
        self.finished.drain(..surplus);
        reactors.retain(|raw| !others.contains(&raw.now.slot));
        Ok(Running { reactors, now })
    }

    /// Asks probers again, so that waits are attributed to replies of their time.
    pub(super) fn ask_probers(&mut self, running: &Running) {
        for raw in &running.reactors {
            let thread = self.thread(raw.now.tid, raw.now.tgid);
            let _only_attributes = reactor::lag(raw, &mut thread.prober, running.now);
        }
    }

    /// Observes a thread no more whose process was turned down. That of a candidate waits.
    fn forget_stranger(&mut self, raw: &Raw) -> Result<()> {
        if self.maps.targets.get(&raw.now.tgid, 0).is_err() {
            self.poolless.insert(raw.now.tgid);
            self.maps.reactors.let_go(&raw.now)?;
        }
        Ok(())
    }

    /// A reactor's figures as of `now`; a slice in progress is looked at if it takes long.
    pub(super) fn figures(&mut self, raw: &Raw, now: u64) -> Reactor {
        let threshold = self.stall_threshold.as_secs_f64();
        let (tid, pid) = (raw.now.tid, raw.now.tgid);
        let slice = InSlice { tid, pid, since_ns: raw.now.phase_since_ns, frame_pointer: 0 };
        let in_progress = Some(reactor::stall_in_progress(raw, now))
            .filter(|stall| reactor::is_in_slice(raw) && stall.seconds >= threshold);
        let present = in_progress.map(|stall| (stall, self.watcher.seen_so_far(slice)));
        let thread = self.thread(tid, pid);
        let mut reactor = thread.figures(raw, now);
        if let Some((stall, look)) = present {
            let mut stalls = thread.stalls.clone();
            stalls.add_in_progress(&stall, look.clone());
            reactor.stalls = stalls.ranked(lag_weight(&reactor.lag));
            reactor.current_stack = Some(look);
        }
        reactor
    }
}

impl Thread {
    fn of(pid: u32, tid: u32, stall_threshold: Duration) -> Self {
        let stalls = Stalls::over(stall_threshold.as_secs_f64());
        Self { pid, name: process::thread_name(pid, tid), prober: Prober::default(), stalls }
    }

    /// Asks for its name again, which stays if it is gone.
    pub(super) fn rename(&mut self, tid: u32) {
        let now = process::thread_name(self.pid, tid);
        if !now.is_empty() {
            self.name = now;
        }
    }

    /// Its figures as of now, stalls that have ended included.
    fn figures(&mut self, raw: &Raw, now: u64) -> Reactor {
        let mut reactor = reactor::decode(self.name.clone(), raw, &mut self.prober, now);
        reactor.stalls = self.stalls.ranked(lag_weight(&reactor.lag));
        reactor
    }
}

/// All the lag that was met, in seconds squared: that of every instant.
fn lag_weight(lag: &Histogram) -> f64 {
    lag.sum() * PROBE_SECONDS
}
