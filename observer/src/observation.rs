//! One observation: the programs in the kernel, the targets, and how a snapshot of them is put together.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map::Entry},
    mem,
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::sys::utsname::uname;
use observer_common::{
    accept::{Listener as RawListener, PortKey},
    process::Target as RawTarget,
    reactor::Reactor as RawReactor,
};

use crate::{
    kernel::{clock, layout},
    model::{
        histogram::seconds,
        snapshot::{Listener, Lost, Missing, Own, Reactor, SCHEMA, Snapshot, Target},
    },
    probes::{
        self,
        accept::{self, Known},
        reactor,
    },
    read::maps::{Maps, entries, insert_new},
    target::{
        calls::{self, Call},
        listeners::{Listening, SockDiag},
        process::{self, Process},
    },
};

static PROGRAMS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-ebpf"));

/// Exited processes, exited threads and closed listeners kept for the report, of each kind so many; beyond that
/// the oldest are forgotten.
const ENDED: usize = 1024;

/// What to observe.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// Process ids.
    pub(crate) pids: BTreeSet<u32>,
    /// Whether their children are observed as well, those of the past and of the future.
    pub(crate) follow: bool,
}

/// A running observation. Dropping it takes everything of ours out of the kernel.
pub(crate) struct Observation {
    ebpf: Ebpf,
    maps: Maps,
    sock_diag: SockDiag,
    attached_ns: u64,
    missing: Vec<Missing>,
    /// Release of the running kernel.
    kernel: String,
    live: BTreeMap<u32, Process>,
    exited: BTreeMap<u32, Process>,
    listeners: BTreeMap<u64, Known>,
    /// Listeners in the same network namespaces that belong to no target.
    strangers: HashSet<u64>,
    finished: Vec<(u32, Reactor)>,
    /// Process and name of each reactor's thread, kept for when it is gone.
    names: HashMap<u32, (u32, String)>,
}

impl Observation {
    /// Loads the programs, attaches them and finds what the targets were doing already. `verbose` turns on the
    /// diagnostics of the programs, which are not even loaded otherwise.
    pub(crate) fn start(selection: &Selection, verbose: bool) -> Result<Self> {
        let layout = layout::of_running_kernel()?;
        let follow = u8::from(selection.follow);
        let log_level: u8 = if verbose { u8::MAX } else { 0 };
        let mut ebpf = EbpfLoader::new()
            .override_global("LAYOUT", &layout, true)
            .override_global("FOLLOW", &follow, true)
            .override_global("AYA_LOG_LEVEL", &log_level, true)
            .load(PROGRAMS)
            .context("the kernel does not take the eBPF maps")?;
        let mut maps = Maps::take(&mut ebpf)?;
        for &pid in &selection.pids {
            insert_new(&mut maps.targets, pid, RawTarget::default()).context("cannot add a target")?;
        }
        let missing = probes::attach(&mut ebpf)?;
        let mut observation = Self {
            ebpf,
            maps,
            sock_diag: SockDiag::default(),
            attached_ns: clock::monotonic_ns(),
            missing,
            kernel: uname()
                .context("cannot ask for the kernel's release")?
                .release()
                .to_string_lossy()
                .into(),
            live: BTreeMap::new(),
            exited: BTreeMap::new(),
            listeners: BTreeMap::new(),
            strangers: HashSet::new(),
            finished: Vec::new(),
            names: HashMap::new(),
        };
        observation.adopt(selection)?;
        observation.refresh()?;
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

    /// Adds the children that targets had before the programs could follow them, and the waits and accepts that
    /// threads were inside. What happens meanwhile the programs see themselves: their entries win.
    fn adopt(&mut self, selection: &Selection) -> Result<()> {
        let mut targets = selection.pids.clone();
        loop {
            let children = if selection.follow { process::descendants(&targets) } else { BTreeSet::new() };
            if children.is_empty() {
                break;
            }
            for &child in &children {
                insert_new(&mut self.maps.targets, child, RawTarget::default())
                    .context("cannot add a target")?;
            }
            targets.extend(children);
        }
        for &pid in &targets {
            for (tid, call) in calls::blocked_in(pid) {
                match call {
                    Call::Wait => {
                        let entry = reactor::waiting(pid, clock::monotonic_ns());
                        insert_new(&mut self.maps.reactors, tid, entry).context("cannot add a reactor")?;
                    }
                    Call::Accept { fd } => {
                        if let Some(inode) = process::socket_inode(pid, fd) {
                            insert_new(&mut self.maps.listeners, inode, RawListener::EMPTY)
                                .context("cannot add a listener")?;
                            insert_new(&mut self.maps.accepting, tid, inode).context("cannot add a call")?;
                        }
                    }
                }
            }
            // A process that exited before the programs could see it would stay for ever.
            if !process::is_there(pid) {
                let gone = RawTarget { exited: 1, ..RawTarget::default() };
                self.maps.targets.insert(pid, gone, 0)?;
            }
        }
        Ok(())
    }

    /// Brings processes and listeners up to date.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let mut arrived = false;
        for (pid, raw) in entries(&self.maps.targets) {
            if raw.exited != 0 {
                let known = self.live.remove(&pid).unwrap_or_else(|| Process::of(pid));
                self.exited.insert(pid, known);
                // It may be gone already if the process was found dead on arrival.
                let _gone = self.maps.targets.remove(&pid);
            } else if let Entry::Vacant(place) = self.live.entry(pid) {
                place.insert(Process::of(pid));
                arrived = true;
            }
        }
        self.collect_finished();
        self.refresh_listeners(arrived);
        while self.exited.len() > ENDED {
            self.exited.pop_first();
        }
        Ok(())
    }

    /// Asks for names again: a process may have started another program, a thread may have renamed itself.
    fn rename(&mut self) {
        for process in self.live.values_mut() {
            if process::is_there(process.pid) {
                *process = Process::of(process.pid);
            }
        }
        for (&tid, (tgid, name)) in &mut self.names {
            let now = process::thread_name(*tgid, tid);
            if !now.is_empty() {
                *name = now;
            }
        }
    }

    /// Takes final figures out of the map, so that it holds no more than live threads.
    fn collect_finished(&mut self) {
        for (tid, raw) in entries(&self.maps.reactors) {
            if reactor::is_final(&raw) {
                let (_, name) = self.names.remove(&tid).unwrap_or_default();
                self.finished.push((raw.tgid, reactor::decode(tid, name, &raw, clock::monotonic_ns())));
                let _present = self.maps.reactors.remove(&tid);
            } else {
                self.names.entry(tid).or_insert_with(|| (raw.tgid, process::thread_name(raw.tgid, tid)));
            }
        }
        let surplus = self.finished.len().saturating_sub(ENDED);
        self.finished.drain(..surplus);
    }

    /// Asks sock_diag for depths and limits. Whose a listener is takes a look at every descriptor of every target,
    /// so that is asked only when there is a new target or a new listener.
    fn refresh_listeners(&mut self, new_target: bool) {
        let first_time = self.listeners.is_empty() && self.strangers.is_empty();
        let Some(listening) = self.listening() else { return };
        let accepted_from: HashSet<u64> =
            entries(&self.maps.listeners).into_iter().map(|(inode, _)| inode).collect();
        let is_new = |l: &Listening| {
            !self.listeners.contains_key(&l.inode)
                && (!self.strangers.contains(&l.inode) || accepted_from.contains(&l.inode))
        };
        if new_target || listening.values().any(is_new) {
            self.find_owners(&listening, first_time);
        }
        for (inode, known) in self.listeners.iter_mut().filter(|(_, known)| known.closed.is_none()) {
            if let Some(now) = listening.get(inode) {
                known.depth = now.depth;
                known.limit = now.limit;
                known.peak = known.peak.max(now.depth);
            } else {
                let last = self.maps.listeners.get(inode, 0).unwrap_or(RawListener::EMPTY);
                known.closed = Some(Box::new(last));
                let _never_accepted_from = self.maps.listeners.remove(inode);
            }
        }
        self.strangers.retain(|inode| listening.contains_key(inode));
        let closed: Vec<u64> = self
            .listeners
            .iter()
            .filter(|(_, known)| known.closed.is_some())
            .map(|(&inode, _)| inode)
            .collect();
        for inode in &closed[..closed.len().saturating_sub(ENDED)] {
            self.listeners.remove(inode);
        }
    }

    /// Listeners in every network namespace of a target, by inode number; `None` if a namespace does not answer,
    /// for then nobody knows which listeners are gone.
    fn listening(&mut self) -> Option<HashMap<u64, Listening>> {
        let mut found = HashMap::new();
        let mut asked = HashSet::new();
        for pid in self.live.keys().copied().collect::<Vec<_>>() {
            let namespace = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap_or_default();
            if !asked.insert(namespace) {
                continue;
            }
            match self.sock_diag.listening(pid) {
                Ok(listening) => found.extend(listening.into_iter().map(|l| (l.inode, l))),
                // Its last process may just have exited.
                Err(_) if !process::is_there(pid) => return None,
                Err(error) => {
                    self.note_missing(format!("listeners of process {pid}"), format!("{error:#}"));
                    return None;
                }
            }
        }
        Some(found)
    }

    /// Remembers that something goes unseen, and says so once.
    fn note_missing(&mut self, source: String, reason: String) {
        let missing = Missing { source, reason };
        if self.missing.len() < ENDED && !self.missing.contains(&missing) {
            log::warn!("not seen here: {} ({})", missing.source, missing.reason);
            self.missing.push(missing);
        }
    }

    /// Sorts listeners into the targets' and strangers'. One that several targets share goes to the lowest id: a
    /// server's first process, which opened it.
    fn find_owners(&mut self, listening: &HashMap<u64, Listening>, first_time: bool) {
        for &pid in self.live.keys() {
            for inode in process::socket_inodes(pid) {
                let Some(socket) = listening.get(&inode) else { continue };
                self.strangers.remove(&inode);
                self.listeners.entry(inode).or_insert_with(|| Known {
                    owner: pid,
                    address: socket.address.to_string(),
                    depth_before: if first_time { socket.depth } else { 0 },
                    depth: socket.depth,
                    peak: socket.depth,
                    limit: socket.limit,
                    closed: None,
                });
                let port = PortKey { netns: socket.netns, port: socket.address.port().into() };
                if let Err(error) = self.maps.ports.insert(port, 1, 0) {
                    log::warn!("waits on {} are unknown: {error}", socket.address);
                }
            }
        }
        let owned = &self.listeners;
        self.strangers.extend(listening.keys().filter(|inode| !owned.contains_key(inode)));
    }

    /// Everything known now.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot> {
        self.refresh()?;
        self.rename();
        let mut reactors = BTreeMap::<u32, Vec<Reactor>>::new();
        for (tgid, finished) in &self.finished {
            reactors.entry(*tgid).or_default().push(finished.clone());
        }
        for (tid, raw) in entries::<u32, RawReactor>(&self.maps.reactors) {
            let name = self.names.get(&tid).map(|(_, name)| name.clone()).unwrap_or_default();
            let reactor = reactor::decode(tid, name, &raw, clock::monotonic_ns());
            reactors.entry(raw.tgid).or_default().push(reactor);
        }
        let mut listeners = BTreeMap::<u32, Vec<Listener>>::new();
        for (inode, known) in &self.listeners {
            let live = || self.maps.listeners.get(inode, 0).unwrap_or(RawListener::EMPTY);
            let raw = known.closed.as_deref().copied().unwrap_or_else(live);
            listeners.entry(known.owner).or_default().push(accept::decode(known, &raw));
        }
        let processes = self.exited.values().map(|p| (p, true)).chain(self.live.values().map(|p| (p, false)));
        let mut targets: Vec<Target> = processes
            .map(|(process, exited)| Target {
                pid: process.pid,
                comm: process.comm.clone(),
                exe: process.exe.clone(),
                exited,
                listeners: numbered(listeners.remove(&process.pid).unwrap_or_default()),
                reactors: mem::take(reactors.entry(process.pid).or_default()),
            })
            .collect();
        targets.sort_by_key(|target| target.pid);
        for target in &mut targets {
            target.reactors.sort_by_key(|reactor| reactor.tid);
        }
        Ok(Snapshot {
            schema: SCHEMA,
            started: humantime::format_rfc3339_millis(clock::wall_time(self.attached_ns)).to_string(),
            duration_seconds: seconds(clock::monotonic_ns() - self.attached_ns),
            targets,
            own: self.own()?,
        })
    }

    fn own(&self) -> Result<Own> {
        let lost = self.maps.losses()?.into_iter().map(|(cause, count)| Lost { cause, count }).collect();
        Ok(Own {
            version: env!("CARGO_PKG_VERSION"),
            kernel: self.kernel.clone(),
            lost,
            missing: self.missing.clone(),
        })
    }
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
