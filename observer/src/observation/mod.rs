//! One observation: the programs in the kernel, the targets, and how a snapshot of them is put together.

mod deferred;
mod listeners;
mod reactors;
mod targets;
mod turns;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    num::NonZero,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned, util::nr_cpus};
use nix::sys::utsname::uname;
use observer_common::{loss::Loss, origin::HEADS_PER_CPU, process::Target as RawTarget, ring::RingShape};

use crate::{
    kernel::{calls as system_calls, clock, layout, memory},
    model::{
        delivery::Ledger,
        histogram::seconds,
        snapshot::{Listener, Lost, Missing, Own, Reactor, SCHEMA, Service, Snapshot, Target},
        trace::{Event, Events},
    },
    probes::{
        self, Types, When,
        gc::{self, Collectors},
        listener, reactor,
    },
    process::{self, Process, choice::Choice, drops::ListenDrops, runtime::Runtimes, wait_call::WaitCall},
    profiles::{self, Profile},
    read::{capacity::Capacity, entries::entries, maps::Maps},
    stacks::watch::Watcher,
};

use deferred::{Figures, Follower};
use listeners::{Known, numbered};
use reactors::{Running, Thread};
use turns::{ASKED, Round, Turns};

pub(crate) static PROGRAMS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-ebpf"));

/// Exited processes, exited threads and closed listeners kept for the report, of each kind so many; beyond that
/// the oldest are forgotten.
const ENDED: usize = 1024;

/// What to observe.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// Process ids.
    pub(crate) pids: BTreeSet<u32>,
    /// Whom else, and whom not.
    pub(crate) choice: Choice,
    /// Of those who are chosen, the runtimes of so many are attached to in a second.
    pub(crate) attach_per_second: NonZero<u32>,
    /// Whether their children are observed as well, those of the past and of the future.
    pub(crate) follow: bool,
    /// Calls that count as waits for events.
    pub(crate) calls: Vec<WaitCall>,
    /// From which length on a slice is a stall.
    pub(crate) stall_threshold: Duration,
    /// How much there is room for.
    pub(crate) capacity: Capacity,
    /// What runtimes are known by.
    pub(crate) profiles: Vec<Arc<Profile>>,
    /// Whether deferred work is followed only where that costs little.
    pub(crate) is_limited: bool,
}

/// A running observation. Dropping it takes everything of ours out of the kernel.
pub(crate) struct Observation {
    ebpf: Ebpf,
    maps: Maps,
    watcher: Watcher,
    stall_threshold: Duration,
    runtimes: Runtimes,
    collectors: Collectors,
    follower: Follower,
    pids: BTreeSet<u32>,
    choice: Choice,
    /// How often those that are observed had started a program when they were last looked at, if some are left out.
    judged: HashMap<u32, u32>,
    /// Whom each live process descends from, with when those were started, if others may be chosen.
    ancestors: HashMap<u32, BTreeSet<(u32, u64)>>,
    turns: Turns,
    service: Service,
    follow: bool,
    /// Calls that count as waits for events.
    waits: Vec<WaitCall>,
    attached_ns: u64,
    /// What the maps take of the kernel's memory, in bytes.
    map_memory: u64,
    /// Since when connections to unix sockets get time stamps; `None` while no target listens on one.
    unix_since_ns: Option<u64>,
    /// Accepts that ended while programs were attached one by one and calls in progress not known yet.
    unattributed_before: u64,
    missing: Vec<Missing>,
    /// Release of the running kernel.
    kernel: String,
    live: BTreeMap<u32, Process>,
    /// What they ran when they were last looked at.
    programs: HashMap<u32, Program>,
    exited: Vec<Process>,
    /// By inode number.
    listeners: BTreeMap<u64, Known>,
    /// Whether listeners found from now on are new: nobody waited there before observer came.
    first_look_done: bool,
    /// Counters of the network namespaces that targets were in at first. Others are taken to have begun at zero,
    /// as they did when they were made: one that is older has more drops than its listeners here, which makes
    /// nothing certain.
    drops_before: HashMap<u32, ListenDrops>,
    /// Which of them each target was in when it was last asked.
    namespaces: BTreeMap<u32, u32>,
    namespaces_asked: Round,
    /// Whose names were asked for.
    processes_asked: Round,
    threads_asked: Round,
    finished: Vec<(u32, Reactor)>,
    /// Processes whose pools are to be forgotten: what their threads were about to count is counted by the next look.
    poolless: BTreeSet<u32>,
    /// Of each reactor's thread what is not in the kernel, kept for when it is gone.
    threads: BTreeMap<u32, Thread>,
    /// What becomes of what is pushed.
    ledgers: Vec<Arc<Ledger>>,
}

/// What a process runs.
#[derive(Clone, Copy)]
struct Program {
    /// When the process was started, in ticks of the kernel: another one may get its id. `None` if it was gone by then.
    started: Option<u64>,
    /// How many programs it has started.
    execs: u32,
}

impl Observation {
    /// Loads the programs, attaches them and finds what the targets were doing already. `verbose` turns on the
    /// diagnostics of the programs, which are not even loaded otherwise.
    pub(crate) fn start(selection: &Selection, verbose: bool) -> Result<Self> {
        // A new one has read the kernel's types, which only programs that are relocated by them need: it lets go of them
        // before others read them.
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        let layout = layout::of_running_kernel()?;
        let follow = u8::from(selection.follow);
        let selects = u8::from(!selection.choice.is_none());
        let log_level: u8 = if verbose { u8::MAX } else { 0 };
        let stall_ns = u64::try_from(selection.stall_threshold.as_nanos()).unwrap_or(u64::MAX);
        let cpus = nr_cpus().map_err(|(_, error)| error).context("cannot count the CPUs")?;
        let heads = u32::try_from(cpus)?.saturating_mul(HEADS_PER_CPU);
        // A signal makes the kernel give up the load of a program, which is then tried again with a log: one that tells each
        // step takes so long that nobody could end observer with Ctrl-C.
        let verifier_log = if verbose { VerifierLogLevel::VERBOSE } else { VerifierLogLevel::STATS };
        selection.capacity.apply(&mut loader);
        let mut ebpf = loader
            .verifier_log_level(verifier_log)
            .map_max_entries("HEADS", heads)
            .override_global("LAYOUT", &layout, true)
            .override_global("FOLLOW", &follow, true)
            .override_global("SELECTS", &selects, true)
            .override_global("CLUES", &system_calls::clues(), true)
            .override_global("STALL_NS", &stall_ns, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .load(PROGRAMS)
            .context("the kernel does not take the eBPF maps")?;
        let mut maps = Maps::take(&mut ebpf, selection.capacity)?;
        let wanted: BTreeSet<u32> = &selection.pids | &selection.choice.present();
        for &pid in &wanted {
            maps.targets.insert_new(pid, RawTarget::default()).context("cannot add a target")?;
        }
        let types = Types::default();
        let mut missing = probes::attach(&mut ebpf, &types, When::Always, &selection.calls)?;
        listener::link_steps(&mut ebpf)?;
        if !reactor::find_registers(&mut ebpf, &maps.registers)? {
            let reason = "this kernel keeps the registers of system calls in an unknown place".into();
            missing.push(Missing { source: "what blocked threads wait for".into(), reason });
        }
        if layout.ring_shape == RingShape::Unknown as u32 {
            let reason = "this kernel's io_uring has no tracepoints, or none that observer knows".into();
            missing.push(Missing { source: "accepts through io_uring".into(), reason });
        } else {
            missing.extend(probes::attach(&mut ebpf, &types, When::RingsUnderstood, &selection.calls)?);
        }
        drop(types);
        let mut observation = Self {
            ebpf,
            maps,
            watcher: Watcher::new(selection.stall_threshold),
            stall_threshold: selection.stall_threshold,
            runtimes: Runtimes::of_profiles(selection.profiles.clone())
                .asked_for(|profile| profiles::is_asked_for(profile, selection.is_limited)),
            collectors: Collectors::at_most(selection.capacity.collectors()),
            follower: Follower::new(selection.is_limited, selection.capacity),
            pids: selection.pids.clone(),
            choice: selection.choice.clone(),
            judged: HashMap::new(),
            ancestors: HashMap::new(),
            turns: Turns::at(selection.attach_per_second),
            service: Service::default(),
            follow: selection.follow,
            waits: selection.calls.clone(),
            attached_ns: clock::monotonic_ns(),
            map_memory: memory::of_maps().context("cannot read how large the maps are")?,
            unix_since_ns: None,
            unattributed_before: 0,
            missing,
            kernel: uname()
                .context("cannot ask for the kernel's release")?
                .release()
                .to_string_lossy()
                .into(),
            live: BTreeMap::new(),
            programs: HashMap::new(),
            exited: Vec::new(),
            listeners: BTreeMap::new(),
            first_look_done: false,
            drops_before: HashMap::new(),
            namespaces: BTreeMap::new(),
            namespaces_asked: Round::default(),
            processes_asked: Round::default(),
            threads_asked: Round::default(),
            finished: Vec::new(),
            poolless: BTreeSet::new(),
            threads: BTreeMap::new(),
            ledgers: Vec::new(),
        };
        observation.adopt(wanted)?;
        // Runtimes take longest, and nothing waits for them.
        let (live, _none) = observation.refresh_targets()?;
        observation.adopt_calls(observation.live.keys().copied().collect())?;
        observation.unattributed_before = observation.maps.lost(Loss::AcceptUnattributed)?;
        observation.refresh_runtimes(live);
        Ok(observation)
    }

    /// The programs, for whoever wants their diagnostics.
    pub(crate) fn programs(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// What the maps take of the kernel's memory, in bytes; it does not change.
    pub(crate) const fn map_memory(&self) -> u64 {
        self.map_memory
    }

    /// Wall time at which the programs were attached.
    pub(crate) fn started(&self) -> SystemTime {
        clock::wall_time(self.attached_ns)
    }

    /// From now on tells what becomes of what is pushed, too.
    pub(crate) fn tell_of(&mut self, ledger: Arc<Ledger>) {
        self.ledgers.push(ledger);
    }

    /// From now on keeps what can be traced; what there is no room for is counted there.
    pub(crate) fn trace(&mut self, ledger: Arc<Ledger>) {
        self.follower.trace(Events::counted_in(ledger));
    }

    /// What can be traced since the last time.
    pub(crate) fn events(&mut self) -> VecDeque<Event> {
        self.follower.events()
    }

    /// A process that is or was under observation, as far as it is remembered.
    pub(crate) fn process(&self, pid: u32) -> Option<&Process> {
        self.live.get(&pid).or_else(|| self.exited.iter().rfind(|process| process.pid == pid))
    }

    /// Whether all targets are gone, and no others can come.
    pub(crate) fn is_over(&self) -> bool {
        self.live.is_empty() && self.choice.is_none()
    }

    /// Processes under observation now.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Process> {
        self.live.values()
    }

    /// Remembers that something goes unseen, and says so once.
    fn note_missing(&mut self, source: String, reason: String) {
        let missing = Missing { source, reason };
        if self.missing.len() < ENDED && !self.missing.contains(&missing) {
            log::warn!("not seen here: {} ({})", missing.source, missing.reason);
            self.missing.push(missing);
        }
    }

    /// Brings processes, listeners and runtimes up to date.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let (live, running) = self.refresh_targets()?;
        self.ask_probers(&running);
        self.refresh_runtimes(live);
        Ok(())
    }

    /// Brings processes and listeners up to date. Returns live targets, each with how many programs it has started, and
    /// their reactors.
    fn refresh_targets(&mut self) -> Result<(Vec<(u32, u32)>, Running)> {
        self.select()?;
        self.leave_out()?;
        // Many that are selected are gone soon: what those run is not worth a look.
        let waits = self.first_look_done && !self.choice.is_none();
        let mut changed = false;
        let mut live = Vec::new();
        for (pid, raw) in entries(&self.maps.targets) {
            if raw.is_candidate != 0 {
                continue;
            }
            if raw.exited != 0 {
                self.note_exit(pid);
                changed = true;
                // It may be gone already if the process was found dead on arrival.
                let _gone = self.maps.targets.remove(pid);
                if !self.choice.is_none() && process::is_there(pid) {
                    // Another has its id by now, and is observed under it: whether it is wanted is to be decided.
                    let next = RawTarget { is_candidate: 1, ..RawTarget::default() };
                    let _has_room = self.maps.targets.insert_new(pid, next);
                }
                continue;
            }
            let last = self.programs.get(&pid).copied();
            let has_changed = last.is_some_and(|last| last.execs != raw.execs);
            if last.is_none() || has_changed {
                let started = process::start_ticks(pid);
                // Forked by another target, with the id of one that has exited since the last look: the entry is the new
                // one's, in which nothing tells of that exit.
                if last.is_some_and(|last| started.is_some() && started != last.started) {
                    self.note_exit(pid);
                }
                let started = started.or(last.and_then(|last| last.started));
                self.programs.insert(pid, Program { started, execs: raw.execs });
            }
            let is_new = !self.live.contains_key(&pid);
            if is_new {
                self.live.insert(pid, Process::of(pid));
                self.remember_ancestors(pid);
                changed = true;
            }
            if has_changed
                && !is_new
                && let Some(process) = self.live.get_mut(&pid)
                && process::is_there(pid)
            {
                process.refresh();
                for (&tid, thread) in self.threads.iter_mut().filter(|(_, thread)| thread.pid == pid) {
                    thread.rename(tid);
                }
            }
            if !is_new || !waits {
                live.push((pid, raw.execs));
            }
        }
        let running = self.collect_finished()?;
        self.follower.name_all(&self.maps);
        self.note_namespaces();
        self.refresh_listeners(changed)?;
        let surplus = self.exited.len().saturating_sub(ENDED);
        self.exited.drain(..surplus);
        Ok((live, running))
    }

    /// Keeps the last figures of a target that has exited.
    fn note_exit(&mut self, pid: u32) {
        let known = self.live.remove(&pid).unwrap_or_else(|| Process::of(pid));
        self.ancestors.remove(&pid);
        self.exited.push(known);
        self.programs.remove(&pid);
        self.collectors.exited(&mut self.maps, pid, ENDED);
        self.follower.exited(&mut self.maps, pid, ENDED);
    }

    /// Watches what the runtimes of targets do.
    fn refresh_runtimes(&mut self, live: Vec<(u32, u32)>) {
        let live = self.turns.of(live, &self.pids, !self.choice.is_none());
        for (pid, execs) in live {
            let (runtimes, ebpf, maps) = (&mut self.runtimes, &mut self.ebpf, &mut self.maps);
            let mut missing = self.follower.refresh(runtimes, ebpf, maps, pid, execs);
            missing.extend(self.collectors.refresh(runtimes, ebpf, maps, pid, execs));
            for missing in missing {
                self.note_missing(missing.source, missing.reason);
            }
        }
        self.follower.adopt_connections(&mut self.maps);
    }

    /// Asks for names again, some at a time: a thread may have renamed itself, a process may have moved.
    fn rename(&mut self) {
        for pid in self.processes_asked.next(&self.live) {
            if let Some(process) = self.live.get_mut(&pid)
                && process::is_there(pid)
            {
                process.refresh();
            }
        }
        for tid in self.threads_asked.next(&self.threads) {
            if let Some(thread) = self.threads.get_mut(&tid) {
                thread.rename(tid);
            }
        }
    }

    /// Everything known now.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot> {
        let (live, running) = self.refresh_targets()?;
        self.refresh_runtimes(live);
        self.rename();
        let mut reactors = BTreeMap::<u32, Vec<Reactor>>::new();
        for (tgid, finished) in &self.finished {
            reactors.entry(*tgid).or_default().push(finished.clone());
        }
        for mut raw in running.reactors {
            raw.now.gc.ns += gc::in_progress(&self.maps, &raw.now, running.now);
            reactors.entry(raw.now.tgid).or_default().push(self.figures(&raw, running.now));
        }
        let mut listeners = BTreeMap::<u32, Vec<Listener>>::new();
        let decoded = self.decode_listeners()?;
        for (known, figures) in self.listeners.values().zip(decoded) {
            listeners.entry(self.owner(&known.raw)).or_default().push(figures);
        }
        let exited = self.exited.iter().map(|process| (process.clone(), true));
        let processes: Vec<_> = exited.chain(self.live.values().map(|p| (p.clone(), false))).collect();
        let mut targets: Vec<Target> = Vec::new();
        for (process, exited) in processes {
            let pid = process.pid;
            let Figures { deferred, hooks, unmatched } = if exited {
                self.follower.final_figures(pid)
            } else {
                self.follower.figures(&self.maps, pid)
            };
            for hook in hooks.iter().filter(|hook| hook.never_matches()) {
                let reason =
                    format!("{} was come to {} times and never meant anything", hook.place, hook.hits);
                self.note_missing(format!("deferred work of {}, by {}", process.comm, hook.verb), reason);
            }
            // Of two processes that have had the same id, one after the other, what still goes on is the second one's.
            let is_reused = exited && self.live.contains_key(&pid);
            let (of_it, of_other) = divide(reactors.remove(&pid), |reactor| reactor.exited || !is_reused);
            reactors.insert(pid, of_other);
            let (listeners_of_it, of_other) = divide(listeners.remove(&pid), |l| l.closed || !is_reused);
            listeners.insert(pid, of_other);
            targets.push(Target {
                pid,
                comm: process.comm,
                exe: process.exe,
                place: process.place,
                exited,
                listeners: numbered(listeners_of_it),
                reactors: of_it,
                deferred,
                unmatched,
                hooks,
                gc: if exited {
                    self.collectors.final_figures(pid)
                } else {
                    self.collectors.figures(&self.maps, pid)
                },
            });
        }
        targets.sort_by_key(|target| target.pid);
        for target in &mut targets {
            target.reactors.sort_by_key(|reactor| reactor.tid);
        }
        Ok(Snapshot {
            schema: SCHEMA,
            started: clock::written(self.attached_ns),
            duration_seconds: seconds(clock::monotonic_ns() - self.attached_ns),
            targets,
            own: self.own()?,
        })
    }

    /// The same with every piece of deferred work that is over.
    pub(crate) fn report(&mut self) -> Result<Snapshot> {
        // Nobody will ask again.
        for _ in 0..self.live.len().max(self.threads.len()) / ASKED {
            self.rename();
        }
        if !self.live.is_empty() || !self.exited.is_empty() {
            for (profile, reason) in self.runtimes.unmet() {
                self.note_missing(format!("deferred work by the profile {profile}"), reason);
            }
        }
        let mut snapshot = self.snapshot()?;
        for target in snapshot.targets.iter_mut().filter(|target| !target.exited) {
            self.follower.add_links(target.pid, &mut target.deferred);
        }
        Ok(snapshot)
    }

    fn own(&self) -> Result<Own> {
        let mut lost = Vec::new();
        for (loss, cause) in Loss::ALL {
            let before = if loss == Loss::AcceptUnattributed { self.unattributed_before } else { 0 };
            lost.push(Lost { cause, count: self.maps.lost(loss)?.saturating_sub(before) });
        }
        Ok(Own {
            version: env!("CARGO_PKG_VERSION"),
            kernel: self.kernel.clone(),
            map_memory_bytes: self.map_memory,
            service: Service { waiting: self.turns.waiting(), ..self.service },
            lost,
            missing: self.missing.clone(),
            otlp: self.ledgers.iter().map(|ledger| ledger.read()).collect(),
        })
    }
}

/// Those that this is true of, and the others.
fn divide<T>(all: Option<Vec<T>>, is_so: impl FnMut(&T) -> bool) -> (Vec<T>, Vec<T>) {
    all.unwrap_or_default().into_iter().partition(is_so)
}
