//! The deferred work of an observation: whose is followed, what it is called, and which request each piece is due to.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    mem,
    sync::Arc,
    time::Instant,
};

use anyhow::{Result, anyhow};
use aya::Ebpf;
use observer_common::{
    deferred::{Class as RawClass, ClassKey, Link as RawLink},
    origin::{Connection, Descriptor},
};

use crate::{
    kernel::{clock, detach},
    model::{
        deferred::{Deferred, HookFigures, Link},
        histogram::seconds,
        request::Request,
        snapshot::Missing,
        trace::{Event, Events, What, Work},
    },
    probes::{
        deferred::{self, Attached, Shared},
        origin,
    },
    process::{
        connections, context,
        hooks::{Copy, Finder},
        is_there,
        runtime::{Runtime, Runtimes},
    },
    profiles,
    read::{
        capacity::Capacity,
        entries::{entries, insert_new},
        maps::Maps,
    },
    stacks::{mappings::Mappings, naming::Naming, task_names::TaskNames},
};

/// How often a process without a runtime, or without trace contexts, is looked at: its loader may not have been done.
const LOOKS: u32 = 5;

/// Requests, and pieces of work that are over, that are kept for the report; of each the latest so many.
const KEPT: usize = 32_768;

/// Names of kinds of work that are remembered for each process.
const NAMES: usize = 1024;

/// How often a process may come to the places of a profile that nobody asked for by name, a second: each time costs it
/// about 2 us, all of them 5 % of a CPU.
const HITS_PER_SECOND_LIMIT: u64 = 25_000;

/// How often in a row it may be more than that.
const PATIENCE: u32 = 3;

/// Whose deferred work is followed.
#[derive(Default)]
pub(super) struct Follower {
    /// Whether it is followed only where that costs little.
    is_limited: bool,
    /// By process id.
    processes: HashMap<u32, Process>,
    /// Of these, the ones whose connections have not been looked at.
    new: HashSet<u32>,
    /// Whether the kernel has taken the programs; `None` while nobody needs them.
    loaded: Option<Result<(), String>>,
    shared: Shared,
    names: TaskNames,
    /// How many spaces of keys have been given out.
    spaces: u32,
    requests: Requests,
    /// Pieces of work that are over, each with its process and what its kind is called.
    links: VecDeque<(u32, Arc<str>, Link)>,
    /// What somebody wants to trace; `None` if nobody does.
    events: Option<Events>,
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
    /// Runtimes that were looked at closely, by profile and address: a copy of one may be loaded later.
    tried: HashSet<(String, u64)>,
    hooks: Vec<Attached>,
    /// How often it had come to them when last looked at, and when that was.
    hits: Option<(u64, Instant)>,
    /// How often in a row it has come there too often.
    excesses: u32,
    /// Whether it publishes trace contexts, as far as is known.
    publishes: bool,
    /// What its kinds of work are called.
    names: HashMap<ClassKey, Arc<str>>,
    /// Spaces of its keys, by number.
    spaces: HashMap<u64, Space>,
}

/// Work whose kind is not told where it is put off.
struct Space {
    /// What it is called.
    work: String,
    /// Whether its kind is told when it starts.
    is_kind_known_later: bool,
}

impl Process {
    /// Metrics of the places in its runtime, and how often tasks started that were not known.
    fn hook_figures(&self, maps: &Maps) -> (Vec<HookFigures>, u64) {
        let mut hooks = Vec::<HookFigures>::new();
        let mut unmatched = 0;
        for hook in &self.hooks {
            let figures = hook.figures(maps);
            if hook.is_restore() {
                unmatched += figures.hits.saturating_sub(figures.matches);
            }
            match hooks.iter_mut().find(|known| known.is_of_same_place(&figures)) {
                Some(known) => known.add(&figures),
                None => hooks.push(figures),
            }
        }
        (hooks, unmatched)
    }

    /// The name of a kind of task, if it has been made; that of unknown ones where no more names are kept.
    fn known_name(&self, class: ClassKey) -> Option<Arc<str>> {
        let name = self.names.get(&class).cloned();
        name.or_else(|| (self.names.len() >= NAMES).then(|| UNKNOWN.into()))
    }

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
    /// Follows nobody yet, and later, if it is limited, only where that costs little.
    pub(super) fn new(is_limited: bool, capacity: Capacity) -> Self {
        Self { is_limited, shared: Shared::with_extractors(capacity.extractors()), ..Self::default() }
    }

    /// Brings a target up to date, which has started so many programs by now. Tells what goes unseen.
    pub(super) fn refresh(
        &mut self,
        runtimes: &mut Runtimes,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        pid: u32,
        execs: u32,
    ) -> Vec<Missing> {
        if self.processes.get(&pid).is_some_and(|process| process.execs != execs) {
            // What the program before it did is not its own, and what comes next is not to be counted twice.
            self.end(maps, pid);
            detach::finish(pid);
        }
        let process = self.processes.entry(pid).or_insert_with(|| Process { execs, ..Process::default() });
        if !process.hooks.is_empty()
            && let Some(missing) = self.limit(maps, pid)
        {
            return vec![missing];
        }
        let Some(process) = self.processes.get_mut(&pid) else { return Vec::new() };
        if process.looks == LOOKS {
            return Vec::new();
        }
        // Processes that come and go in great numbers are let alone while those before them are let go: else there would be
        // ever more of them, and nothing else would be done.
        // And what is mapped now is of the program that it runs now.
        if detach::is_busy() || maps.execs(pid) != Some(execs) {
            return Vec::new();
        }
        process.looks += 1;
        let followed = process.hooks.len();
        // One that is going has nothing mapped any more.
        let Ok(mappings) = Mappings::of(pid) else { return Vec::new() };
        let mut found = runtimes.of(&mappings);
        found.retain(|runtime| !runtime.profile.hooks.is_empty());
        let mut missing = Vec::new();
        for (at, runtime) in found.iter().enumerate() {
            let process = self.processes.entry(pid).or_default();
            if !process.tried.insert((runtime.profile.name.clone(), runtime.module.address.0)) {
                continue;
            }
            let copies = |found: &[Runtime]| {
                found.iter().filter(|copy| Arc::ptr_eq(&copy.profile, &runtime.profile)).count()
            };
            let copy = Copy { number: copies(&found[..at]), of: copies(&found) };
            if let Err(why) = self.follow(ebpf, maps, &mappings, runtime, copy)
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
                // Nobody follows it: its requests need not be kept.
                let _unless_tried = maps.followed.remove(&pid);
            } else if !process.publishes || process.hooks.len() > followed {
                process.find_context(maps, &mappings);
            }
        }
        missing
    }

    /// Follows a process no longer if that costs it too much.
    fn limit(&mut self, maps: &mut Maps, pid: u32) -> Option<Missing> {
        let process = self.processes.get_mut(&pid).filter(|_| self.is_limited)?;
        let hits = process.hooks.iter().map(|hook| hook.figures(maps).hits).sum::<u64>();
        let (before, since) = process.hits.replace((hits, Instant::now()))?;
        let milliseconds = u64::try_from(since.elapsed().as_millis()).ok()?.max(1);
        let rate = hits.saturating_sub(before) * 1000 / milliseconds;
        process.excesses = if rate > HITS_PER_SECOND_LIMIT { process.excesses + 1 } else { 0 };
        if process.excesses < PATIENCE {
            return None;
        }
        let (execs, profile) = (process.execs, process.hooks.first()?.profile().to_owned());
        self.end(maps, pid);
        self.processes.insert(pid, Process { execs, looks: LOOKS, ..Process::default() });
        Some(Missing {
            source: format!("deferred work of process {pid}"),
            reason: format!(
                "{rate} traps a second into the kernel would cost it {} % of a CPU; {} follows it all the same",
                rate / 5_000,
                profiles::insistence(&profile)
            ),
        })
    }

    /// Attaches to all places of a runtime, or to none: half of them would tell half-truths.
    fn follow(
        &mut self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        mappings: &Mappings,
        runtime: &Runtime,
        copy: Copy,
    ) -> Result<()> {
        let pid = mappings.pid;
        let loaded =
            self.loaded.get_or_insert_with(|| deferred::load(ebpf).map_err(|error| format!("{error:#}")));
        loaded.clone().map_err(|why| anyhow!(why))?;
        let finder = Finder::of(mappings, runtime, copy).map_err(|why| anyhow!(why))?;
        let profile = &runtime.profile;
        let found = finder.all().map_err(|why| anyhow!(why))?;
        let spaces: HashSet<&str> = found.iter().map(|found| found.hook.space.as_str()).collect();
        let mut numbers = HashMap::new();
        for space in spaces {
            self.spaces += 1;
            numbers.insert(space, self.spaces);
        }
        insert_new(&mut maps.classes, deferred::others(pid), RawClass::EMPTY)?;
        maps.followed.insert(pid, 1, 0)?;
        if found.iter().flat_map(|found| &found.hook.class).any(|case| case.named.is_interpreted())
            && let Err(why) = self.names.prepare(pid)
        {
            log::debug!("names in process {pid} are not known: {why:#}");
        }
        let mut attached = Vec::new();
        // The end first: of whatever is seen to begin the end is seen, too.
        for found in found.iter().rev() {
            let space = numbers[found.hook.space.as_str()];
            match Attached::to(ebpf, maps, &mut self.shared, pid, &profile.name, found, space) {
                Ok(hook) => attached.push(hook),
                Err(error) => {
                    attached.into_iter().for_each(|hook| hook.detach(maps, &mut self.shared));
                    return Err(error.context(found.name.clone()));
                }
            }
        }
        let process = self.processes.entry(pid).or_default();
        process.hooks.extend(attached.into_iter().rev());
        let is_kind_known_later = found.iter().any(|found| found.hook.tells_later());
        let work = format!("{} work", profile.name);
        let spaces = numbers.values().map(|&n| (n.into(), Space { work: work.clone(), is_kind_known_later }));
        process.spaces.extend(spaces);
        self.new.insert(pid);
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
        self.name_new(maps);
        // What refers to requests first: those were passed on before it, and so are among those fetched after.
        let (answers, links) = (maps.answers(), maps.links());
        for raw in maps.requests() {
            self.requests.add(raw.id, origin::decode(&raw));
        }
        for raw in answers {
            if let Some(request) = self.requests.by_number.get(&raw.request) {
                // It may have been told with the request, too.
                let _the_same = request.answered.set(raw.answered_ns);
            }
        }
        for raw in links {
            self.link(&raw);
        }
    }

    /// From now on keeps what can be traced.
    pub(super) fn trace(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// What can be traced since the last time.
    pub(super) fn events(&mut self) -> VecDeque<Event> {
        self.events.as_mut().map(Events::take).unwrap_or_default()
    }

    /// Something happened in a process.
    pub(super) fn happened(&mut self, pid: u32, what: impl FnOnce() -> What) {
        if let Some(events) = &mut self.events {
            events.add(Event { pid, what: what() });
        }
    }

    /// Makes names of kinds of work that were met for the first time.
    pub(super) fn name_new(&mut self, maps: &mut Maps) {
        for class in maps.kinds() {
            self.name(class);
        }
    }

    fn link(&mut self, raw: &RawLink) {
        let pid = raw.class.tgid;
        let task = self.name(raw.class);
        // One that nobody told of was counted as lost.
        let Some(request) = self.requests.by_number.get(&raw.request).cloned() else { return };
        let has_started = raw.started_ns != 0;
        let waited_until = if has_started { raw.started_ns } else { raw.ended_ns };
        let parent = (raw.parent != 0).then_some(raw.parent);
        self.happened(pid, || {
            let work = Work {
                id: raw.id,
                parent,
                context: deferred::context(&raw.context),
                request_id: deferred::request_id(raw.request_id),
                task: Arc::clone(&task),
                queued_ns: raw.queued_ns,
                started_ns: has_started.then_some(raw.started_ns),
                ended_ns: raw.ended_ns,
            };
            What::Work(Arc::clone(&request), work)
        });
        let link = Link {
            id: raw.id,
            parent,
            origin: request,
            context: deferred::context(&raw.context),
            request_id: deferred::request_id(raw.request_id),
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
            process.spaces.get(&class.value).map_or(UNKNOWN.into(), |space| space.work.as_str().into())
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

    /// Whether this is work of one kind, and not of any.
    fn is_kind_known(&self, class: ClassKey) -> bool {
        let space = self.processes.get(&class.tgid).and_then(|process| process.spaces.get(&class.value));
        match class.naming {
            ClassKey::OTHERS => false,
            0 => space.is_some_and(|space| !space.is_kind_known_later),
            _ => true,
        }
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

    /// What is known of a live target's deferred work. Kinds that have no name yet are left out: the next refresh makes names.
    fn figures(&self, maps: &Maps, pid: u32) -> Figures {
        let followed = self.processes.get(&pid).filter(|process| !process.hooks.is_empty());
        let Some(process) = followed else { return Figures::default() };
        let (hooks, unmatched) = process.hook_figures(maps);
        let of_process = entries(&maps.classes).into_iter().filter(|(key, _)| key.tgid == pid);
        let mut classes = BTreeMap::<Arc<str>, (RawClass, Option<u64>, bool)>::new();
        let mut is_waiting = false;
        for (key, raw) in of_process {
            let Some(name) = process.known_name(key) else { continue };
            is_waiting |= raw.pending > 0;
            let (sum, _, is_kind_known) = classes.entry(name).or_insert((RawClass::EMPTY, None, true));
            deferred::add(sum, &raw);
            *is_kind_known &= self.is_kind_known(key);
        }
        if is_waiting {
            for (_, raw_task) in entries(&maps.tasks).iter().filter(|entry| deferred::waits(entry, pid)) {
                let of_kind = process.known_name(raw_task.class).and_then(|name| classes.get_mut(&name));
                if let Some((_, oldest, _)) = of_kind {
                    *oldest =
                        Some(oldest.map_or(raw_task.queued_ns, |oldest| oldest.min(raw_task.queued_ns)));
                }
            }
        }
        let deferred = classes
            .into_iter()
            .filter(|(_, (raw, ..))| raw.enqueued > 0 || raw.pending > 0)
            .map(|(name, (raw, oldest, is_kind_known))| deferred::decode(&name, is_kind_known, &raw, oldest))
            .collect();
        Figures { deferred, hooks, unmatched }
    }

    /// Places in the runtime of a target that never meant anything, though the process came there often.
    pub(super) fn unmatched_hooks(&self, maps: &Maps, pid: u32) -> Vec<HookFigures> {
        let Some(process) = self.processes.get(&pid) else { return Vec::new() };
        let (hooks, _) = process.hook_figures(maps);
        let enqueued = |profile: &str| {
            let snapshots = hooks.iter().filter(|hook| hook.verb == "snapshot" && hook.profile == profile);
            snapshots.map(|hook| hook.matches).sum()
        };
        hooks.iter().filter(|hook| hook.never_matches(enqueued(&hook.profile))).cloned().collect()
    }

    /// Adds the pieces that are over to a live target's figures.
    pub(super) fn add_links(&self, pid: u32, deferred: &mut [Deferred]) {
        for (_, task, link) in self.links.iter().filter(|(of, ..)| *of == pid) {
            if let Some(kind) = deferred.iter_mut().find(|kind| kind.task == **task) {
                kind.links.push(link.clone());
            }
        }
    }

    /// What is known of a target, final if it has exited.
    pub(super) fn latest_figures(&self, maps: &Maps, pid: u32, has_exited: bool) -> Figures {
        if !has_exited {
            return self.figures(maps, pid);
        }
        let found = self.finished.iter().rev().find(|(of, _)| *of == pid);
        found.map(|(_, figures)| figures.clone()).unwrap_or_default()
    }

    /// A target is gone; of so many such the final figures are kept.
    pub(super) fn exited(&mut self, maps: &mut Maps, pid: u32, keep: usize) {
        if self.processes.contains_key(&pid) {
            self.orphan(maps, pid);
            self.name_all(maps);
            let mut figures = self.figures(maps, pid);
            self.add_links(pid, &mut figures.deferred);
            self.links.retain(|(of, ..)| *of != pid);
            self.finished.push((pid, figures));
            let surplus = self.finished.len().saturating_sub(keep);
            self.finished.drain(..surplus);
            self.end(maps, pid);
        }
    }

    /// Follows a process no longer that goes on.
    pub(super) fn let_go(&mut self, maps: &mut Maps, pid: u32) {
        self.links.retain(|(of, ..)| *of != pid);
        self.end(maps, pid);
    }

    /// Counts what a process that is gone will never do.
    fn orphan(&mut self, maps: &mut Maps, pid: u32) {
        let now = clock::monotonic_ns();
        self.collect(maps);
        for (key, raw_task) in entries(&maps.tasks).into_iter().filter(|(key, _)| key.tgid == pid) {
            if let Some(link) = deferred::orphan(&raw_task, now) {
                if let Ok(mut class) = maps.classes.get(&raw_task.class, 0) {
                    class.orphaned += 1;
                    class.pending = class.pending.saturating_sub(1);
                    class.enqueued += u64::from(raw_task.class.naming == 0);
                    let _present = maps.classes.insert(raw_task.class, class, EXIST);
                }
                self.link(&link);
            }
            let _present = maps.tasks.remove(&key);
        }
    }

    /// Ends what is known of a process, here and in the kernel.
    fn end(&mut self, maps: &mut Maps, pid: u32) {
        if let Some(process) = self.processes.remove(&pid) {
            for hook in process.hooks {
                hook.detach(maps, &mut self.shared);
            }
            self.shared.forget(pid);
        }
        self.names.forget(pid);
        if self.loaded.is_none() {
            return;
        }
        let _unless_followed = maps.followed.remove(&pid);
        for (key, _) in entries(&maps.tasks).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _present = maps.tasks.remove(&key);
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
