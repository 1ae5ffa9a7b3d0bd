//! The listeners of targets: which exist, and their entries in the maps from first sight to close. `probes/listener.rs`
//! decodes the entries.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
};

use anyhow::Result;
use aya::Ebpf;
use nix::libc;
use observer_common::{
    accept::{MULTIPATH, PortKey},
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

/// Maximum number of readings of all queues in a refresh. They are repeated while a listener drops connections between
/// its reading and that of its namespace's counters.
const READINGS: usize = 4;

/// The address of a listener: network namespace and port, or the name of a unix socket.
type Address = (u32, u16, u64);

fn address(listener: &RawListener) -> Address {
    (listener.netns, listener.port, listener.unix_name)
}

fn port(listener: &RawListener) -> PortKey {
    PortKey { netns: listener.netns, port: listener.port.into() }
}

/// A listener: its state at the last reading, and the baseline from before observer attached.
struct Tracked {
    raw: RawListener,
    before: Before,
    /// Connections and segments that the kernel has dropped because of this listener since it is tracked.
    drops: u32,
    /// Connections that were dropped because its queue was full, where that is certain.
    overflows: Option<u64>,
}

impl Tracked {
    /// Segments that the kernel counts as dropped by this listener since it is tracked.
    const fn counted_drops(&self) -> u32 {
        self.raw.queue.drops.wrapping_sub(self.before.drops)
    }
}

/// The listeners of targets.
#[derive(Default)]
pub(super) struct Listeners {
    /// By inode number.
    known: BTreeMap<u64, Tracked>,
    /// When timestamping of connections to unix sockets began, in monotonic nanoseconds; `None` while no target listens
    /// on one.
    unix_since_ns: Option<u64>,
    /// Whether listeners that are found from now on are new, so that nothing was queued before observer attached.
    is_first_refresh_done: bool,
    /// Drop counters of the network namespaces of the first targets, as of the first refresh. Namespaces that are found
    /// later are assumed to be new, with counters at zero. If such a namespace is older, its counters exceed the drops of
    /// its known listeners, so that no overflow is attributed.
    drops_before: HashMap<u32, ListenDrops>,
    /// The network namespace of each target.
    namespaces: BTreeMap<u32, u32>,
    /// The processes whose namespaces are checked again next.
    to_recheck: RoundRobin<u32>,
}

impl Listeners {
    /// Whether the socket with this inode number is a listener of a target.
    pub(super) fn is_known(&self, inode: u64) -> bool {
        self.known.contains_key(&inode)
    }

    /// Records the counters of the first targets' network namespaces, and forgets namespaces that targets have left:
    /// the kernel reuses their numbers.
    fn note_namespaces(&mut self, live: &BTreeMap<u32, Process>) {
        self.namespaces.retain(|pid, _| live.contains_key(pid));
        let new = live.keys().filter(|pid| !self.namespaces.contains_key(pid)).copied();
        // A process rarely moves to another namespace: some are checked again at each refresh.
        let asked: Vec<_> = new.chain(self.to_recheck.next(&self.namespaces)).collect();
        for pid in asked {
            if let Some(netns) = process::network_namespace(pid) {
                self.namespaces.insert(pid, netns);
            }
        }
        if self.is_first_refresh_done {
            let present: HashSet<u32> = self.namespaces.values().copied().collect();
            self.drops_before.retain(|netns, _| present.contains(netns));
        } else {
            // The counters of a namespace are read through any process in it.
            let present: HashMap<u32, u32> =
                self.namespaces.iter().map(|(&pid, &netns)| (netns, pid)).collect();
            let drops = present.iter().filter_map(|(&netns, &pid)| Some((netns, drops::of_namespace(pid)?)));
            self.drops_before = drops.collect();
        }
    }

    /// Current counters of a network namespace; `None` if no target is in it any more.
    fn drops_now(&self, netns: u32) -> Option<ListenDrops> {
        let mut in_it = self.namespaces.iter().filter(|(_, known)| **known == netns).map(|(&pid, _)| pid);
        drops::of_namespace(in_it.find(|&pid| process::network_namespace(pid) == Some(netns))?)
    }

    /// Updates all listeners. Their queues are read until overflows are attributed with as much certainty as possible.
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
            listener::visit_files(ebpf)?;
        }
        for _ in 0..READINGS {
            self.read_queues(ebpf, maps, missing)?;
            if self.attribute_drops() {
                break;
            }
        }
        Ok(())
    }

    /// Reads every accept queue. The programs have added the listeners that targets opened. [`listener::visit_files`] has found
    /// listeners that new targets had open already, and other processes with listeners whose process has exited.
    fn read_queues(&mut self, ebpf: &mut Ebpf, maps: &mut Maps, missing: &mut MissingSources) -> Result<()> {
        for (inode, raw) in entries(&maps.listeners) {
            if raw.unix_name != 0 && self.unix_since_ns.is_none() {
                missing.extend(probes::attach(ebpf, &Types::default(), When::UnixListener, &[])?);
                self.unix_since_ns = Some(clock::monotonic_ns());
            }
            listener::look(ebpf, inode)?;
        }
        let mut closed = Vec::new();
        for (inode, raw) in entries(&maps.listeners) {
            let is_first_refresh = !self.is_first_refresh_done;
            // A listen call that failed, or a listener that was too short-lived to report.
            if raw.queue.closed != 0 && raw.accepts == 0 && !self.known.contains_key(&inode) {
                maps.listeners.remove(&inode)?;
                closed.push(raw);
                continue;
            }
            let known = self.known.entry(inode).or_insert_with(|| Tracked {
                raw,
                before: if is_first_refresh { Before::of(&raw.queue) } else { Before::default() },
                drops: 0,
                overflows: None,
            });
            let last = mem::replace(&mut known.raw, raw);
            if raw.queue.closed != 0 {
                // The depth at the close is unknown; the last one before it is kept.
                known.raw.queue = Queue { closed: 1, ..last.queue };
                maps.listeners.remove(&inode)?;
                closed.push(raw);
            }
        }
        end_time_stamps(maps, &closed)?;
        self.is_first_refresh_done = true;
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

    /// Forgets the listeners of processes that are not targets, unless a target accepts from them.
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

    /// All listeners as of the last refresh, by the process that each is listed with.
    pub(super) fn snapshot(&self, targets: &Targets) -> HashMap<u32, Vec<Listener>> {
        let mut listeners = HashMap::<u32, Vec<Listener>>::new();
        for known in self.known.values() {
            let decoded = listener::decode(&known.raw, known.before, self.unix_since_ns);
            let listener = Listener { drops: known.drops, overflows: known.overflows, ..decoded };
            listeners.entry(owner(&known.raw, targets)).or_default().push(listener);
        }
        listeners
    }

    /// Attributes the drops and overflows of namespaces to listeners, where that is certain. Returns whether another
    /// reading cannot make more of them certain.
    fn attribute_drops(&mut self) -> bool {
        let mut dropping = HashMap::<u32, u32>::new();
        for known in self.known.values().filter(|known| known.counted_drops() > 0) {
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
            let netns = known.raw.netns;
            let counted = known.counted_drops();
            let certain = match grown.get(&netns) {
                _ if known.raw.queue.defers == 0 => counted,
                Some(grown) if known.raw.queue.closed == 0 => grown.not_deferred(counted),
                _ => 0,
            };
            // What was certain before remains so.
            known.drops = known.drops.max(certain);
            let drops = known.drops;
            let others_dropped = dropping.get(&netns).is_some_and(|&count| count > 1);
            known.overflows = match grown.get(&netns) {
                _ if drops == 0 => Some(0),
                // What a closed listener dropped after the last reading is unknown.
                Some(grown) if known.raw.queue.closed == 0 => grown.overflows_of(drops, others_dropped),
                _ => None,
            };
            let is_ahead = grown.get(&netns).is_some_and(|grown| grown.drops > drops.into());
            is_final &= known.overflows.is_some() || others_dropped || !is_ahead;
        }
        is_final
    }
}

/// Ends the time stamps of connections to closed listeners, unless another listener has the same address. That is read
/// from the map of listeners: another one may have been opened there since the last refresh.
fn end_time_stamps(maps: &mut Maps, closed: &[RawListener]) -> Result<()> {
    if closed.is_empty() {
        return Ok(());
    }
    let open = open_listeners(maps);
    let mut addresses = HashMap::new();
    for listener in closed {
        let (address, name) = (address(listener), listener.unix_name);
        match (name, open.get(&address).map_or(&[][..], Vec::as_slice)) {
            (0, []) => {
                let _absent = maps.ports.remove(&port(listener));
            }
            (0, &[only]) => maps.ports.insert(port(listener), only, 0)?,
            (name, []) if name != 0 => {
                let _absent = maps.unix_names.remove(&name);
            }
            _ => {}
        }
        addresses.insert(address, listener);
    }
    // A listener that was added by the programs meanwhile was removed or overwritten. From now on, it stays.
    let open = open_listeners(maps);
    for (address, listener) in addresses {
        match (listener.unix_name, open.get(&address).map_or(&[][..], Vec::as_slice)) {
            (0, []) => {}
            (0, &[only]) => {
                let _already_present = maps.ports.insert(port(listener), only, NO_EXIST);
                let present = maps.ports.get(&port(listener), 0).ok();
                if let Some(present) = present.filter(|&present| present != only) {
                    maps.ports.insert(port(listener), several(&[present, only]), 0)?;
                }
            }
            (0, open) => maps.ports.insert(port(listener), several(open), 0)?,
            (name, []) => forget_queued(maps, name),
            (name, _) => maps.unix_names.insert(name, 1, 0)?,
        }
    }
    Ok(())
}

/// Value in the map of ports for a port with these listeners, more than one.
fn several(listeners: &[u64]) -> u64 {
    listeners.iter().fold(0, |value, listener| value | listener & MULTIPATH)
}

/// Inode numbers of the open listeners in the map of listeners, by address, with the flag of the map of ports.
fn open_listeners(maps: &Maps) -> HashMap<Address, Vec<u64>> {
    let mut open = HashMap::<_, Vec<u64>>::new();
    for (inode, raw) in entries(&maps.listeners) {
        if raw.queue.closed == 0 {
            open.entry(address(&raw)).or_default().push(if raw.is_multipath() {
                inode | MULTIPATH
            } else {
                inode
            });
        }
    }
    open
}

/// Forgets connections that waited at a unix listener of this name. The kernel has no event for their end.
fn forget_queued(maps: &mut Maps, unix_name: u64) {
    for (address, arrival) in entries(&maps.queued) {
        if arrival.unix_name == unix_name {
            let _accepted = maps.queued.remove(&address);
        }
    }
}

/// Process that a listener is listed with: the one that accepts from it, or else the first that had it open. An exited
/// process only if there is no other, because a listener may outlive it.
fn owner(raw: &RawListener, targets: &Targets) -> u32 {
    let candidates = [raw.accepter, raw.owner];
    candidates.into_iter().find(|pid| targets.live().contains_key(pid)).unwrap_or(raw.owner)
}

/// Numbers the listeners that share an address, to distinguish them.
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
