//! One observation: the programs in the kernel, and what is known of the targets. [`Observation::refresh`] brings that up to date,
//! on the clock and on events; [`Observation::snapshot`] only reads it.

mod round_robin;
mod attach_limiter;
mod missing;
mod selection;
mod targets;
mod listeners;
mod deferred;
mod runtimes;
mod reactors;

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
    kernel::{calls as system_calls, clock, layout, memory},
    model::{
        delivery::ExportStats,
        histogram::seconds,
        snapshot::{Lost, Own, SCHEMA, Service, Snapshot, Target},
        trace::{Event, Events},
    },
    probes::{self, Types, When, listener, reactor},
    process::{Process, choice::Choice},
    read::maps::Maps,
};

pub(crate) use selection::Selection;

use deferred::Figures;
use listeners::{Listeners, numbered};
use missing::MissingSources;
use reactors::Reactors;
use runtimes::Runtimes;
use targets::Targets;

pub(crate) static PROGRAMS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-ebpf"));

/// A running observation. Dropping it takes everything of ours out of the kernel.
pub(crate) struct Observation {
    ebpf: Ebpf,
    maps: Maps,
    missing: MissingSources,
    targets: Targets,
    listeners: Listeners,
    reactors: Reactors,
    runtimes: Runtimes,
    facts: Facts,
    service: Service,
    /// What becomes of what is pushed.
    export_stats: Vec<Arc<ExportStats>>,
}

/// What does not change during an observation.
struct Facts {
    /// When the programs were attached, monotonic nanoseconds.
    attached_ns: u64,
    /// Kernel memory of the maps, in bytes.
    map_memory: u64,
    /// Release of the running kernel.
    kernel: String,
    /// Accepts that ended while programs were attached one by one and calls in progress were not known yet.
    unattributed_before: u64,
}

impl Observation {
    /// Loads the programs, attaches them and finds what the targets were doing already. `verbose` turns on the
    /// diagnostics of the programs, which are not even loaded otherwise.
    pub(crate) fn start(selection: &Selection, verbose: bool) -> Result<Self> {
        let layout = layout::of_running_kernel()?;
        let mut ebpf = load(selection, &layout, verbose)?;
        let mut maps = Maps::take(&mut ebpf, selection.capacity)?;
        let targets = Targets::of(selection);
        let selected = targets.insert_selected(&mut maps)?;
        let mut missing = MissingSources::default();
        attach(&mut ebpf, &maps, &layout, selection, &mut missing)?;
        let release = uname().context("cannot ask for the kernel's release")?;
        let mut observation = Self {
            ebpf,
            maps,
            missing,
            targets,
            listeners: Listeners::default(),
            reactors: Reactors::of(selection),
            runtimes: Runtimes::of(selection),
            facts: Facts {
                attached_ns: clock::monotonic_ns(),
                map_memory: memory::of_maps().context("cannot read how large the maps are")?,
                kernel: release.release().to_string_lossy().into(),
                unattributed_before: 0,
            },
            service: Service::default(),
            export_stats: Vec::new(),
        };
        observation.targets.adopt(&mut observation.maps, &mut observation.missing, selected)?;
        // Runtimes take longest, and nothing waits for them.
        let live = observation.refresh_targets()?;
        let pids: Vec<u32> = observation.targets.live().keys().copied().collect();
        observation.reactors.adopt_calls(&mut observation.maps, &mut observation.missing, pids)?;
        observation.facts.unattributed_before = observation.maps.lost(Loss::AcceptUnattributed)?;
        observation.refresh_runtimes(live);
        Ok(observation)
    }

    /// The programs, whose diagnostics can be read.
    pub(crate) fn programs(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Kernel memory of the maps, in bytes; it does not change.
    pub(crate) const fn map_memory(&self) -> u64 {
        self.facts.map_memory
    }

    /// Wall time at which the programs were attached.
    pub(crate) fn started(&self) -> SystemTime {
        clock::wall_time(self.facts.attached_ns)
    }

    /// Has snapshots report what becomes of what is pushed.
    pub(crate) fn add_export_stats(&mut self, stats: Arc<ExportStats>) {
        self.export_stats.push(stats);
    }

    /// Keeps what can be traced from now on; what there is no room for is counted there.
    pub(crate) fn trace(&mut self, stats: Arc<ExportStats>) {
        self.runtimes.follower.trace(Events::counted_in(stats));
    }

    /// What can be traced since the last time.
    pub(crate) fn events(&mut self) -> VecDeque<Event> {
        self.runtimes.follower.events()
    }

    /// A process that is or was under observation, as far as it is remembered.
    pub(crate) fn process(&self, pid: u32) -> Option<&Process> {
        self.targets.get(pid)
    }

    /// Whether all targets are gone, and no others can come.
    pub(crate) fn is_over(&self) -> bool {
        self.targets.is_over()
    }

    /// Processes under observation now.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Process> {
        self.targets.live().values()
    }

    /// Selects by another choice: targets that it selects as well lose nothing.
    pub(crate) fn choose(&mut self, choice: Choice) -> Result<()> {
        let (new, released) = self.targets.choose(&mut self.maps, &mut self.missing, choice)?;
        self.reactors.adopt_calls(&mut self.maps, &mut self.missing, new)?;
        self.runtimes.release(&mut self.maps, &released);
        self.forget(&released)?;
        // At once: what a new target accepts before its listeners are found is lost.
        self.refresh()
    }

    /// Counts a reload of the configuration, which was accepted or refused.
    pub(crate) fn count_reload(&mut self, is_accepted: bool) {
        let count = if is_accepted { &mut self.service.accepted } else { &mut self.service.refused };
        *count += 1;
    }

    /// Decides on processes that have come up for selection.
    fn select(&mut self) -> Result<()> {
        let rejected = self.targets.select(&mut self.maps, &mut self.missing)?;
        self.forget(&rejected)
    }

    /// Forgets what is known of processes that are no targets.
    fn forget(&mut self, pids: &BTreeSet<u32>) -> Result<()> {
        self.reactors.forget(pids);
        self.listeners.forget(&mut self.maps, &self.targets, pids)
    }

    /// How often to [`watch`](Self::watch).
    pub(crate) const fn watch_period(&self) -> Duration {
        self.reactors.watch_period()
    }

    /// Collects the stalls that have ended, and reads the stacks of slices that may become one.
    pub(crate) fn watch(&mut self) -> Result<()> {
        self.collect_stalls()?;
        self.reactors.watch(&self.maps, &self.targets);
        Ok(())
    }

    fn collect_stalls(&mut self) -> Result<()> {
        let stalls = self.maps.stalls();
        if !stalls.is_empty() {
            // Stalls of processes that are not wanted are not reported.
            self.select()?;
        }
        let follower = &mut self.runtimes.follower;
        // The programs pass requests on before the stalls that refer to them.
        follower.collect(&mut self.maps);
        self.reactors.add_stalls(stalls, &self.maps, &self.targets, follower);
        Ok(())
    }

    /// What is readable when [`name_new`](Self::name_new) has something to do.
    pub(crate) fn kinds_descriptor(&self) -> io::Result<OwnedFd> {
        self.maps.kinds_descriptor()
    }

    /// Finds out what new kinds of deferred tasks are called, before that can change.
    pub(crate) fn name_new(&mut self) {
        self.runtimes.follower.name_new(&mut self.maps);
    }

    /// Brings everything up to date: selects targets, looks at their queues and loops, attaches to their runtimes.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        let live = self.refresh_targets()?;
        self.refresh_runtimes(live);
        self.targets.rename_some();
        self.reactors.rename_some();
        Ok(())
    }

    /// Brings processes, listeners and event loops up to date. Returns live targets, each with how many programs it has started.
    fn refresh_targets(&mut self) -> Result<Vec<(u32, u32)>> {
        self.select()?;
        let excluded = self.targets.exclude(&mut self.maps);
        self.runtimes.release(&mut self.maps, &excluded);
        self.forget(&excluded)?;
        let changes = self.targets.refresh(&mut self.maps);
        for &pid in &changes.exited {
            self.runtimes.exited(&mut self.maps, &mut self.missing, &self.targets, pid);
        }
        for &pid in &changes.execed {
            self.reactors.rename_of(pid);
        }
        self.collect_stalls()?;
        self.reactors.refresh(&mut self.maps, &self.targets)?;
        self.runtimes.follower.name_all(&self.maps);
        let (ebpf, maps, missing) = (&mut self.ebpf, &mut self.maps, &mut self.missing);
        self.listeners.refresh(ebpf, maps, missing, &self.targets, changes.has_changed)?;
        let refreshed = clock::wall_time(self.reactors.refreshed_ns()).duration_since(UNIX_EPOCH);
        self.service.refreshed = refreshed.ok().map(|since| since.as_secs_f64());
        Ok(changes.live)
    }

    fn refresh_runtimes(&mut self, live: Vec<(u32, u32)>) {
        let (ebpf, maps, missing) = (&mut self.ebpf, &mut self.maps, &mut self.missing);
        self.runtimes.refresh(ebpf, maps, missing, &self.targets, live);
        self.service.waiting = self.runtimes.waiting();
    }

    /// Everything known as of the last refresh.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        let (mut reactors, mut listeners) =
            (self.reactors.snapshot(), self.listeners.snapshot(&self.targets));
        let mut targets: Vec<Target> = Vec::new();
        for (process, exited) in self.targets.all() {
            let pid = process.pid;
            let Figures { deferred, hooks, unmatched } =
                self.runtimes.follower.latest_figures(&self.maps, pid, exited);
            // Of two processes that have had the same id, one after the other, what still goes on is the second one's.
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
                place: process.place.clone(),
                exited,
                listeners: numbered(listeners_of_it),
                reactors: reactors_of_it,
                deferred,
                unmatched,
                hooks,
                gc: self.runtimes.collectors.latest_figures(&self.maps, pid, exited),
            });
        }
        targets.sort_by_key(|target| target.pid);
        for target in &mut targets {
            target.reactors.sort_by_key(|reactor| reactor.tid);
        }
        Ok(Snapshot {
            schema: SCHEMA,
            started: clock::written(self.facts.attached_ns),
            duration_seconds: seconds(clock::monotonic_ns() - self.facts.attached_ns),
            targets,
            own: self.own()?,
        })
    }

    /// The last snapshot, with every deferred task that is over.
    pub(crate) fn report(&mut self) -> Result<Snapshot> {
        self.targets.rename_all();
        self.reactors.rename_all();
        self.refresh()?;
        if self.targets.all().next().is_some() {
            self.runtimes.note_unmet(&mut self.missing);
        }
        let mut snapshot = self.snapshot()?;
        for target in snapshot.targets.iter_mut().filter(|target| !target.exited) {
            self.runtimes.follower.add_links(target.pid, &mut target.deferred);
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

/// Loads the programs, but for those that only some runtimes need.
fn load(selection: &Selection, layout: &KernelLayout, verbose: bool) -> Result<Ebpf> {
    // A new loader has read the kernel's types, which only programs that are relocated by them need: it lets go of them
    // before others read them.
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    let follow = u8::from(selection.follow);
    let selects = u8::from(!selection.choice.is_none());
    let log_level: u8 = if verbose { u8::MAX } else { 0 };
    let stall_ns = u64::try_from(selection.stall_threshold.as_nanos()).unwrap_or(u64::MAX);
    let cpus = nr_cpus().map_err(|(_, error)| error).context("cannot count the CPUs")?;
    let heads = u32::try_from(cpus)?.saturating_mul(HEADS_PER_CPU);
    // A signal makes the kernel give up the load of a program, which is then tried again with a log: a verbose one takes so long
    // that nobody could end observer with Ctrl-C.
    let verifier_log = if verbose { VerifierLogLevel::VERBOSE } else { VerifierLogLevel::STATS };
    selection.capacity.apply(&mut loader);
    loader
        .verifier_log_level(verifier_log)
        .map_max_entries("HEADS", heads)
        .override_global("LAYOUT", layout, true)
        .override_global("FOLLOW", &follow, true)
        .override_global("SELECTS", &selects, true)
        .override_global("SYSCALL_CLASSES", &system_calls::syscall_classes(), true)
        .override_global("STALL_NS", &stall_ns, true)
        .override_global("AYA_LOG_LEVEL", &log_level, true)
        .load(PROGRAMS)
        .context("the kernel does not take the eBPF maps")
}

/// Attaches the programs that need no runtime.
fn attach(
    ebpf: &mut Ebpf,
    maps: &Maps,
    layout: &KernelLayout,
    selection: &Selection,
    missing: &mut MissingSources,
) -> Result<()> {
    let types = Types::default();
    missing.extend(probes::attach(ebpf, &types, When::Always, &selection.calls)?);
    listener::link_tail_calls(ebpf)?;
    if !reactor::find_registers(ebpf, &maps.registers)? {
        missing.add(
            "what blocked threads wait for",
            "this kernel keeps the registers of system calls in an unknown place",
        );
    }
    if layout.ring_shape == RingShape::Unknown as u32 {
        missing.add(
            "accepts through io_uring",
            "this kernel's io_uring has no tracepoints, or none that observer knows",
        );
    } else {
        missing.extend(probes::attach(ebpf, &types, When::RingsUnderstood, &selection.calls)?);
    }
    Ok(())
}

/// Those that this is true of, and the others.
fn divide<T>(all: Option<Vec<T>>, is_so: impl FnMut(&T) -> bool) -> (Vec<T>, Vec<T>) {
    all.unwrap_or_default().into_iter().partition(is_so)
}
