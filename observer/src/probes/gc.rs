//! *gc*: garbage collections of targets' runtimes. Attached per process, if the profile of its runtime describes how.

use std::{collections::HashMap, fs::File, os::fd::AsFd as _};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{Ebpf, programs::UProbe};
use observer_common::{
    gc::{GcInProgress, Totals},
    histogram::Histogram as RawHistogram,
};

use super::{
    attach::{self, Types},
    probe::{Events, Hook, Probe, When},
};
use crate::{
    binary::{
        mappings::Mappings,
        memory::{Memory as _, ProcessMemory},
    },
    kernel::{
        detach,
        uprobe::{self, Site, Uprobe},
    },
    model::{
        histogram::{Histogram, seconds},
        snapshot::{Gc, Missing},
    },
    process::{
        is_there,
        runtime::{Probes, Runtimes, Watch},
    },
    read::{entries::insert_new, maps::Maps},
};

pub(super) const PROBE: Probe = Probe {
    name: "gc",
    purpose: "garbage collections: their number, their duration, and their share of an event loop's busy time",
    since: "5.5",
    when: When::Collector,
    cost: "two traps into the kernel for each collection of a target, 2 us together (306 ns and 363 ns of these in the programs); where totals are read, 300 ns for each slice of that target; no cost for other processes",
    hooks: &[
        Hook {
            program: "gc_start",
            events: Events::Runtime("the function or probe where a target's runtime starts a collection"),
        },
        Hook {
            program: "gc_done",
            events: Events::Runtime("the function or probe where it ends a collection"),
        },
    ],
};

/// How often a process is checked in which no runtime was found: its libraries may not have been loaded yet.
const MAX_CHECKS: u32 = 5;

/// The garbage collectors of all targets.
pub(crate) struct Collectors {
    /// Maximum number of processes watched at a time.
    most: usize,
    /// By process id.
    processes: HashMap<u32, Process>,
    /// Whether the kernel accepted the programs; `None` until a process needs them.
    loaded: Option<Result<(), String>>,
    /// Final metrics of processes that have exited, by process id.
    finished: Vec<(u32, Gc)>,
}

/// A target.
#[derive(Default)]
struct Process {
    /// Number of programs that the process had executed at the last check.
    execs: u32,
    /// Number of checks.
    checks: u32,
    watched: Watched,
}

#[derive(Default)]
enum Watched {
    /// Not watched: no collector was found, or it is not initialised.
    #[default]
    Nothing,
    /// Start and end of each collection, by uprobes that are attached as long as they are kept.
    Pauses(#[expect(dead_code, reason = "kept, so that they stay attached")] Vec<Uprobe>),
    /// Totals that the runtime counts.
    Totals { memory: ProcessMemory, places: Totals, first: Sum, last: Sum },
}

/// Number of collections and their total duration in nanoseconds.
#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    ns: u64,
}

impl Collectors {
    /// Watches no process yet, and never more than `most`.
    pub(crate) fn at_most(most: usize) -> Self {
        Self { most, processes: HashMap::new(), loaded: None, finished: Vec::new() }
    }

    /// Updates a target, which has executed `execs` programs so far. Returns what cannot be watched.
    pub(crate) fn refresh(
        &mut self,
        runtimes: &mut Runtimes,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        pid: u32,
        execs: u32,
    ) -> Option<Missing> {
        let watched_now = self.processes.values().filter(|process| process.is_watched()).count();
        let process = self.processes.entry(pid).or_insert_with(|| Process { execs, ..Process::default() });
        if process.execs != execs {
            // Counters of the previous program are not those of the new one.
            *process = Process { execs, ..Process::default() };
            forget(maps, pid);
            // Otherwise old and new probes would both count.
            detach::finish(pid);
        }
        process.read_totals(maps, pid);
        if process.is_watched() || process.checks == MAX_CHECKS {
            return None;
        }
        // Mappings are valid only if no exec has happened since `execs` was read.
        if detach::is_busy() || maps.execs(pid) != Some(execs) {
            return None;
        }
        process.checks += 1;
        // An exiting process has no mappings.
        let found = runtimes.of(&Mappings::of(pid).ok()?);
        let (name, collector) =
            found.into_iter().find_map(|runtime| Some((runtime.name, runtime.collector?)))?;
        let watched = collector.map_err(|why| anyhow!(why)).and_then(|watch| {
            if watched_now >= self.most {
                bail!("the limit of {} watched processes is reached (see --capacity)", self.most);
            }
            if matches!(watch, Watch::Probes(..)) {
                let loaded = self.loaded.get_or_insert_with(|| load(ebpf).map_err(|e| format!("{e:#}")));
                loaded.clone().map_err(|why| anyhow!(why))?;
            }
            begin(watch, ebpf, maps, pid)
        });
        match watched {
            Ok(watched) => {
                process.watched = watched;
                if maps.execs(pid) != Some(execs) {
                    // The next program has other data at these addresses.
                    forget(maps, pid);
                }
            }
            // The process has exited meanwhile.
            Err(_) if !is_there(pid) => {}
            Err(why) => {
                process.checks = MAX_CHECKS;
                let source = format!("garbage collections of {name}");
                return Some(Missing { source, reason: format!("{why:#}") });
            }
        }
        None
    }

    /// Handles the exit of a target. Final metrics are kept for the last `keep` processes.
    pub(crate) fn exited(&mut self, maps: &mut Maps, pid: u32, keep: usize) {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.read_totals(maps, pid);
        }
        if let Some(metrics) = self.metrics(maps, pid) {
            self.finished.push((pid, metrics));
        }
        let surplus = self.finished.len().saturating_sub(keep);
        self.finished.drain(..surplus);
        self.processes.remove(&pid);
        forget(maps, pid);
    }

    /// Stops watching a process that keeps running.
    pub(crate) fn release(&mut self, maps: &mut Maps, pid: u32) {
        self.processes.remove(&pid);
        forget(maps, pid);
    }

    /// Metrics of a running target's collections; `None` if they are not watched.
    fn metrics(&self, maps: &Maps, pid: u32) -> Option<Gc> {
        match &self.processes.get(&pid)?.watched {
            Watched::Nothing => None,
            Watched::Pauses(_) => {
                let pause = Histogram::from(&maps.gc_pauses.get(&pid, 0).ok()?);
                Some(Gc { count: pause.count(), seconds: Some(pause.sum()), pause: Some(pause) })
            }
            Watched::Totals { first, last, .. } => {
                // Ruby's measurement can be turned off (`GC.measure_total_time = false`).
                let is_measured = last.ns > 0 || last.count == 0;
                let spent = seconds(last.ns.saturating_sub(first.ns));
                Some(Gc {
                    count: last.count - first.count,
                    seconds: is_measured.then_some(spent),
                    pause: None,
                })
            }
        }
    }

    /// Metrics of a target's collections; the final ones if it has exited.
    pub(crate) fn latest_metrics(&self, maps: &Maps, pid: u32, has_exited: bool) -> Option<Gc> {
        if !has_exited {
            return self.metrics(maps, pid);
        }
        self.finished.iter().rev().find(|(of, _)| *of == pid).map(|(_, metrics)| metrics.clone())
    }
}

impl Process {
    fn is_watched(&self) -> bool {
        !matches!(self.watched, Watched::Nothing)
    }

    /// Reads the totals from the process's memory; if that fails, takes the last values that the programs read.
    fn read_totals(&mut self, maps: &Maps, pid: u32) {
        let Watched::Totals { memory, places, last, .. } = &mut self.watched else { return };
        let by_reactors =
            || maps.gc_totals.get(&pid, 0).ok().map(|totals| Sum { count: totals.count, ns: totals.ns });
        if let Some(now) = read(memory, places).or_else(by_reactors).filter(|now| now.count >= last.count) {
            *last = now;
        }
    }
}

/// Loads the programs; attaches nothing.
fn load(ebpf: &mut Ebpf) -> Result<()> {
    uprobe::probe().map_err(|why| anyhow!(why))?;
    attach::attach(ebpf, &Types::default(), [&PROBE].into_iter(), &[])?;
    Ok(())
}

/// Starts watching the collector of a process.
fn begin(watch: Watch, ebpf: &mut Ebpf, maps: &mut Maps, pid: u32) -> Result<Watched> {
    match watch {
        Watch::NotYet => Ok(Watched::Nothing),
        Watch::Probes(file, Probes { start, done }) => {
            insert_new(&mut maps.gc_pauses, pid, RawHistogram::EMPTY)?;
            // The end is attached first, so that no collection is seen to start whose end is missed.
            let mut attached = attach(ebpf, "gc_done", &file, &done, pid)?;
            attached.extend(attach(ebpf, "gc_start", &file, &start, pid)?);
            Ok(Watched::Pauses(attached))
        }
        Watch::Totals(memory, places) => {
            let first = read(&memory, &places).context("cannot read its totals")?;
            maps.gc_totals.insert(pid, Totals { count: first.count, ns: first.ns, ..places }, 0)?;
            maps.gc_totals_used.set(0, 1, 0)?;
            Ok(Watched::Totals { memory, places, first, last: first })
        }
    }
}

fn attach(ebpf: &Ebpf, program: &str, file: &File, sites: &[Site], pid: u32) -> Result<Vec<Uprobe>> {
    let program =
        ebpf.program(program).with_context(|| format!("the eBPF object has no program {program}"))?;
    let program: &UProbe = program.try_into()?;
    let program = program.fd()?.as_fd();
    let attached = sites.iter().map(|&site| Uprobe::attach(program, file, site, pid));
    attached.collect::<Result<_, _>>().context("the kernel refuses to attach the uprobe")
}

/// Removes the map entries of a process.
fn forget(maps: &mut Maps, pid: u32) {
    let _unless_watched = (maps.gc_pauses.remove(&pid), maps.gc_totals.remove(&pid));
}

/// The current totals of a process.
fn read(memory: &ProcessMemory, places: &Totals) -> Option<Sum> {
    let count = memory.word(places.count_address)?;
    let parts = places.ns_addresses.iter().filter(|&&address| address != 0);
    let ns = parts.map(|&address| memory.word(address)).sum::<Option<u64>>()?;
    Some(Sum { count, ns })
}

/// Time that the collection in progress has taken of this thread's slice in progress as of `now`, in nanoseconds.
pub(crate) fn in_progress(maps: &Maps, tid: u32, slice_since_ns: u64, now: u64) -> u64 {
    let begun = maps.gc_begun.get(&tid, 0);
    begun.map_or(0, |GcInProgress { since_ns, .. }| now.saturating_sub(since_ns.max(slice_since_ns)))
}
