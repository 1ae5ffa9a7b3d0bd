//! The deferred tasks of targets: attaches to the hooks of their runtimes, names the kinds of tasks and reads their
//! counters. `probes/deferred.rs` decodes the entries.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
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

use super::links::Links;

use crate::{
    binary::mappings::Mappings,
    kernel::{clock, detach},
    model::{
        deferred::{Deferred, HookCounters},
        snapshot::Missing,
    },
    probes::deferred::{self, Attached, Shared},
    process::{
        connections,
        hooks::{Copy, Finder},
        is_there,
        runtime::{Runtime, Runtimes},
        trace_context,
    },
    profiles,
    read::{
        capacity::Capacity,
        entries::{entries, insert_new},
        maps::Maps,
    },
    stacks::{naming::Naming, task_names::TaskNames},
};

/// How many refreshes look for the runtimes and trace contexts of a process: its dynamic loader may not be done at
/// first.
const ATTEMPTS: u32 = 5;

/// Maximum number of names of kinds of tasks, for each process.
const NAMES_LIMIT: usize = 1024;

/// Maximum rate at which a process may hit the hooks of a profile that was not asked for by name, per second. Each hit
/// costs the process about 2 us, so this is 5 % of a CPU.
const HITS_PER_SECOND_LIMIT: u64 = 25_000;

/// Consecutive refreshes above that rate after which a process is no longer tracked.
const EXCESSES_LIMIT: u32 = 3;

/// Tracks the deferred tasks of targets.
#[derive(Default)]
pub(super) struct TaskTracker {
    /// Whether processes whose hooks fire too often are detached, as with `--profile auto`.
    is_limited: bool,
    /// By process id.
    processes: HashMap<u32, Process>,
    /// Of these, processes whose open connections have not been read yet.
    unread: HashSet<u32>,
    /// Whether the kernel has accepted the programs; `None` until they are needed.
    loaded: Option<Result<(), String>>,
    shared: Shared,
    names: TaskNames,
    /// Number of key spaces that have been assigned.
    spaces: u32,
    /// Requests, and tasks that have ended.
    pub(super) links: Links,
    /// Final metrics of exited processes, by process id.
    finished: Vec<(u32, TaskMetrics)>,
}

/// Metrics of one process.
#[derive(Clone, Default)]
pub(super) struct TaskMetrics {
    pub(super) deferred: Vec<Deferred>,
    pub(super) hooks: Vec<HookCounters>,
    /// How often a task ran without a known enqueue.
    pub(super) unmatched: u64,
}

/// A tracked process.
#[derive(Default)]
struct Process {
    /// Number of execs when it was first seen.
    execs: u32,
    /// Number of refreshes that have looked for its runtimes.
    attempts: u32,
    /// Runtimes that were attached to or cannot be, by profile and address. Another copy of a runtime may be loaded
    /// later.
    tried: HashSet<(String, u64)>,
    hooks: Vec<Attached>,
    /// Number of hits at the last refresh, and when that was.
    hits: Option<(u64, Instant)>,
    /// Number of consecutive refreshes above the maximum rate.
    excesses: u32,
    /// Whether it publishes trace contexts, as far as is known.
    publishes: bool,
    /// Names of its kinds of tasks.
    names: HashMap<ClassKey, Arc<str>>,
    /// Key spaces of its runtimes, by number.
    spaces: HashMap<u64, Space>,
}

/// A key space, which stands for the kind of tasks whose kind is unknown when they are enqueued.
struct Space {
    /// Name of such tasks.
    name: String,
    /// Whether their kind is known when they start.
    is_kind_known_later: bool,
}

impl Process {
    /// Counters of its hooks, and how often a task ran without a known enqueue.
    fn hook_counters(&self, maps: &Maps) -> (Vec<HookCounters>, u64) {
        let mut hooks = Vec::<HookCounters>::new();
        let mut unmatched = 0;
        for hook in &self.hooks {
            let counters = hook.figures(maps);
            if hook.is_restore() {
                unmatched += counters.hits.saturating_sub(counters.matches);
            }
            match hooks.iter_mut().find(|known| known.is_of_same_place(&counters)) {
                Some(known) => known.add(&counters),
                None => hooks.push(counters),
            }
        }
        (hooks, unmatched)
    }

    /// Name of a kind, if it has one already; once the limit of names is reached, that of unknown kinds.
    fn known_name(&self, class: ClassKey) -> Option<Arc<str>> {
        let name = self.names.get(&class).cloned();
        name.or_else(|| (self.names.len() >= NAMES_LIMIT).then(|| UNKNOWN.into()))
    }

    /// Has the programs record the trace contexts that this process publishes, if any.
    fn find_context(&mut self, maps: &mut Maps, mappings: &Mappings) {
        let Some(pointer) = trace_context::published(mappings) else { return };
        self.publishes = true;
        for hook in self.hooks.iter().filter(|hook| hook.is_snapshot()) {
            if let Err(why) = hook.attach_context(maps, pointer) {
                log::debug!("cannot record the trace contexts of process {}: {why:#}", mappings.pid);
            }
        }
    }
}

impl TaskTracker {
    /// Tracks no process yet. With `is_limited`, processes whose hooks fire too often are detached later.
    pub(super) fn new(is_limited: bool, capacity: Capacity) -> Self {
        Self { is_limited, shared: Shared::with_extractors(capacity.extractors()), ..Self::default() }
    }

    /// Updates a target that has started `execs` programs so far. Returns what cannot be observed of it.
    pub(super) fn refresh(
        &mut self,
        runtimes: &mut Runtimes,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        pid: u32,
        execs: u32,
    ) -> Vec<Missing> {
        if self.processes.get(&pid).is_some_and(|process| process.execs != execs) {
            // Tasks of the previous program do not count for the new one. The previous breakpoints must be gone, or hits
            // would count twice.
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
        if process.attempts == ATTEMPTS {
            return Vec::new();
        }
        // No process is attached to while others are being detached: if many processes start and exit, the backlog of
        // detachments would only grow. And the mappings that are read next must be those of the current program.
        if detach::is_busy() || maps.execs(pid) != Some(execs) {
            return Vec::new();
        }
        process.attempts += 1;
        let attached_before = process.hooks.len();
        // An exiting process has no mappings any more.
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
            if let Err(why) = self.attach(ebpf, maps, &mappings, runtime, copy)
                && is_there(pid)
            {
                missing.push(Missing {
                    source: format!("deferred tasks of {}", runtime.name),
                    reason: format!("{why:#}"),
                });
            }
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            if process.hooks.is_empty() {
                // Without hooks, its requests need not be recorded.
                let _absent = maps.followed.remove(&pid);
            } else if !process.publishes || process.hooks.len() > attached_before {
                process.find_context(maps, &mappings);
            }
        }
        missing
    }

    /// Stops tracking a process whose hooks fire too often. Returns why.
    fn limit(&mut self, maps: &mut Maps, pid: u32) -> Option<Missing> {
        let process = self.processes.get_mut(&pid).filter(|_| self.is_limited)?;
        let hits = process.hooks.iter().map(|hook| hook.figures(maps).hits).sum::<u64>();
        let (before, since) = process.hits.replace((hits, Instant::now()))?;
        let milliseconds = u64::try_from(since.elapsed().as_millis()).ok()?.max(1);
        let rate = hits.saturating_sub(before) * 1000 / milliseconds;
        process.excesses = if rate > HITS_PER_SECOND_LIMIT { process.excesses + 1 } else { 0 };
        if process.excesses < EXCESSES_LIMIT {
            return None;
        }
        let (execs, profile) = (process.execs, process.hooks.first()?.profile().to_owned());
        self.end(maps, pid);
        self.processes.insert(pid, Process { execs, attempts: ATTEMPTS, ..Process::default() });
        Some(Missing {
            source: format!("deferred tasks of process {pid}"),
            reason: format!(
                "its hooks fire {rate} times a second, which would cost it {} % of a CPU; {} attaches to it anyway",
                rate / 5_000,
                profiles::flag_to_force(&profile)
            ),
        })
    }

    /// Attaches to all hooks of a runtime, or to none: with some of them, metrics would be wrong.
    fn attach(
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
            log::debug!("cannot read names in process {pid}: {why:#}");
        }
        let mut attached = Vec::new();
        // In reverse order, so that the end of each task that is seen to start is seen as well.
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
        let name = format!("{} work", profile.name);
        let spaces = numbers.values().map(|&n| (n.into(), Space { name: name.clone(), is_kind_known_later }));
        process.spaces.extend(spaces);
        self.unread.insert(pid);
        Ok(())
    }

    /// Adds the connections that processes had accepted before they were tracked. The listeners must be known by now.
    pub(super) fn adopt_connections(&mut self, maps: &mut Maps) {
        for pid in mem::take(&mut self.unread) {
            let tcp = entries(&maps.listeners).into_iter().filter(|(_, raw)| raw.unix_name == 0);
            let ports = tcp.map(|(_, raw)| raw.port).collect();
            for (fd, inode) in connections::accepted(pid, &ports) {
                let connection = Connection { inode, ..Connection::default() };
                // A connection that was accepted meanwhile is present already. If the map is full, the programs count
                // further connections as lost.
                let _no_matter = insert_new(&mut maps.connections, Descriptor { tgid: pid, fd }, connection);
            }
        }
    }

    /// Reads what the programs have emitted.
    pub(super) fn collect(&mut self, maps: &mut Maps) {
        self.name_new(maps);
        for raw in self.links.collect(maps) {
            self.link(&raw);
        }
    }

    /// Names kinds of tasks that were seen for the first time.
    pub(super) fn name_new(&mut self, maps: &mut Maps) {
        for class in maps.kinds() {
            self.name(class);
        }
    }

    fn link(&mut self, raw: &RawLink) {
        let task = self.name(raw.class);
        self.links.add(raw, task);
    }

    /// Names a kind of task, while the name is still in the process's memory.
    fn name(&mut self, class: ClassKey) -> Arc<str> {
        let pid = class.tgid;
        let Some(process) = self.processes.get_mut(&pid) else { return UNKNOWN.into() };
        if let Some(name) = process.names.get(&class) {
            return Arc::clone(name);
        }
        let name: Arc<str> = if class.naming == ClassKey::OTHERS {
            "other".into()
        } else if class.naming == 0 {
            process.spaces.get(&class.value).map_or(UNKNOWN.into(), |space| space.name.as_str().into())
        } else {
            let naming = Naming::of(class.naming);
            let named = naming.map(|naming| self.names.of(pid, naming, class.value));
            match named {
                Some(Ok(name)) => name.into(),
                Some(Err(why)) => {
                    log::debug!("cannot read the name of {:#x} in process {pid}: {why:#}", class.value);
                    UNKNOWN.into()
                }
                None => UNKNOWN.into(),
            }
        };
        if process.names.len() < NAMES_LIMIT {
            process.names.insert(class, Arc::clone(&name));
        }
        name
    }

    /// Whether all tasks of a class are of one kind.
    fn is_kind_known(&self, class: ClassKey) -> bool {
        let space = self.processes.get(&class.tgid).and_then(|process| process.spaces.get(&class.value));
        match class.naming {
            ClassKey::OTHERS => false,
            0 => space.is_some_and(|space| !space.is_kind_known_later),
            _ => true,
        }
    }

    /// Names all kinds of tasks that have no name yet. The memory that has their names may be reused later.
    pub(super) fn name_all(&mut self, maps: &Maps) {
        if self.loaded.is_some() {
            for class in maps.classes.keys().filter_map(Result::ok) {
                self.name(class);
            }
        }
    }

    /// Metrics of a live target. Kinds without a name are left out until the next refresh, which names them.
    fn metrics(&self, maps: &Maps, pid: u32) -> TaskMetrics {
        let tracked = self.processes.get(&pid).filter(|process| !process.hooks.is_empty());
        let Some(process) = tracked else { return TaskMetrics::default() };
        let (hooks, unmatched) = process.hook_counters(maps);
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
        TaskMetrics { deferred, hooks, unmatched }
    }

    /// Hooks of a target that have fired often and never matched.
    pub(super) fn unmatched_hooks(&self, maps: &Maps, pid: u32) -> Vec<HookCounters> {
        let Some(process) = self.processes.get(&pid) else { return Vec::new() };
        let (hooks, _) = process.hook_counters(maps);
        let enqueued = |profile: &str| {
            let snapshots = hooks.iter().filter(|hook| hook.verb == "snapshot" && hook.profile == profile);
            snapshots.map(|hook| hook.matches).sum()
        };
        hooks.iter().filter(|hook| hook.never_matches(enqueued(&hook.profile))).cloned().collect()
    }

    /// Metrics of a target; the final ones if it has exited.
    pub(super) fn latest_metrics(&self, maps: &Maps, pid: u32, has_exited: bool) -> TaskMetrics {
        if !has_exited {
            return self.metrics(maps, pid);
        }
        let found = self.finished.iter().rev().find(|(of, _)| *of == pid);
        found.map(|(_, metrics)| metrics.clone()).unwrap_or_default()
    }

    /// Keeps the final metrics of a target that has exited. The oldest beyond `keep` targets are dropped.
    pub(super) fn exited(&mut self, maps: &mut Maps, pid: u32, keep: usize) {
        if self.processes.contains_key(&pid) {
            self.orphan(maps, pid);
            self.name_all(maps);
            let mut metrics = self.metrics(maps, pid);
            self.links.add_to(pid, &mut metrics.deferred);
            self.links.forget(pid);
            self.finished.push((pid, metrics));
            let surplus = self.finished.len().saturating_sub(keep);
            self.finished.drain(..surplus);
            self.end(maps, pid);
        }
    }

    /// Stops tracking a process that continues to run.
    pub(super) fn release(&mut self, maps: &mut Maps, pid: u32) {
        self.links.forget(pid);
        self.end(maps, pid);
    }

    /// Counts tasks of an exited process as dropped if they had not started.
    fn orphan(&mut self, maps: &mut Maps, pid: u32) {
        let now = clock::monotonic_ns();
        self.collect(maps);
        for (key, raw_task) in entries(&maps.tasks).into_iter().filter(|(key, _)| key.tgid == pid) {
            if let Some(link) = deferred::orphan(&raw_task, now) {
                if let Ok(mut class) = maps.classes.get(&raw_task.class, 0) {
                    class.orphaned += 1;
                    class.pending = class.pending.saturating_sub(1);
                    class.enqueued += u64::from(raw_task.class.naming == 0);
                    let _absent = maps.classes.insert(raw_task.class, class, EXIST);
                }
                self.link(&link);
            }
            let _absent = maps.tasks.remove(&key);
        }
    }

    /// Removes all state of a process, here and in the maps.
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
        let _absent = maps.followed.remove(&pid);
        for (key, _) in entries(&maps.tasks).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _absent = maps.tasks.remove(&key);
        }
        for (key, _) in entries(&maps.classes).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _absent = maps.classes.remove(&key);
        }
        for (key, _) in entries(&maps.connections).into_iter().filter(|(key, _)| key.tgid == pid) {
            let _absent = maps.connections.remove(&key);
        }
    }
}

/// Flag of a map update: do nothing if the key is not present.
const EXIST: u64 = 2;

/// Name of kinds of tasks that cannot be named.
const UNKNOWN: &str = "unknown";
