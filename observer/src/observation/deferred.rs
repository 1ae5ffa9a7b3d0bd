//! The deferred work of an observation: whose is followed, what it is called, and which request each piece is due to.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    mem,
    sync::Arc,
};

use anyhow::{Result, anyhow};
use aya::Ebpf;
use observer_common::{
    deferred::{Class as RawClass, ClassKey, Link as RawLink},
    origin::{Connection, Descriptor},
};

use crate::{
    kernel::clock,
    model::{
        deferred::{Deferred, HookFigures, Link},
        histogram::seconds,
        request::Request,
        snapshot::Missing,
    },
    probes::{
        deferred::{self, Attached, Recipes},
        origin,
    },
    profiles::{Hook, Naming},
    read::maps::{Maps, entries, insert_new},
    stacks::{mappings::Mappings, naming::Names},
    target::{
        connections, context,
        hooks::Finder,
        process::is_there,
        runtime::{Runtime, Runtimes},
    },
};

/// How often a process without a runtime, or without trace contexts, is looked at: its loader may not have been done.
const LOOKS: u32 = 5;

/// Requests, and pieces of work that are over, that are kept for the report; of each the latest so many.
const KEPT: usize = 32_768;

/// Names of kinds of work that are remembered for each process.
const NAMES: usize = 1024;

/// Whose deferred work is followed.
#[derive(Default)]
pub(super) struct Follower {
    /// By process id.
    processes: HashMap<u32, Process>,
    /// Of these, the ones whose connections have not been looked at.
    new: Vec<u32>,
    /// Whether the kernel has taken the programs; `None` while nobody needs them.
    loaded: Option<Result<(), String>>,
    recipes: Recipes,
    names: Names,
    /// How many spaces of keys have been given out.
    spaces: u32,
    requests: Requests,
    /// Pieces of work that are over, each with its process and what its kind is called.
    links: VecDeque<(u32, Arc<str>, Link)>,
    /// Final figures of processes that are gone, by their ids.
    finished: Vec<(u32, Figures)>,
}

/// Figures of one process.
#[derive(Clone, Default)]
pub(super) struct Figures {
    pub(super) deferred: Vec<Deferred>,
    pub(super) hooks: Vec<HookFigures>,
    /// Times that work went on which was not known to have been put off.
    pub(super) unmatched: u64,
}

/// A target.
#[derive(Default)]
struct Process {
    /// How many programs it had started when it was looked at.
    execs: u32,
    /// How often it has been looked at.
    looks: u32,
    hooks: Vec<Attached>,
    /// Whether it publishes trace contexts, as far as is known.
    publishes: bool,
    /// What its kinds of work are called.
    names: HashMap<ClassKey, Arc<str>>,
    /// What work is called whose kind is not told, by its space.
    spaces: HashMap<u64, String>,
}

impl Process {
    /// Has the programs keep what this process publishes, if it does.
    fn find_context(&mut self, maps: &mut Maps, mappings: &Mappings) {
        let Some(pointer) = context::published(mappings) else { return };
        self.publishes = true;
        for hook in self.hooks.iter().filter(|hook| hook.is_snapshot()) {
            if let Err(why) = hook.take_context(maps, pointer) {
                log::debug!("the trace contexts of process {} are not kept: {why:#}", mappings.pid);
            }
        }
    }
}

/// The latest requests, by number.
#[derive(Default)]
struct Requests {
    by_number: HashMap<u64, Arc<Request>>,
    order: VecDeque<u64>,
}

impl Requests {
    fn add(&mut self, number: u64, request: Request) {
        if self.by_number.insert(number, Arc::new(request)).is_none() {
            self.order.push_back(number);
        }
        if self.order.len() > KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_number.remove(&oldest);
        }
    }
}

impl Follower {
    /// Brings a target up to date, which has started so many programs by now. Tells what
    /// goes unseen.
    pub(super) fn refresh(
        &mut self,
        runtimes: &mut Runtimes,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        pid: u32,
        execs: u32,
    ) -> Vec<Missing> {
        if self.processes.get(&pid).is_some_and(|process| process.execs != execs) {
            // What the program before it did is not its own.
            self.end(maps, pid);
        }
        let process = self.processes.entry(pid).or_insert_with(|| Process { execs, ..Process::default() });
        if process.publishes || process.looks == LOOKS {
            return Vec::new();
        }
        process.looks += 1;
        // One that is going has nothing mapped any more.
        let Ok(mappings) = Mappings::of(pid) else { return Vec::new() };
        if !process.hooks.is_empty() {
            process.find_context(maps, &mappings);
            return Vec::new();
        }
        let found = runtimes.of(&mappings);
        let mut missing = Vec::new();
        for runtime in found.iter().filter(|runtime| !runtime.profile.hooks.is_empty()) {
            if let Err(why) = self.follow(ebpf, maps, &mappings, runtime)
                && is_there(pid)
            {
                missing.push(Missing {
                    source: format!("deferred work of {}", runtime.name),
                    reason: format!("{why:#}"),
                });
            }
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            if process.hooks.is_empty() {
                if !missing.is_empty() {
                    process.looks = LOOKS;
                }
            } else {
                process.find_context(maps, &mappings);
            }
        }
        missing
    }

    /// Attaches to all places of a runtime, or to none: half of them would tell half-truths.
    fn follow(
        &mut self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        mappings: &Mappings,
        runtime: &Runtime,
    ) -> Result<()> {
        let pid = mappings.pid;
        let loaded =
            self.loaded.get_or_insert_with(|| deferred::load(ebpf).map_err(|error| format!("{error:#}")));
        loaded.clone().map_err(|why| anyhow!(why))?;
        let finder = Finder::of(mappings, runtime).map_err(|why| anyhow!(why))?;
        let version = finder.version().map_err(|why| anyhow!(why))?;
        let profile = &runtime.profile;
        let mut wanted = Vec::<&Hook>::new();
        for hook in profile.hooks.iter().filter(|hook| hook.is_in(version.as_deref())) {
            if finder.is_needed(hook).map_err(|why| anyhow!(why))? {
                wanted.push(hook);
            }
        }
        if wanted.is_empty() {
            let version = version.unwrap_or_default();
            return Err(anyhow!("how version {version} puts work off is not known"));
        }
        let found = wanted.iter().map(|hook| (hook.optional, finder.find(hook)));
        let found = found.filter(|(optional, found)| !optional || found.is_ok()).map(|(_, found)| found);
        let found = found.collect::<Result<Vec<_>, _>>().map_err(|why| anyhow!(why))?;
        let spaces: HashSet<&str> = wanted.iter().map(|hook| hook.space.as_str()).collect();
        let mut numbers = HashMap::new();
        for space in spaces {
            self.spaces += 1;
            numbers.insert(space, self.spaces);
        }
        insert_new(&mut maps.classes, deferred::others(pid), RawClass::EMPTY)?;
        maps.followed.insert(pid, 1, 0)?;
        let mut attached = Vec::new();
        // The end first: of whatever is seen to begin the end is seen, too.
        for found in found.iter().rev() {
            let space = numbers[found.hook.space.as_str()];
            match Attached::to(ebpf, maps, &mut self.recipes, pid, &profile.name, found, space) {
                Ok(hook) => attached.push(hook),
                Err(error) => {
                    attached.into_iter().for_each(|hook| hook.detach(maps, &mut self.recipes));
                    return Err(error.context(found.name.clone()));
                }
            }
        }
        let process = self.processes.entry(pid).or_default();
        process.hooks.extend(attached.into_iter().rev());
        process.spaces.extend(numbers.values().map(|&number| (number.into(), profile.name.clone())));
        self.new.push(pid);
        Ok(())
    }

    /// Adds the connections that processes had accepted before they were followed, now that their listeners are known.
    pub(super) fn adopt_connections(&mut self, maps: &mut Maps) {
        for pid in mem::take(&mut self.new) {
            let tcp = entries(&maps.listeners).into_iter().filter(|(_, raw)| raw.unix_name == 0);
            let ports = tcp.map(|(_, raw)| raw.port).collect();
            for (fd, inode) in connections::accepted(pid, &ports) {
                let connection = Connection { inode, ..Connection::default() };
                // Accepted meanwhile, it is there already; where there is no room, others are counted as lost.
                let _no_matter = insert_new(&mut maps.connections, Descriptor { tgid: pid, fd }, connection);
            }
        }
    }

    /// Takes in what the programs have passed on.
    pub(super) fn collect(&mut self, maps: &mut Maps) {
        // What is over first: its request was passed on before it, and so is among those fetched after.
        let links = maps.links();
        for raw in maps.requests() {
            self.requests.add(raw.id, origin::decode(&raw));
        }
        for raw in links {
            self.link(&raw);
        }
    }

    fn link(&mut self, raw: &RawLink) {
        let pid = raw.class.tgid;
        let task = self.name(raw.class);
        // One that nobody told of was counted as lost.
        let Some(request) = self.requests.by_number.get(&raw.request) else { return };
        let has_started = raw.started_ns != 0;
        let waited_until = if has_started { raw.started_ns } else { raw.ended_ns };
        let link = Link {
            id: raw.id,
            parent: (raw.parent != 0).then_some(raw.parent),
            origin: Arc::clone(request),
            context: deferred::context(&raw.context),
            queued_ns: raw.queued_ns,
            wait_seconds: seconds(waited_until.saturating_sub(raw.queued_ns)),
            run_seconds: has_started.then(|| seconds(raw.ended_ns.saturating_sub(raw.started_ns))),
        };
        self.links.push_back((pid, task, link));
        if self.links.len() > KEPT {
            self.links.pop_front();
        }
    }

    /// Makes a name of a kind of work, while that is still in the process's memory.
    fn name(&mut self, class: ClassKey) -> Arc<str> {
        let pid = class.tgid;
        let Some(process) = self.processes.get_mut(&pid) else { return UNKNOWN.into() };
        if let Some(name) = process.names.get(&class) {
            return Arc::clone(name);
        }
        let name: Arc<str> = if class.naming == ClassKey::OTHERS {
            "other".into()
        } else if class.naming == 0 {
            process
                .spaces
                .get(&class.value)
                .map_or(UNKNOWN.into(), |profile| format!("{profile} work").into())
        } else {
            let naming = Naming::of(class.naming);
            let named = naming.map(|naming| self.names.of(pid, naming, class.value));
            match named {
                Some(Ok(name)) => name.into(),
                Some(Err(why)) => {
                    log::debug!("what {:#x} of process {pid} is called is not known: {why:#}", class.value);
                    UNKNOWN.into()
                }
                None => UNKNOWN.into(),
            }
        };
        if process.names.len() < NAMES {
            process.names.insert(class, Arc::clone(&name));
        }
        name
    }

    /// The request of this number, if anything tells of it.
    pub(super) fn request(&self, number: u64) -> Option<Arc<Request>> {
        self.requests.by_number.get(&number).cloned()
    }

    /// Makes names of all kinds of work that have none yet: what they are made of may be gone later.
    pub(super) fn name_all(&mut self, maps: &Maps) {
        if self.loaded.is_some() {
            for class in maps.classes.keys().filter_map(Result::ok) {
                self.name(class);
            }
        }
    }

    /// What is known of a live target's deferred work.
    pub(super) fn figures(&mut self, maps: &Maps, pid: u32) -> Figures {
        let followed = self.processes.get(&pid).filter(|process| !process.hooks.is_empty());
        let Some(process) = followed else { return Figures::default() };
        let hooks: Vec<_> =
            process.hooks.iter().map(|hook| (hook.is_restore(), hook.figures(maps))).collect();
        let unmatched = hooks.iter().filter(|(is_restore, _)| *is_restore);
        let unmatched = unmatched.map(|(_, hook)| hook.hits.saturating_sub(hook.matches)).sum();
        let of_process = entries(&maps.classes).into_iter().filter(|(key, _)| key.tgid == pid);
        let mut classes = BTreeMap::<Arc<str>, (RawClass, Option<u64>)>::new();
        let mut is_waiting = false;
        for (key, raw) in of_process {
            is_waiting |= raw.pending > 0;
            let (sum, _) = classes.entry(self.name(key)).or_insert((RawClass::EMPTY, None));
            deferred::add(sum, &raw);
        }
        if is_waiting {
            for (_, unit) in entries(&maps.units).iter().filter(|entry| deferred::waits(entry, pid)) {
                if let Some((_, oldest)) = classes.get_mut(&self.name(unit.class)) {
                    *oldest = Some(oldest.map_or(unit.queued_ns, |oldest| oldest.min(unit.queued_ns)));
                }
            }
        }
        let deferred = classes
            .into_iter()
            .filter(|(_, (raw, _))| raw.enqueued > 0 || raw.pending > 0)
            .map(|(name, (raw, oldest))| deferred::decode(&name, &raw, oldest))
            .collect();
        Figures { deferred, hooks: hooks.into_iter().map(|(_, hook)| hook).collect(), unmatched }
    }

    /// Adds the pieces that are over to a live target's figures.
    pub(super) fn add_links(&self, pid: u32, deferred: &mut [Deferred]) {
        for (_, task, link) in self.links.iter().filter(|(of, ..)| *of == pid) {
            if let Some(kind) = deferred.iter_mut().find(|kind| kind.task == **task) {
                kind.links.push(link.clone());
            }
        }
    }

    /// The same of a target that is gone.
    pub(super) fn final_figures(&self, pid: u32) -> Figures {
        let found = self.finished.iter().rev().find(|(of, _)| *of == pid);
        found.map(|(_, figures)| figures.clone()).unwrap_or_default()
    }

    /// A target is gone; of so many such the final figures are kept.
    pub(super) fn exited(&mut self, maps: &mut Maps, pid: u32, keep: usize) {
        if self.processes.contains_key(&pid) {
            self.orphan(maps, pid);
            let mut figures = self.figures(maps, pid);
            self.add_links(pid, &mut figures.deferred);
            self.links.retain(|(of, ..)| *of != pid);
            self.finished.push((pid, figures));
            let surplus = self.finished.len().saturating_sub(keep);
            self.finished.drain(..surplus);
            self.end(maps, pid);
        }
    }

    /// Counts what a process that is gone will never do.
    fn orphan(&mut self, maps: &mut Maps, pid: u32) {
        let now = clock::monotonic_ns();
        self.collect(maps);
        for (key, unit) in entries(&maps.units).into_iter().filter(|(key, _)| key.tgid == pid) {
            if let Some(link) = deferred::orphan(&unit, now) {
                if let Ok(mut class) = maps.classes.get(&unit.class, 0) {
                    class.orphaned += 1;
                    class.pending = class.pending.saturating_sub(1);
                    class.enqueued += u64::from(unit.class.naming == 0);
                    let _present = maps.classes.insert(unit.class, class, EXIST);
                }
                self.link(&link);
            }
            let _present = maps.units.remove(&key);
        }
    }

    /// Ends what is known of a process, here and in the kernel.
    fn end(&mut self, maps: &mut Maps, pid: u32) {
        if let Some(process) = self.processes.remove(&pid) {
            for hook in process.hooks {
                hook.detach(maps, &mut self.recipes);
            }
        }
        self.names.forget(pid);
        if self.loaded.is_none() {
            return;
        }
        let _unless_followed = maps.followed.remove(&pid);
        for (key, _) in entries(&maps.units).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _present = maps.units.remove(&key);
        }
        for (key, _) in entries(&maps.classes).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _present = maps.classes.remove(&key);
        }
        for (key, _) in entries(&maps.connections).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _present = maps.connections.remove(&key);
        }
    }
}

/// What an insertion does if the key is not there: nothing.
const EXIST: u64 = 2;

/// What a kind of work is called that nobody can name.
const UNKNOWN: &str = "unknown";
