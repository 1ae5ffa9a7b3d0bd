//! One observation: the programs in the kernel, the targets, and how a snapshot of them is put together.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map, hash_map},
    mem,
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use nix::sys::utsname::uname;
use observer_common::{
    accept::{Accepting, PortKey},
    listener::{Listener as RawListener, Queue},
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
        listener::{self, Before},
        reactor,
    },
    read::maps::{Maps, entries, insert_new},
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

/// What to observe.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    /// Process ids.
    pub(crate) pids: BTreeSet<u32>,
    /// Whether their children are observed as well, those of the past and of the future.
    pub(crate) follow: bool,
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
    attached_ns: u64,
    missing: Vec<Missing>,
    /// Release of the running kernel.
    kernel: String,
    live: BTreeMap<u32, Process>,
    exited: Vec<Process>,
    /// By inode number.
    listeners: BTreeMap<u64, Known>,
    /// Whether listeners found from now on are new: nobody waited there before observer came.
    first_look_done: bool,
    /// Counters of each target's network namespace when it was first seen.
    drops_before: HashMap<u32, ListenDrops>,
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
            attached_ns: clock::monotonic_ns(),
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
            names: HashMap::new(),
        };
        observation.adopt_processes(selection)?;
        observation.refresh()?;
        observation.adopt_calls()?;
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
                let gone = RawTarget { exited: 1 };
                self.maps.targets.insert(pid, gone, 0)?;
            }
        }
        Ok(())
    }

    /// Adds the waits and accepts that threads were inside before the programs could see them enter. What happens
    /// meanwhile the programs see themselves: their entries win.
    fn adopt_calls(&mut self) -> Result<()> {
        for pid in self.live.keys().copied().collect::<Vec<_>>() {
            for (tid, call) in calls::blocked_in(pid) {
                let has_room = match call {
                    Call::Wait => {
                        let entry = reactor::waiting(pid, clock::monotonic_ns());
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

    /// Brings processes and listeners up to date.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let mut changed = false;
        for (pid, raw) in entries(&self.maps.targets) {
            if raw.exited != 0 {
                let known = self.live.remove(&pid).unwrap_or_else(|| Process::of(pid));
                self.exited.push(known);
                changed = true;
                // It may be gone already if the process was found dead on arrival.
                let _gone = self.maps.targets.remove(&pid);
            } else if let btree_map::Entry::Vacant(place) = self.live.entry(pid) {
                place.insert(Process::of(pid));
                changed = true;
            }
        }
        self.collect_finished();
        self.note_namespaces();
        self.refresh_listeners(changed)?;
        let surplus = self.exited.len().saturating_sub(ENDED);
        self.exited.drain(..surplus);
        Ok(())
    }

    /// Remembers the counters of network namespaces as they were when first seen.
    fn note_namespaces(&mut self) {
        for &pid in self.live.keys() {
            if let Some(netns) = process::network_namespace(pid)
                && let hash_map::Entry::Vacant(place) = self.drops_before.entry(netns)
                && let Some(drops) = drops::of_namespace(pid)
            {
                place.insert(drops);
            }
        }
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

    /// Looks at every accept queue. Listeners that targets opened meanwhile have made their own entries; what new
    /// targets brought along is searched for, and so are heirs of listeners whose process is gone.
    fn refresh_listeners(&mut self, targets_changed: bool) -> Result<()> {
        if targets_changed {
            listener::find(&mut self.ebpf)?;
        }
        for (inode, _) in entries(&self.maps.listeners) {
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
                let port = PortKey { netns: raw.netns, port: raw.port.into() };
                let shared = self.listeners.values().any(|other| {
                    other.raw.queue.closed == 0 && (other.raw.netns, other.raw.port) == (raw.netns, raw.port)
                });
                if !shared {
                    let _unix_has_none = self.maps.ports.remove(&port);
                }
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

    /// Attributes a namespace's overflows to a listener where that is certain: where it has dropped nothing, or the
    /// namespace no more than it alone.
    fn attribute_overflows(&self, listeners: &mut [(u32, Listener)]) {
        let namespaces = self.live.keys().filter_map(|&pid| Some((process::network_namespace(pid)?, pid)));
        let namespaces: HashMap<u32, u32> = namespaces.collect();
        let grown: HashMap<u32, ListenDrops> = namespaces
            .into_iter()
            .filter_map(|(netns, pid)| {
                Some((netns, drops::of_namespace(pid)? - *self.drops_before.get(&netns)?))
            })
            .collect();
        for (netns, listener) in listeners.iter_mut().filter(|(_, listener)| listener.protocol == "tcp") {
            listener.overflows = match grown.get(netns) {
                _ if listener.drops == 0 => Some(0),
                Some(namespace) if namespace.drops == u64::from(listener.drops) => Some(namespace.overflows),
                _ => None,
            };
        }
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
        for (tid, raw) in entries::<u32, RawReactor>(&self.maps.reactors) {
            let name = self.names.get(&tid).map(|(_, name)| name.clone()).unwrap_or_default();
            let reactor = reactor::decode(tid, name, &raw, clock::monotonic_ns());
            reactors.entry(raw.tgid).or_default().push(reactor);
        }
        let mut listeners = BTreeMap::<u32, Vec<Listener>>::new();
        let mut decoded: Vec<_> = self
            .listeners
            .values()
            .map(|known| (known.raw.netns, listener::decode(&known.raw, known.before, self.attached_ns)))
            .collect();
        self.attribute_overflows(&mut decoded);
        for (known, (_, figures)) in self.listeners.values().zip(decoded) {
            listeners.entry(self.owner(&known.raw)).or_default().push(figures);
        }
        let processes = self.exited.iter().map(|p| (p, true)).chain(self.live.values().map(|p| (p, false)));
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
