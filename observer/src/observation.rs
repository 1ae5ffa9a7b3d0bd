//! One observation: the programs in the kernel, the targets, and how a snapshot of them is put together.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map},
    mem,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::sys::utsname::uname;
use observer_common::{
    accept::{Accepting, PortKey},
    listener::{Listener as RawListener, Queue},
    loss::Loss,
    process::Target as RawTarget,
    reactor::Reactor as RawReactor,
    ring::RingShape,
};

use crate::{
    kernel::{calls as system_calls, clock, layout},
    model::{
        histogram::{Histogram, seconds},
        lag::{PROBE_SECONDS, Prober},
        snapshot::{Listener, Lost, Missing, Own, Reactor, SCHEMA, Snapshot, Target},
        stall::Stalls,
    },
    probes::{
        self, When,
        gc::{self, Collectors},
        listener::{self, Before},
        reactor::{self, Calls},
    },
    read::{
        board::InSlice,
        maps::{self, Maps, entries, insert_new},
    },
    stacks::watch::Watcher,
    target::{
        calls::{self, Call},
        drops::{self, ListenDrops},
        process::{self, Process},
    },
};

static PROGRAMS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-ebpf"));

/// Exited processes, exited threads and closed listeners kept for the report, of each kind so many; beyond that
/// the oldest are forgotten.
const ENDED: usize = 1024;

/// How often to look at listeners until none drops connections between that and a look at its namespace's counters.
const LOOKS: usize = 4;

/// What to observe.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// Process ids.
    pub(crate) pids: BTreeSet<u32>,
    /// Whether their children are observed as well, those of the past and of the future.
    pub(crate) follow: bool,
    /// Calls that count as waits for events.
    pub(crate) calls: Vec<Calls>,
    /// From which length on a slice is a stall.
    pub(crate) stall_threshold: Duration,
}

/// A listener as it was when last looked at, and as it was before.
struct Known {
    raw: RawListener,
    before: Before,
}

/// A running observation. Dropping it takes everything of ours out of the kernel.
pub(crate) struct Observation {
    ebpf: Ebpf,
    maps: Maps,
    watcher: Watcher,
    stall_threshold: Duration,
    collectors: Collectors,
    attached_ns: u64,
    /// Since when connections to unix sockets get time stamps; `None` while no target listens on one.
    unix_since_ns: Option<u64>,
    /// Accepts that ended while programs were attached one by one and calls in progress not known yet.
    unattributed_before: u64,
    missing: Vec<Missing>,
    /// Release of the running kernel.
    kernel: String,
    live: BTreeMap<u32, Process>,
    exited: Vec<Process>,
    /// By inode number.
    listeners: BTreeMap<u64, Known>,
    /// Whether listeners found from now on are new: nobody waited there before observer came.
    first_look_done: bool,
    /// Counters of the network namespaces that targets were in at first. Others are taken to have begun at zero,
    /// as they did when they were made: one that is older has more drops than its listeners here, which makes
    /// nothing certain.
    drops_before: HashMap<u32, ListenDrops>,
    finished: Vec<(u32, Reactor)>,
    /// Of each reactor's thread what is not in the kernel, kept for when it is gone.
    threads: HashMap<u32, Thread>,
}

/// A reactor's thread.
struct Thread {
    /// Its process.
    pid: u32,
    name: String,
    prober: Prober,
    stalls: Stalls,
}

impl Observation {
    /// Loads the programs, attaches them and finds what the targets were doing already. `verbose` turns on the
    /// diagnostics of the programs, which are not even loaded otherwise.
    pub(crate) fn start(selection: &Selection, verbose: bool) -> Result<Self> {
        let layout = layout::of_running_kernel()?;
        let follow = u8::from(selection.follow);
        let log_level: u8 = if verbose { u8::MAX } else { 0 };
        let stall_ns = u64::try_from(selection.stall_threshold.as_nanos()).unwrap_or(u64::MAX);
        let mut ebpf = EbpfLoader::new()
            .override_global("LAYOUT", &layout, true)
            .override_global("FOLLOW", &follow, true)
            .override_global("CLUES", &system_calls::clues(), true)
            .override_global("STALL_NS", &stall_ns, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .load(PROGRAMS)
            .context("the kernel does not take the eBPF maps")?;
        let mut maps = Maps::take(&mut ebpf)?;
        for &pid in &selection.pids {
            insert_new(&mut maps.targets, pid, RawTarget::default()).context("cannot add a target")?;
        }
        let mut missing = probes::attach(&mut ebpf, When::Always, &selection.calls)?;
        if !reactor::find_registers(&mut ebpf, &maps.registers)? {
            let reason = "this kernel keeps the registers of system calls in an unknown place".into();
            missing.push(Missing { source: "what blocked threads wait for".into(), reason });
        }
        if layout.ring_shape == RingShape::Unknown as u32 {
            let reason = "this kernel's io_uring has no tracepoints, or none that observer knows".into();
            missing.push(Missing { source: "accepts through io_uring".into(), reason });
        } else {
            missing.extend(probes::attach(&mut ebpf, When::RingsUnderstood, &selection.calls)?);
        }
        let mut observation = Self {
            ebpf,
            maps,
            watcher: Watcher::new(selection.stall_threshold),
            stall_threshold: selection.stall_threshold,
            collectors: Collectors::default(),
            attached_ns: clock::monotonic_ns(),
            unix_since_ns: None,
            unattributed_before: 0,
            missing,
            kernel: uname()
                .context("cannot ask for the kernel's release")?
                .release()
                .to_string_lossy()
                .into(),
            live: BTreeMap::new(),
            exited: Vec::new(),
            listeners: BTreeMap::new(),
            first_look_done: false,
            drops_before: HashMap::new(),
            finished: Vec::new(),
            threads: HashMap::new(),
        };
        observation.adopt_processes(selection)?;
        observation.refresh()?;
        observation.adopt_calls(&selection.calls)?;
        observation.unattributed_before = observation.maps.lost(Loss::AcceptUnattributed)?;
        Ok(observation)
    }

    /// The programs, for whoever wants their diagnostics.
    pub(crate) fn programs(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Whether all targets are gone.
    pub(crate) fn is_over(&self) -> bool {
        self.live.is_empty()
    }

    /// Processes under observation now.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Process> {
        self.live.values()
    }

    /// Adds the children that targets had before the programs could follow them.
    fn adopt_processes(&mut self, selection: &Selection) -> Result<()> {
        let mut targets = selection.pids.clone();
        loop {
            let children = if selection.follow { process::descendants(&targets) } else { BTreeSet::new() };
            if children.is_empty() {
                break;
            }
            for &child in &children {
                if !insert_new(&mut self.maps.targets, child, RawTarget::default())? {
                    self.note_missing("some children of targets".into(), "there are too many".into());
                }
            }
            targets.extend(children);
        }
        for &pid in &targets {
            // A process that exited before the programs could see it would stay for ever.
            if !process::is_there(pid) {
                let gone = RawTarget { exited: 1, ..RawTarget::default() };
                self.maps.targets.insert(pid, gone, 0)?;
            }
        }
        Ok(())
    }

    /// Adds the waits and accepts that threads were inside before the programs could see them enter. What happens
    /// meanwhile the programs see themselves: their entries win.
    fn adopt_calls(&mut self, waits: &[Calls]) -> Result<()> {
        for pid in self.live.keys().copied().collect::<Vec<_>>() {
            for (tid, call) in calls::blocked_in(pid, waits) {
                let has_room = match call {
                    Call::Wait { kind, set } => {
                        let place = self.maps.claim_place(tid, pid)?;
                        let entry = reactor::waiting(pid, place, clock::monotonic_ns(), kind, set);
                        insert_new(&mut self.maps.reactors, tid, entry)?
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

    /// Remembers that something goes unseen, and says so once.
    fn note_missing(&mut self, source: String, reason: String) {
        let missing = Missing { source, reason };
        if self.missing.len() < ENDED && !self.missing.contains(&missing) {
            log::warn!("not seen here: {} ({})", missing.source, missing.reason);
            self.missing.push(missing);
        }
    }

    /// How often to [`watch`](Self::watch).
    pub(crate) fn watch_period(&self) -> Duration {
        self.watcher.period()
    }

    /// Takes in the stalls that have ended, and looks at slices that may become one.
    pub(crate) fn watch(&mut self) {
        self.collect_stalls();
        self.watcher.glance(self.maps.board.in_slices(), clock::monotonic_ns());
    }

    /// Puts each stall that has ended down to what was seen of it.
    fn collect_stalls(&mut self) {
        for raw in self.maps.stalls() {
            let look = self.watcher.seen(raw.tid, raw.start_ns);
            let stalls = &mut self.thread(raw.tid, raw.tgid).stalls;
            stalls.add(reactor::stall(&raw), look);
        }
    }

    /// What is kept of a reactor's thread.
    fn thread(&mut self, tid: u32, pid: u32) -> &mut Thread {
        let threshold = self.stall_threshold;
        self.threads.entry(tid).or_insert_with(|| Thread::of(pid, tid, threshold))
    }

    /// Brings processes and listeners up to date.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let mut changed = false;
        for (pid, raw) in entries(&self.maps.targets) {
            if raw.exited != 0 {
                let known = self.live.remove(&pid).unwrap_or_else(|| Process::of(pid));
                self.exited.push(known);
                self.collectors.exited(&mut self.maps, pid, ENDED);
                changed = true;
                // It may be gone already if the process was found dead on arrival.
                let _gone = self.maps.targets.remove(&pid);
            } else if let btree_map::Entry::Vacant(place) = self.live.entry(pid) {
                place.insert(Process::of(pid));
                changed = true;
            }
            if raw.exited == 0
                && let Some(missing) = self.collectors.refresh(&mut self.ebpf, &mut self.maps, pid, raw.execs)
            {
                self.note_missing(missing.source, missing.reason);
            }
        }
        self.collect_finished()?;
        self.note_namespaces();
        self.refresh_listeners(changed)?;
        let surplus = self.exited.len().saturating_sub(ENDED);
        self.exited.drain(..surplus);
        Ok(())
    }

    /// Remembers the counters of the first targets' network namespaces, and forgets those that targets have left:
    /// the kernel gives their numbers to others.
    fn note_namespaces(&mut self) {
        let namespaces = self.namespaces();
        if self.first_look_done {
            self.drops_before.retain(|netns, _| namespaces.contains_key(netns));
        } else {
            let drops =
                namespaces.iter().filter_map(|(&netns, &pid)| Some((netns, drops::of_namespace(pid)?)));
            self.drops_before = drops.collect();
        }
    }

    /// Network namespaces that targets are in, each with one of them.
    fn namespaces(&self) -> HashMap<u32, u32> {
        self.live.keys().filter_map(|&pid| Some((process::network_namespace(pid)?, pid))).collect()
    }

    /// Asks for names again: a process may have started another program, a thread may have renamed itself.
    fn rename(&mut self) {
        for process in self.live.values_mut() {
            if process::is_there(process.pid) {
                *process = Process::of(process.pid);
            }
        }
        for (&tid, thread) in &mut self.threads {
            let now = process::thread_name(thread.pid, tid);
            if !now.is_empty() {
                thread.name = now;
            }
        }
    }

    /// Takes final figures out of the map, so that it holds no more than live threads, and asks probers again.
    fn collect_finished(&mut self) -> Result<()> {
        self.collect_stalls();
        for (tid, raw) in maps::reactors(&self.maps.reactors) {
            let now = clock::monotonic_ns();
            let thread = self.thread(tid, raw.tgid);
            if reactor::is_final(&raw) {
                let reactor = thread.figures(tid, &raw, now);
                self.threads.remove(&tid);
                self.finished.push((raw.tgid, reactor));
                let _present = self.maps.reactors.remove(&tid);
                self.maps.free_place(raw.place)?;
            } else {
                let _only_attributes = reactor::lag(&raw, &mut thread.prober, now);
            }
        }
        let surplus = self.finished.len().saturating_sub(ENDED);
        self.finished.drain(..surplus);
        Ok(())
    }

    /// Looks at every accept queue. Listeners that targets opened meanwhile have made their own entries; what new
    /// targets brought along is searched for, and so are heirs of listeners whose process is gone.
    fn refresh_listeners(&mut self, targets_changed: bool) -> Result<()> {
        if targets_changed {
            listener::find(&mut self.ebpf)?;
        }
        for (inode, raw) in entries(&self.maps.listeners) {
            if raw.unix_name != 0 && self.unix_since_ns.is_none() {
                self.missing.extend(probes::attach(&mut self.ebpf, When::UnixListener, &[])?);
                self.unix_since_ns = Some(clock::monotonic_ns());
            }
            listener::look(&mut self.ebpf, inode)?;
        }
        for (inode, raw) in entries(&self.maps.listeners) {
            let is_first_look = !self.first_look_done;
            // A listen call that failed, or a listener so short-lived that there is nothing to tell.
            if raw.queue.closed != 0 && raw.accepts == 0 && !self.listeners.contains_key(&inode) {
                self.maps.listeners.remove(&inode)?;
                continue;
            }
            let known = self.listeners.entry(inode).or_insert_with(|| Known {
                raw,
                before: if is_first_look { Before::of(&raw.queue) } else { Before::default() },
            });
            let last = mem::replace(&mut known.raw, raw);
            if raw.queue.closed != 0 {
                // How deep it was when it closed is not to be known any more; how deep it was before is.
                known.raw.queue = Queue { closed: 1, ..last.queue };
                self.maps.listeners.remove(&inode)?;
                self.expect_none_for(&raw)?;
            }
        }
        self.first_look_done = true;
        let closed: Vec<u64> = self
            .listeners
            .iter()
            .filter(|(_, known)| known.raw.queue.closed != 0)
            .map(|(&inode, _)| inode)
            .collect();
        for inode in &closed[..closed.len().saturating_sub(ENDED)] {
            self.listeners.remove(inode);
        }
        Ok(())
    }

    /// Ends the time stamps for connections to a closed listener, unless they may be another's.
    fn expect_none_for(&mut self, closed: &RawListener) -> Result<()> {
        if closed.unix_name != 0 {
            let _never_wanted = self.maps.unix_names.remove(&closed.unix_name);
            // Those who waited are gone without an event.
            for (address, arrival) in entries(&self.maps.queued) {
                if arrival.unix_name == closed.unix_name {
                    let _accepted = self.maps.queued.remove(&address);
                }
            }
            return Ok(());
        }
        let place = |raw: &RawListener| (raw.netns, raw.port, raw.unix_name);
        let open = self.listeners.iter().filter(|(_, known)| known.raw.queue.closed == 0);
        let mut others =
            open.filter(|(_, known)| place(&known.raw) == place(closed)).map(|(&inode, _)| inode);
        let port = PortKey { netns: closed.netns, port: closed.port.into() };
        match (others.next(), others.next()) {
            (None, _) => {
                let _never_wanted = self.maps.ports.remove(&port);
            }
            (Some(only), None) => self.maps.ports.insert(port, only, 0)?,
            _ => {}
        }
        Ok(())
    }

    /// Figures of all listeners, in the order in which they are known.
    fn decode_listeners(&mut self) -> Result<Vec<Listener>> {
        let mut looks = 0;
        loop {
            let known = self.listeners.values();
            let mut listeners: Vec<_> =
                known.map(|known| listener::decode(&known.raw, known.before, self.unix_since_ns)).collect();
            looks += 1;
            if self.attribute_overflows(&mut listeners) || looks == LOOKS {
                return Ok(listeners);
            }
            self.refresh_listeners(false)?;
        }
    }

    /// Attributes namespaces' overflows to listeners where that is certain. Returns whether looking again would
    /// make no more certain.
    fn attribute_overflows(&self, listeners: &mut [Listener]) -> bool {
        let namespaces: Vec<u32> = self.listeners.values().map(|known| known.raw.netns).collect();
        let mut dropping = HashMap::<u32, u32>::new();
        for (&netns, _) in namespaces.iter().zip(&*listeners).filter(|(_, listener)| listener.drops > 0) {
            *dropping.entry(netns).or_default() += 1;
        }
        let now = self.namespaces();
        let now = now.into_iter().filter(|(netns, _)| dropping.contains_key(netns));
        let grown: HashMap<u32, ListenDrops> = now
            .filter_map(|(netns, pid)| {
                let before = self.drops_before.get(&netns).copied().unwrap_or_default();
                Some((netns, drops::of_namespace(pid)?.since(before)?))
            })
            .collect();
        let mut is_final = true;
        for (netns, listener) in namespaces.iter().zip(listeners).filter(|(_, l)| l.protocol == "tcp") {
            let others_dropped = dropping.get(netns).is_some_and(|&count| count > 1);
            listener.overflows = match grown.get(netns) {
                _ if listener.drops == 0 => Some(0),
                // What a closed one dropped after the last look, nobody knows.
                Some(grown) if !listener.closed => grown.overflows_of(listener.drops, others_dropped),
                _ => None,
            };
            let is_outrun = grown.get(netns).is_some_and(|grown| grown.drops > listener.drops.into());
            is_final &= listener.overflows.is_some() || others_dropped || !is_outrun;
        }
        is_final
    }

    /// Process that a listener is listed with: the one that accepts from it, or else the first that had it open.
    /// One that is gone only if there is no other, for a listener may outlive it.
    fn owner(&self, raw: &RawListener) -> u32 {
        let candidates = [raw.accepter, raw.owner];
        candidates.into_iter().find(|pid| self.live.contains_key(pid)).unwrap_or(raw.owner)
    }

    /// Everything known now.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot> {
        self.refresh()?;
        self.rename();
        let mut reactors = BTreeMap::<u32, Vec<Reactor>>::new();
        for (tgid, finished) in &self.finished {
            reactors.entry(*tgid).or_default().push(finished.clone());
        }
        for (tid, mut raw) in maps::reactors(&self.maps.reactors) {
            raw.gc_ns += gc::in_progress(&self.maps, tid, &raw, clock::monotonic_ns());
            reactors.entry(raw.tgid).or_default().push(self.figures(tid, &raw));
        }
        let mut listeners = BTreeMap::<u32, Vec<Listener>>::new();
        let decoded = self.decode_listeners()?;
        for (known, figures) in self.listeners.values().zip(decoded) {
            listeners.entry(self.owner(&known.raw)).or_default().push(figures);
        }
        let processes = self.exited.iter().map(|p| (p, true)).chain(self.live.values().map(|p| (p, false)));
        let mut targets: Vec<Target> = processes
            .map(|(process, exited)| Target {
                pid: process.pid,
                comm: process.comm.clone(),
                exe: process.exe.clone(),
                container: process.container.clone(),
                exited,
                listeners: numbered(listeners.remove(&process.pid).unwrap_or_default()),
                reactors: mem::take(reactors.entry(process.pid).or_default()),
                gc: if exited {
                    self.collectors.final_figures(process.pid)
                } else {
                    self.collectors.figures(&self.maps, process.pid)
                },
            })
            .collect();
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

    /// A reactor's figures as of now; a slice in progress is looked at if it takes long.
    fn figures(&mut self, tid: u32, raw: &RawReactor) -> Reactor {
        let now = clock::monotonic_ns();
        let threshold = self.stall_threshold.as_secs_f64();
        let slice = InSlice { tid, pid: raw.tgid, since_ns: raw.phase_since_ns, frame_pointer: 0 };
        let in_progress = Some(reactor::stall_in_progress(raw, now))
            .filter(|stall| reactor::is_in_slice(raw) && stall.seconds >= threshold);
        let present = in_progress.map(|stall| (stall, self.watcher.seen_so_far(slice)));
        let thread = self.thread(tid, raw.tgid);
        let mut reactor = thread.figures(tid, raw, now);
        if let Some((stall, look)) = present {
            let mut stalls = thread.stalls.clone();
            stalls.add_in_progress(&stall, look.clone());
            reactor.stalls = stalls.ranked(lag_weight(&reactor.lag));
            reactor.current_stack = Some(look);
        }
        reactor
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
            lost,
            missing: self.missing.clone(),
        })
    }
}

impl Thread {
    fn of(pid: u32, tid: u32, stall_threshold: Duration) -> Self {
        let stalls = Stalls::over(stall_threshold.as_secs_f64());
        Self { pid, name: process::thread_name(pid, tid), prober: Prober::default(), stalls }
    }

    /// Its figures as of now, stalls that have ended included.
    fn figures(&mut self, tid: u32, raw: &RawReactor, now: u64) -> Reactor {
        let mut reactor = reactor::decode(tid, self.name.clone(), raw, &mut self.prober, now);
        reactor.stalls = self.stalls.ranked(lag_weight(&reactor.lag));
        reactor
    }
}

/// All the lag that was met, in seconds squared: that of every instant.
fn lag_weight(lag: &Histogram) -> f64 {
    lag.sum() * PROBE_SECONDS
}

/// Numbers the listeners that share an address, so that each can be told from its siblings.
fn numbered(mut listeners: Vec<Listener>) -> Vec<Listener> {
    let mut members = HashMap::<String, usize>::new();
    for listener in &mut listeners {
        let count = members.entry(listener.address.clone()).or_default();
        *count += 1;
        listener.member = Some(*count);
    }
    for listener in &mut listeners {
        if members[&listener.address] == 1 {
            listener.member = None;
        }
    }
    listeners
}
