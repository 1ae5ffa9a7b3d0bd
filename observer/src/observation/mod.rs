//! An observation: loads the programs, and keeps what is known about the targets. [`Observation::refresh`] selects targets
//! and reads the maps, [`Observation::attach_runtimes`] attaches to the runtimes of targets, both periodically and on
//! events; [`Observation::snapshot`] only reads.

mod round_robin;
mod attach_limiter;
mod missing;
mod parameters;
mod targets;
mod listeners;
mod links;
mod deferred;
mod runtimes;
mod reactors;
mod unwatched;

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned, util::nr_cpus};
use nix::sys::utsname::uname;
use observer_common::{layout::KernelLayout, loss::Loss, origin::HEADS_PER_CPU, ring::RingShape};

use crate::{
    kernel::{clock, layout, memory, syscalls},
    model::{
        delivery::ExportStats,
        histogram::seconds,
        snapshot::{Lost, Own, SCHEMA, Service, Snapshot, Target},
        trace::{Event, Events},
        workers,
    },
    probes::{self, Types, When, listener, reactor},
    process::{Process, choice::Choice},
    read::maps::Maps,
};

pub(crate) use parameters::Parameters;

use deferred::TaskMetrics;
use listeners::{Listeners, numbered};
use missing::MissingSources;
use reactors::Reactors;
use runtimes::Runtimes;
use targets::Targets;
use unwatched::UnwatchedWaits;

pub(crate) static PROGRAMS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-ebpf"));

/// A running observation. When it is dropped, all programs, probes and maps leave the kernel.
pub(crate) struct Observation {
    ebpf: Ebpf,
    maps: Maps,
    missing: MissingSources,
    targets: Targets,
    listeners: Listeners,
    reactors: Reactors,
    unwatched: UnwatchedWaits,
    runtimes: Runtimes,
    facts: Facts,
    service: Service,
    /// Live targets as of the last refresh, each with its number of execs.
    live: Vec<(u32, u32)>,
    /// Export statistics of the signals that are pushed.
    export_stats: Vec<Arc<ExportStats>>,
}

/// Facts that are constant during an observation.
struct Facts {
    /// When the programs were attached, monotonic nanoseconds.
    attached_ns: u64,
    /// Kernel memory of the maps, in bytes.
    map_memory: u64,
    /// Release of the running kernel.
    kernel: String,
    /// Accepts without a known listener that ended while programs were being attached one by one, and before the calls
    /// in progress were known.
    unattributed_before: u64,
}

impl Observation {
    /// Loads the programs, attaches them, and finds what the targets are already doing. With `verbose`, the programs
    /// log messages; otherwise the code for that is not even loaded.
    pub(crate) fn start(parameters: &Parameters, verbose: bool) -> Result<Self> {
        let layout = layout::of_running_kernel()?;
        let mut ebpf = load(parameters, &layout, verbose)?;
        let mut maps = Maps::take(&mut ebpf, parameters.capacity)?;
        let targets = Targets::of(parameters);
        let selected = targets.insert_selected(&mut maps)?;
        let mut missing = MissingSources::default();
        attach(&mut ebpf, &maps, &layout, parameters, &mut missing)?;
        let release = uname().context("cannot read the release of the kernel")?;
        let mut observation = Self {
            ebpf,
            maps,
            missing,
            targets,
            listeners: Listeners::default(),
            reactors: Reactors::of(parameters),
            unwatched: UnwatchedWaits::besides(&parameters.calls),
            runtimes: Runtimes::of(parameters),
            facts: Facts {
                attached_ns: clock::monotonic_ns(),
                map_memory: memory::of_maps().context("cannot read the memory of the eBPF maps")?,
                kernel: release.release().to_string_lossy().into(),
                unattributed_before: 0,
            },
            service: Service { is_attaching: true, ..Service::default() },
            live: Vec::new(),
            export_stats: Vec::new(),
        };
        observation.targets.adopt(&mut observation.maps, &mut observation.missing, selected)?;
        observation.refresh()?;
        let pids: Vec<u32> = observation.targets.live().keys().copied().collect();
        let Self { reactors, ebpf, maps, missing, .. } = &mut observation;
        reactors.adopt_calls(ebpf, maps, missing, pids)?;
        observation.facts.unattributed_before = observation.maps.lost(Loss::AcceptUnattributed)?;
        Ok(observation)
    }

    /// The programs, for reading their log messages.
    pub(crate) fn programs(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Kernel memory of the maps in bytes, which is constant.
    pub(crate) const fn map_memory(&self) -> u64 {
        self.facts.map_memory
    }

    /// Wall time at which the programs were attached.
    pub(crate) fn started(&self) -> SystemTime {
        clock::wall_time(self.facts.attached_ns)
    }

    /// Time since the programs were attached.
    pub(crate) fn age(&self) -> Duration {
        Duration::from_nanos(clock::monotonic_ns().saturating_sub(self.facts.attached_ns))
    }

    /// Adds export statistics to all snapshots.
    pub(crate) fn add_export_stats(&mut self, stats: Arc<ExportStats>) {
        self.export_stats.push(stats);
    }

    /// Records events for traces from now on. Events that exceed the limit are counted in `stats`.
    pub(crate) fn trace(&mut self, stats: Arc<ExportStats>) {
        self.runtimes.tasks.links.trace(Events::counted_in(stats));
    }

    /// Removes and returns the events for traces since the last call.
    pub(crate) fn events(&mut self) -> VecDeque<Event> {
        self.runtimes.tasks.links.take_events()
    }

    /// A process that is or was under observation, if it is still remembered.
    pub(crate) fn process(&self, pid: u32) -> Option<&Process> {
        self.targets.get(pid)
    }

    /// Whether all targets have exited and no others can appear.
    pub(crate) fn is_over(&self) -> bool {
        self.targets.is_over()
    }

    /// Processes under observation now.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Process> {
        self.targets.live().values()
    }

    /// Changes the selection. Targets that are still selected keep their metrics.
    pub(crate) fn choose(&mut self, choice: Choice) -> Result<()> {
        let (new, released) = self.targets.choose(&mut self.maps, &mut self.missing, choice)?;
        self.reactors.adopt_calls(&mut self.ebpf, &mut self.maps, &mut self.missing, new)?;
        self.runtimes.release(&mut self.maps, &released);
        self.forget(&released)?;
        // Without delay, because connections that a new target accepts before its listeners are found are not counted.
        self.refresh()
    }

    /// Counts a reload of the configuration.
    pub(crate) fn count_reload(&mut self, is_accepted: bool) {
        let count = if is_accepted { &mut self.service.accepted } else { &mut self.service.refused };
        *count += 1;
    }

    /// Accepts or rejects the candidates for selection.
    fn select(&mut self) -> Result<()> {
        let rejected = self.targets.select(&mut self.maps, &mut self.missing)?;
        self.forget(&rejected)
    }

    /// Forgets what is known about processes that are not targets.
    fn forget(&mut self, pids: &BTreeSet<u32>) -> Result<()> {
        self.reactors.forget(pids);
        self.listeners.forget(&mut self.maps, &self.targets, pids)
    }

    /// Interval between two calls of [`watch`](Self::watch).
    pub(crate) const fn watch_period(&self) -> Duration {
        self.reactors.watch_period()
    }

    /// Whether [`watch`](Self::watch) has something to read.
    pub(crate) fn has_long_slices(&self) -> bool {
        self.reactors.has_long_slices(&self.maps)
    }

    /// Reads the stacks of slices that may become stalls, and what their threads serve.
    pub(crate) fn watch(&mut self) {
        self.reactors.watch(&self.maps, &self.targets, &mut self.missing);
        self.reactors.examine_busy(&self.maps, |inode| self.listeners.is_known(inode));
    }

    /// Collects what the programs have emitted: stalls that have ended, requests and tasks. Must be called at the watch
    /// period, before their rings are full.
    pub(crate) fn collect(&mut self) -> Result<()> {
        let stalls = self.maps.stalls();
        if !stalls.is_empty() {
            // Stalls of rejected processes are not reported.
            self.select()?;
        }
        let tasks = &mut self.runtimes.tasks;
        // The programs emit a request before the stalls that refer to it.
        tasks.collect(&mut self.maps);
        self.reactors.add_stalls(stalls, &self.maps, &self.targets, &mut tasks.links);
        Ok(())
    }

    /// Descriptor that is readable when [`name_new`](Self::name_new) has something to do.
    pub(crate) fn kinds_descriptor(&self) -> io::Result<OwnedFd> {
        self.maps.kinds_descriptor()
    }

    /// Names new kinds of deferred tasks, before the names can change.
    pub(crate) fn name_new(&mut self) {
        self.runtimes.tasks.name_new(&mut self.maps);
    }

    /// Selects targets, and updates processes, listeners and event loops.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        self.targets.rename_some();
        self.reactors.rename_some();
        self.select()?;
        let excluded = self.targets.exclude(&mut self.maps);
        self.runtimes.release(&mut self.maps, &excluded);
        self.forget(&excluded)?;
        let changes = self.targets.refresh(&mut self.maps);
        for &pid in &changes.exited {
            self.runtimes.exited(&mut self.maps, &mut self.missing, &self.targets, pid);
        }
        self.collect()?;
        self.reactors.refresh(&mut self.maps, &self.targets)?;
        self.unwatched.refresh(&self.targets, &self.reactors.pids());
        for &pid in &changes.execed {
            self.reactors.rename_of(pid);
        }
        self.runtimes.tasks.name_all(&self.maps);
        let (ebpf, maps, missing) = (&mut self.ebpf, &mut self.maps, &mut self.missing);
        self.listeners.refresh(ebpf, maps, missing, &self.targets, changes.has_changed)?;
        let refreshed = clock::wall_time(self.reactors.refreshed_ns()).duration_since(UNIX_EPOCH);
        self.reactors.examine_some(&self.maps, |inode| self.listeners.is_known(inode));
        self.service.refreshed = refreshed.ok().map(|since| since.as_secs_f64());
        self.live = changes.live;
        Ok(())
    }

    /// Whether the targets of the start have not been attached to yet.
    pub(crate) const fn is_attaching(&self) -> bool {
        self.service.is_attaching
    }

    /// Attaches to the runtimes of the targets of the last refresh. This takes about 50 ms for each hook, and nothing
    /// else depends on it.
    pub(crate) fn attach_runtimes(&mut self) {
        let (ebpf, maps, missing) = (&mut self.ebpf, &mut self.maps, &mut self.missing);
        self.runtimes.refresh(ebpf, maps, missing, &self.targets, &self.live);
        self.service.is_attaching = false;
        self.service.waiting = self.runtimes.waiting();
    }

    /// Everything known as of the last refresh.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        let (mut reactors, mut listeners) =
            (self.reactors.snapshot(), self.listeners.snapshot(&self.targets));
        let mut targets: Vec<Target> = Vec::new();
        for (process, exited) in self.targets.all() {
            let pid = process.pid;
            let TaskMetrics { deferred, hooks, unmatched } =
                self.runtimes.tasks.latest_metrics(&self.maps, pid, exited);
            // Two processes may have had the same id, one after the other. Loops and listeners that have not ended belong
            // to the second one.
            let is_reused = exited && self.targets.live().contains_key(&pid);
            let (reactors_of_it, of_other) =
                divide(reactors.remove(&pid), |reactor| reactor.exited || !is_reused);
            reactors.insert(pid, of_other);
            let (listeners_of_it, of_other) = divide(listeners.remove(&pid), |l| l.closed || !is_reused);
            listeners.insert(pid, of_other);
            targets.push(Target {
                pid,
                comm: process.comm.clone(),
                exe: process.exe.clone(),
                parent: process.parent,
                workload: process.workload.clone(),
                exited,
                listeners: numbered(listeners_of_it),
                reactors: reactors_of_it,
                unwatched_waits: self.unwatched.of(pid),
                deferred,
                unmatched,
                hooks,
                gc: self.runtimes.collectors.latest_metrics(&self.maps, pid, exited),
            });
        }
        targets.sort_by_key(|target| target.pid);
        for target in &mut targets {
            target.reactors.sort_by(|a, b| (a.tid, &a.id).cmp(&(b.tid, &b.id)));
        }
        let workers = workers::group(&mut targets);
        Ok(Snapshot {
            schema: SCHEMA,
            started: clock::written(self.facts.attached_ns),
            duration_seconds: seconds(clock::monotonic_ns() - self.facts.attached_ns),
            targets,
            workers,
            own: self.own()?,
        })
    }

    /// The last snapshot, including all links of deferred tasks.
    pub(crate) fn report(&mut self) -> Result<Snapshot> {
        self.targets.rename_all();
        self.reactors.rename_all();
        self.refresh()?;
        self.attach_runtimes();
        if self.targets.all().next().is_some() {
            self.runtimes.note_unmet(&mut self.missing);
        }
        let mut snapshot = self.snapshot()?;
        for target in snapshot.targets.iter_mut().filter(|target| !target.exited) {
            self.runtimes.tasks.links.add_to(target.pid, &mut target.deferred);
        }
        Ok(snapshot)
    }

    fn own(&self) -> Result<Own> {
        let mut lost = Vec::new();
        for (loss, cause) in Loss::ALL {
            let before = if loss == Loss::AcceptUnattributed { self.facts.unattributed_before } else { 0 };
            lost.push(Lost { cause, count: self.maps.lost(loss)?.saturating_sub(before) });
        }
        Ok(Own {
            version: env!("CARGO_PKG_VERSION"),
            kernel: self.facts.kernel.clone(),
            map_memory_bytes: self.facts.map_memory,
            service: self.service,
            lost,
            missing: self.missing.all().to_vec(),
            otlp: self.export_stats.iter().map(|stats| stats.read()).collect(),
        })
    }
}

/// Loads the programs, except those that only some runtimes need.
fn load(parameters: &Parameters, layout: &KernelLayout, verbose: bool) -> Result<Ebpf> {
    // A new loader has read the kernel's BTF, which only programs with relocations against it need. It is dropped
    // here, before other code reads it again.
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    let follow = u8::from(parameters.follow);
    let selects = u8::from(!parameters.choice.is_none());
    let log_level: u8 = if verbose { u8::MAX } else { 0 };
    let stall_ns = u64::try_from(parameters.stall_threshold.as_nanos()).unwrap_or(u64::MAX);
    let cpus = nr_cpus().map_err(|(_, error)| error).context("cannot count the CPUs")?;
    let heads = u32::try_from(cpus)?.saturating_mul(HEADS_PER_CPU);
    // When a signal interrupts the load of a program, the load is repeated with a verifier log. A verbose log takes so
    // long that Ctrl-C would not end observer.
    let verifier_log = if verbose { VerifierLogLevel::VERBOSE } else { VerifierLogLevel::STATS };
    parameters.capacity.apply(&mut loader);
    loader
        .verifier_log_level(verifier_log)
        .map_max_entries("HEADS", heads)
        .override_global("LAYOUT", layout, true)
        .override_global("FOLLOW", &follow, true)
        .override_global("SELECTS", &selects, true)
        .override_global("SYSCALL_CLASSES", &syscalls::syscall_classes(), true)
        .override_global("STALL_NS", &stall_ns, true)
        .override_global("AYA_LOG_LEVEL", &log_level, true)
        .load(PROGRAMS)
        .context("the kernel does not accept the eBPF maps")
}

/// Attaches the programs that need no runtime.
fn attach(
    ebpf: &mut Ebpf,
    maps: &Maps,
    layout: &KernelLayout,
    parameters: &Parameters,
    missing: &mut MissingSources,
) -> Result<()> {
    let types = Types::default();
    missing.extend(probes::attach(ebpf, &types, When::Always, &parameters.calls)?);
    listener::link_tail_calls(ebpf)?;
    if !reactor::find_registers(ebpf, &maps.registers)? {
        missing.add(
            "what blocked threads wait for",
            "the location of the registers of system calls is unknown in this kernel",
        );
    }
    if layout.ring_shape == RingShape::Unknown as u32 {
        missing.add(
            "accepts through io_uring",
            "this kernel's io_uring has no tracepoints, or none that observer supports",
        );
    } else {
        missing.extend(probes::attach(ebpf, &types, When::RingsUnderstood, &parameters.calls)?);
    }
    Ok(())
}

/// Splits a list into the items that satisfy a predicate, and the others.
fn divide<T>(all: Option<Vec<T>>, predicate: impl FnMut(&T) -> bool) -> (Vec<T>, Vec<T>) {
    all.unwrap_or_default().into_iter().partition(predicate)
}
