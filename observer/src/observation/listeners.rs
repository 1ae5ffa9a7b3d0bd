//! The listeners of an observation: found, looked at, and let go when they close.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    mem,
};

use anyhow::Result;
use observer_common::{
    accept::PortKey,
    listener::{Listener as RawListener, Queue},
};

use super::{ENDED, Observation};
use crate::{
    kernel::clock,
    model::snapshot::Listener,
    probes::{
        self, Types, When,
        listener::{self, Before},
    },
    process::{
        self,
        drops::{self, ListenDrops},
    },
    read::entries::{NO_EXIST, entries},
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

/// A listener as it was when last looked at, and as it was before.
pub(super) struct Known {
    pub(super) raw: RawListener,
    before: Before,
}

impl Observation {
    /// Remembers the counters of the first targets' network namespaces, and forgets those that targets have left:
    /// the kernel gives their numbers to others.
    pub(super) fn note_namespaces(&mut self) {
        self.namespaces.retain(|pid, _| self.live.contains_key(pid));
        let new = self.live.keys().filter(|pid| !self.namespaces.contains_key(pid)).copied();
        // Hardly any moves to another: some at a time are asked again.
        let asked: Vec<_> = new.chain(self.namespaces_asked.next(&self.namespaces)).collect();
        for pid in asked {
            if let Some(netns) = process::network_namespace(pid) {
                self.namespaces.insert(pid, netns);
            }
        }
        if self.first_look_done {
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

    /// Looks at every accept queue. Listeners that targets opened meanwhile have made their own entries; what new
    /// targets brought along is searched for, and so are heirs of listeners whose process is gone.
    pub(super) fn refresh_listeners(&mut self, targets_changed: bool) -> Result<()> {
        if targets_changed {
            listener::find(&mut self.ebpf)?;
        }
        for (inode, raw) in entries(&self.maps.listeners) {
            if raw.unix_name != 0 && self.unix_since_ns.is_none() {
                self.missing.extend(probes::attach(
                    &mut self.ebpf,
                    &Types::default(),
                    When::UnixListener,
                    &[],
                )?);
                self.unix_since_ns = Some(clock::monotonic_ns());
            }
            listener::look(&mut self.ebpf, inode)?;
        }
        let mut closed = Vec::new();
        for (inode, raw) in entries(&self.maps.listeners) {
            let is_first_look = !self.first_look_done;
            // A listen call that failed, or a listener so short-lived that there is nothing to tell.
            if raw.queue.closed != 0 && raw.accepts == 0 && !self.listeners.contains_key(&inode) {
                self.maps.listeners.remove(&inode)?;
                closed.push(raw);
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
                closed.push(raw);
            }
        }
        self.end_time_stamps(&closed)?;
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

    /// Ends the time stamps for connections to closed listeners, unless they may be another's. Which others there are, the
    /// kernel knows: one may have begun to listen in the same place since the last look.
    fn end_time_stamps(&mut self, closed: &[RawListener]) -> Result<()> {
        if closed.is_empty() {
            return Ok(());
        }
        let open = self.open_listeners();
        let mut places = HashMap::new();
        for listener in closed {
            let (place, name) = (place(listener), listener.unix_name);
            match (name, open.get(&place).map_or(&[][..], Vec::as_slice)) {
                (0, []) => {
                    let _never_wanted = self.maps.ports.remove(&port(listener));
                }
                (0, &[only]) => self.maps.ports.insert(port(listener), only, 0)?,
                (name, []) if name != 0 => {
                    let _never_wanted = self.maps.unix_names.remove(&name);
                }
                _ => {}
            }
            places.insert(place, listener);
        }
        // A listener that put itself in meanwhile was taken out or overwritten; from now on it stays.
        let open = self.open_listeners();
        for (place, listener) in places {
            match (listener.unix_name, open.get(&place).map_or(&[][..], Vec::as_slice)) {
                (0, []) => {}
                (0, &[only]) => {
                    let _there_already = self.maps.ports.insert(port(listener), only, NO_EXIST);
                    if self.maps.ports.get(&port(listener), 0).is_ok_and(|present| present != only) {
                        self.maps.ports.insert(port(listener), SEVERAL_LISTENERS, 0)?;
                    }
                }
                (0, _) => self.maps.ports.insert(port(listener), SEVERAL_LISTENERS, 0)?,
                (name, []) => self.forget_queued(name),
                (name, _) => self.maps.unix_names.insert(name, 1, 0)?,
            }
        }
        Ok(())
    }

    /// Keys of the listeners that the kernel knows to be open, by their place.
    fn open_listeners(&self) -> HashMap<Place, Vec<u64>> {
        let mut open = HashMap::<_, Vec<u64>>::new();
        for (inode, raw) in entries(&self.maps.listeners) {
            if raw.queue.closed == 0 {
                open.entry(place(&raw)).or_default().push(inode);
            }
        }
        open
    }

    /// Forgets connections that waited at a unix listener of this name: they are gone without an event.
    fn forget_queued(&mut self, unix_name: u64) {
        for (address, arrival) in entries(&self.maps.queued) {
            if arrival.unix_name == unix_name {
                let _accepted = self.maps.queued.remove(&address);
            }
        }
    }

    /// Forgets those of processes that are no targets after all, unless a target accepts from them.
    pub(super) fn forget_listeners(&mut self, of: &BTreeSet<u32>) -> Result<()> {
        let mut forgotten = Vec::new();
        for (inode, raw) in entries(&self.maps.listeners) {
            if of.contains(&raw.owner) && !self.live.contains_key(&raw.accepter) {
                let _gone = self.maps.listeners.remove(&inode);
                self.listeners.remove(&inode);
                forgotten.push(raw);
            }
        }
        self.end_time_stamps(&forgotten)
    }

    /// Figures of all listeners, in the order in which they are known.
    pub(super) fn decode_listeners(&mut self) -> Result<Vec<Listener>> {
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
        let grown: HashMap<u32, ListenDrops> = dropping
            .keys()
            .filter_map(|&netns| {
                let before = self.drops_before.get(&netns).copied().unwrap_or_default();
                Some((netns, self.drops_now(netns)?.since(before)?))
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
    pub(super) fn owner(&self, raw: &RawListener) -> u32 {
        let candidates = [raw.accepter, raw.owner];
        candidates.into_iter().find(|pid| self.live.contains_key(pid)).unwrap_or(raw.owner)
    }
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
