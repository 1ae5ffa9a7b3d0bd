//! The listeners of an observation: found, looked at, and let go when they close.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
};

use anyhow::Result;
use aya::Ebpf;
use nix::libc;
use observer_common::{
    accept::PortKey,
    listener::{Listener as RawListener, Queue},
};

use super::{
    missing::MissingSources,
    round_robin::RoundRobin,
    targets::{EXITED_LIMIT, Targets},
};
use crate::{
    kernel::clock,
    model::snapshot::Listener,
    probes::{
        self, Types, When,
        listener::{self, Before},
    },
    process::{
        self, Process,
        drops::{self, ListenDrops},
    },
    read::{
        entries::{NO_EXIST, entries},
        maps::Maps,
    },
};

/// How often to look at listeners until none drops connections between that and a look at its namespace's counters.
const LOOKS: usize = 4;

/// What stands for a port's only listener where there are several.
const SEVERAL_LISTENERS: u64 = 0;

/// What connections to a listener name: network namespace and port, or the name of a unix socket.
type Place = (u32, u16, u64);

fn place(listener: &RawListener) -> Place {
    (listener.netns, listener.port, listener.unix_name)
}

fn port(listener: &RawListener) -> PortKey {
    PortKey { netns: listener.netns, port: listener.port.into() }
}

/// A listener as it was at the last look, and before the first.
struct Known {
    raw: RawListener,
    before: Before,
    /// Connections that it dropped because its queue was full, where that is certain.
    overflows: Option<u64>,
}

impl Known {
    /// What the kernel has dropped because of this listener since it was known.
    const fn drops(&self) -> u32 {
        self.raw.queue.drops.wrapping_sub(self.before.drops)
    }
}

/// The listeners of targets.
#[derive(Default)]
pub(super) struct Listeners {
    /// By inode number.
    known: BTreeMap<u64, Known>,
    /// Since when connections to unix sockets get time stamps; `None` while no target listens on one.
    unix_since_ns: Option<u64>,
    /// Whether listeners found from now on are new: nobody waited there before observer attached.
    is_first_look_done: bool,
    /// Counters of the network namespaces that targets were in at first. Others are taken to have begun at zero,
    /// as they did when they were made: one that is older has more drops than its listeners here, which makes
    /// nothing certain.
    drops_before: HashMap<u32, ListenDrops>,
    /// The network namespace of each target.
    namespaces: BTreeMap<u32, u32>,
    /// Whose namespaces are asked for again next.
    to_recheck: RoundRobin,
}

impl Listeners {
    /// Remembers the counters of the first targets' network namespaces, and forgets those that targets have left:
    /// the kernel gives their numbers to others.
    fn note_namespaces(&mut self, live: &BTreeMap<u32, Process>) {
        self.namespaces.retain(|pid, _| live.contains_key(pid));
        let new = live.keys().filter(|pid| !self.namespaces.contains_key(pid)).copied();
        // Hardly any moves to another: some at a time are asked again.
        let asked: Vec<_> = new.chain(self.to_recheck.next(&self.namespaces)).collect();
        for pid in asked {
            if let Some(netns) = process::network_namespace(pid) {
                self.namespaces.insert(pid, netns);
            }
        }
        if self.is_first_look_done {
            let present: HashSet<u32> = self.namespaces.values().copied().collect();
            self.drops_before.retain(|netns, _| present.contains(netns));
        } else {
            // Each with any process that is in it.
            let present: HashMap<u32, u32> =
                self.namespaces.iter().map(|(&pid, &netns)| (netns, pid)).collect();
            let drops = present.iter().filter_map(|(&netns, &pid)| Some((netns, drops::of_namespace(pid)?)));
            self.drops_before = drops.collect();
        }
    }

    /// The counters of a network namespace now; `None` if no target is in it any more.
    fn drops_now(&self, netns: u32) -> Option<ListenDrops> {
        let mut in_it = self.namespaces.iter().filter(|(_, known)| **known == netns).map(|(&pid, _)| pid);
        drops::of_namespace(in_it.find(|&pid| process::network_namespace(pid) == Some(netns))?)
    }

    /// Brings all listeners up to date, until it is as certain as it can be which of them dropped connections because their
    /// queues were full.
    pub(super) fn refresh(
        &mut self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        missing: &mut MissingSources,
        targets: &Targets,
        targets_changed: bool,
    ) -> Result<()> {
        self.note_namespaces(targets.live());
        if targets_changed {
            listener::find(ebpf)?;
        }
        for _ in 0..LOOKS {
            self.look_at_all(ebpf, maps, missing)?;
            if self.attribute_overflows() {
                break;
            }
        }
        Ok(())
    }

    /// Looks at every accept queue. The programs make entries of listeners that targets open; what new targets brought along has
    /// been searched for, and so have the heirs of listeners whose process is gone.
    fn look_at_all(&mut self, ebpf: &mut Ebpf, maps: &mut Maps, missing: &mut MissingSources) -> Result<()> {
        for (inode, raw) in entries(&maps.listeners) {
            if raw.unix_name != 0 && self.unix_since_ns.is_none() {
                missing.extend(probes::attach(ebpf, &Types::default(), When::UnixListener, &[])?);
                self.unix_since_ns = Some(clock::monotonic_ns());
            }
            listener::look(ebpf, inode)?;
        }
        let mut closed = Vec::new();
        for (inode, raw) in entries(&maps.listeners) {
            let is_first_look = !self.is_first_look_done;
            // A listen call that failed, or a listener so short-lived that there is nothing to tell.
            if raw.queue.closed != 0 && raw.accepts == 0 && !self.known.contains_key(&inode) {
                maps.listeners.remove(&inode)?;
                closed.push(raw);
                continue;
            }
            let known = self.known.entry(inode).or_insert_with(|| Known {
                raw,
                before: if is_first_look { Before::of(&raw.queue) } else { Before::default() },
                overflows: None,
            });
            let last = mem::replace(&mut known.raw, raw);
            if raw.queue.closed != 0 {
                // How deep it was when it closed is not to be known any more; how deep it was before is.
                known.raw.queue = Queue { closed: 1, ..last.queue };
                maps.listeners.remove(&inode)?;
                closed.push(raw);
            }
        }
        end_time_stamps(maps, &closed)?;
        self.is_first_look_done = true;
        let closed: Vec<u64> = self
            .known
            .iter()
            .filter(|(_, known)| known.raw.queue.closed != 0)
            .map(|(&inode, _)| inode)
            .collect();
        for inode in &closed[..closed.len().saturating_sub(EXITED_LIMIT)] {
            self.known.remove(inode);
        }
        Ok(())
    }

    /// Forgets those of processes that are no targets after all, unless a target accepts from them.
    pub(super) fn forget(&mut self, maps: &mut Maps, targets: &Targets, of: &BTreeSet<u32>) -> Result<()> {
        if of.is_empty() {
            return Ok(());
        }
        let mut forgotten = Vec::new();
        for (inode, raw) in entries(&maps.listeners) {
            if of.contains(&raw.owner) && !targets.live().contains_key(&raw.accepter) {
                let _gone = maps.listeners.remove(&inode);
                self.known.remove(&inode);
                forgotten.push(raw);
            }
        }
        end_time_stamps(maps, &forgotten)
    }

    /// All listeners by the process that each is listed with, as of the last refresh.
    pub(super) fn snapshot(&self, targets: &Targets) -> HashMap<u32, Vec<Listener>> {
        let mut listeners = HashMap::<u32, Vec<Listener>>::new();
        for known in self.known.values() {
            let decoded = listener::decode(&known.raw, known.before, self.unix_since_ns);
            let listener = Listener { overflows: known.overflows, ..decoded };
            listeners.entry(owner(&known.raw, targets)).or_default().push(listener);
        }
        listeners
    }

    /// Attributes namespaces' overflows to listeners where that is certain. Returns whether looking again would
    /// make no more certain.
    fn attribute_overflows(&mut self) -> bool {
        let mut dropping = HashMap::<u32, u32>::new();
        for known in self.known.values().filter(|known| known.drops() > 0) {
            *dropping.entry(known.raw.netns).or_default() += 1;
        }
        let grown: HashMap<u32, ListenDrops> = dropping
            .keys()
            .filter_map(|&netns| {
                let before = self.drops_before.get(&netns).copied().unwrap_or_default();
                Some((netns, self.drops_now(netns)?.since(before)?))
            })
            .collect();
        let mut is_final = true;
        for known in self.known.values_mut().filter(|known| i32::from(known.raw.family) != libc::AF_UNIX) {
            let (netns, drops) = (known.raw.netns, known.drops());
            let others_dropped = dropping.get(&netns).is_some_and(|&count| count > 1);
            known.overflows = match grown.get(&netns) {
                _ if drops == 0 => Some(0),
                // What a closed one dropped after the last look is unknown.
                Some(grown) if known.raw.queue.closed == 0 => grown.overflows_of(drops, others_dropped),
                _ => None,
            };
            let is_outrun = grown.get(&netns).is_some_and(|grown| grown.drops > drops.into());
            is_final &= known.overflows.is_some() || others_dropped || !is_outrun;
        }
        is_final
    }
}

/// Ends the time stamps for connections to closed listeners, unless they may be another's. Which others there are, the
/// kernel knows: one may have begun to listen in the same place since the last look.
fn end_time_stamps(maps: &mut Maps, closed: &[RawListener]) -> Result<()> {
    if closed.is_empty() {
        return Ok(());
    }
    let open = open_listeners(maps);
    let mut places = HashMap::new();
    for listener in closed {
        let (place, name) = (place(listener), listener.unix_name);
        match (name, open.get(&place).map_or(&[][..], Vec::as_slice)) {
            (0, []) => {
                let _never_wanted = maps.ports.remove(&port(listener));
            }
            (0, &[only]) => maps.ports.insert(port(listener), only, 0)?,
            (name, []) if name != 0 => {
                let _never_wanted = maps.unix_names.remove(&name);
            }
            _ => {}
        }
        places.insert(place, listener);
    }
    // A listener that put itself in meanwhile was taken out or overwritten; from now on it stays.
    let open = open_listeners(maps);
    for (place, listener) in places {
        match (listener.unix_name, open.get(&place).map_or(&[][..], Vec::as_slice)) {
            (0, []) => {}
            (0, &[only]) => {
                let _there_already = maps.ports.insert(port(listener), only, NO_EXIST);
                if maps.ports.get(&port(listener), 0).is_ok_and(|present| present != only) {
                    maps.ports.insert(port(listener), SEVERAL_LISTENERS, 0)?;
                }
            }
            (0, _) => maps.ports.insert(port(listener), SEVERAL_LISTENERS, 0)?,
            (name, []) => forget_queued(maps, name),
            (name, _) => maps.unix_names.insert(name, 1, 0)?,
        }
    }
    Ok(())
}

/// Keys of the listeners that the kernel knows to be open, by their place.
fn open_listeners(maps: &Maps) -> HashMap<Place, Vec<u64>> {
    let mut open = HashMap::<_, Vec<u64>>::new();
    for (inode, raw) in entries(&maps.listeners) {
        if raw.queue.closed == 0 {
            open.entry(place(&raw)).or_default().push(inode);
        }
    }
    open
}

/// Forgets connections that waited at a unix listener of this name: they are gone without an event.
fn forget_queued(maps: &mut Maps, unix_name: u64) {
    for (address, arrival) in entries(&maps.queued) {
        if arrival.unix_name == unix_name {
            let _accepted = maps.queued.remove(&address);
        }
    }
}

/// Process that a listener is listed with: the one that accepts from it, or else the first that had it open.
/// One that is gone only if there is no other, for a listener may outlive it.
fn owner(raw: &RawListener, targets: &Targets) -> u32 {
    let candidates = [raw.accepter, raw.owner];
    candidates.into_iter().find(|pid| targets.live().contains_key(pid)).unwrap_or(raw.owner)
}

/// Numbers the listeners that share an address, so that each can be told from its siblings.
pub(super) fn numbered(mut listeners: Vec<Listener>) -> Vec<Listener> {
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
