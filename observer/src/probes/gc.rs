//! *gc*: garbage collections of targets' runtimes. Attached to one process at a time, and only where a profile says how.

use std::{collections::HashMap, fs::File, os::fd::AsFd as _};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{Ebpf, programs::UProbe};
use observer_common::{
    gc::{Begun, Totals},
    histogram::Histogram as RawHistogram,
    reactor::{Phase, Reactor},
};

use super::{
    attach::{self, Types},
    probe::{Events, Hook, Probe, When},
};
use crate::{
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
    stacks::{
        mappings::Mappings,
        memory::{Live, Memory as _},
    },
};

pub(super) const PROBE: Probe = Probe {
    name: "gc",
    purpose: "garbage collections: how often, how long, and what of an event loop's busy time they take",
    since: "5.5",
    when: When::Collector,
    cost: "two traps into the kernel for each collection of a target, 2 us together (306 ns and 363 ns of these in the programs); where totals are read, 300 ns for each slice of that target; nobody else pays",
    hooks: &[
        Hook {
            program: "gc_start",
            events: Events::Runtime("the place where a target's runtime begins a collection"),
        },
        Hook { program: "gc_done", events: Events::Runtime("the place where it ends one") },
    ],
};

/// How often a process without a runtime is looked at: its loader may not have been done.
const LOOKS: u32 = 5;

/// The collectors that are watched.
pub(crate) struct Collectors {
    /// How many there may be at a time.
    most: usize,
    /// By process id.
    processes: HashMap<u32, Process>,
    /// Whether the kernel has taken the programs; `None` while nobody needs them.
    loaded: Option<Result<(), String>>,
    /// Final figures of processes that are gone, by their ids.
    finished: Vec<(u32, Gc)>,
}

/// A target.
#[derive(Default)]
struct Process {
    /// How many programs it had started when it was looked at.
    execs: u32,
    /// How often it has been looked at.
    looks: u32,
    watched: Watched,
}

#[derive(Default)]
enum Watched {
    /// Nothing, because it has nothing, or nothing yet.
    #[default]
    Nothing,
    /// The beginning and the end of each collection, by probes that are attached while these are kept.
    Pauses(#[expect(dead_code, reason = "kept, so that they stay attached")] Vec<Uprobe>),
    /// What its runtime counts.
    Totals { memory: Live, places: Totals, first: Sum, last: Sum },
}

/// Collections and the nanoseconds they took.
#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    ns: u64,
}

impl Collectors {
    /// None yet.
    pub(crate) fn at_most(most: usize) -> Self {
        Self { most, processes: HashMap::new(), loaded: None, finished: Vec::new() }
    }

    /// Brings a target up to date, which has started so many programs by now. Tells what goes unseen.
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
            // What the program before it did is not its own.
            *process = Process { execs, ..Process::default() };
            forget(maps, pid);
            // Or what comes next would be counted twice.
            detach::finish(pid);
        }
        process.read_totals(maps, pid);
        if process.is_watched() || process.looks == LOOKS {
            return None;
        }
        // What is mapped now is of the program that it runs now.
        if detach::is_busy() || maps.execs(pid) != Some(execs) {
            return None;
        }
        process.looks += 1;
        // One that is going has nothing mapped any more.
        let found = runtimes.of(&Mappings::of(pid).ok()?);
        let (name, collector) =
            found.into_iter().find_map(|runtime| Some((runtime.name, runtime.collector?)))?;
        let watched = collector.map_err(|why| anyhow!(why)).and_then(|watch| {
            if watched_now >= self.most {
                bail!("no more than {} processes are watched at a time", self.most);
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
                    // The next program has other things at these addresses.
                    forget(maps, pid);
                }
            }
            // It has ended meanwhile.
            Err(_) if !is_there(pid) => {}
            Err(why) => {
                process.looks = LOOKS;
                let source = format!("garbage collections of {name}");
                return Some(Missing { source, reason: format!("{why:#}") });
            }
        }
        None
    }

    /// A target is gone; of so many such the final figures are kept.
    pub(crate) fn exited(&mut self, maps: &mut Maps, pid: u32, keep: usize) {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.read_totals(maps, pid);
        }
        if let Some(figures) = self.figures(maps, pid) {
            self.finished.push((pid, figures));
        }
        let surplus = self.finished.len().saturating_sub(keep);
        self.finished.drain(..surplus);
        self.processes.remove(&pid);
        forget(maps, pid);
    }

    /// Watches a process no longer that goes on.
    pub(crate) fn let_go(&mut self, maps: &mut Maps, pid: u32) {
        self.processes.remove(&pid);
        forget(maps, pid);
    }

    /// What is known of a live target's collections; `None` if nobody watches them.
    fn figures(&self, maps: &Maps, pid: u32) -> Option<Gc> {
        match &self.processes.get(&pid)?.watched {
            Watched::Nothing => None,
            Watched::Pauses(_) => {
                let pause = Histogram::from(&maps.gc_pauses.get(&pid, 0).ok()?);
                Some(Gc { count: pause.count(), seconds: Some(pause.sum()), pause: Some(pause) })
            }
            Watched::Totals { first, last, .. } => {
                // Ruby can be told not to measure.
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

    /// The same of a target, final if it has exited.
    pub(crate) fn latest_figures(&self, maps: &Maps, pid: u32, has_exited: bool) -> Option<Gc> {
        if !has_exited {
            return self.figures(maps, pid);
        }
        self.finished.iter().rev().find(|(of, _)| *of == pid).map(|(_, figures)| figures.clone())
    }
}

impl Process {
    fn is_watched(&self) -> bool {
        !matches!(self.watched, Watched::Nothing)
    }

    /// Reads the totals again, or takes what its reactors read last if they cannot be read any more.
    fn read_totals(&mut self, maps: &Maps, pid: u32) {
        let Watched::Totals { memory, places, last, .. } = &mut self.watched else { return };
        let by_reactors =
            || maps.gc_totals.get(&pid, 0).ok().map(|totals| Sum { count: totals.count, ns: totals.ns });
        if let Some(now) = read(memory, places).or_else(by_reactors).filter(|now| now.count >= last.count) {
            *last = now;
        }
    }
}

/// Loads the programs.
fn load(ebpf: &mut Ebpf) -> Result<()> {
    uprobe::probe().map_err(|why| anyhow!(why))?;
    attach::attach(ebpf, &Types::default(), [&PROBE].into_iter(), &[])?;
    Ok(())
}

/// Begins to watch a process's collector.
fn begin(watch: Watch, ebpf: &mut Ebpf, maps: &mut Maps, pid: u32) -> Result<Watched> {
    match watch {
        Watch::NotYet => Ok(Watched::Nothing),
        Watch::Probes(file, Probes { start, done }) => {
            insert_new(&mut maps.gc_pauses, pid, RawHistogram::EMPTY)?;
            // The end first: of whatever is seen to begin the end is seen, too.
            let mut attached = attach(ebpf, "gc_done", &file, &done, pid)?;
            attached.extend(attach(ebpf, "gc_start", &file, &start, pid)?);
            Ok(Watched::Pauses(attached))
        }
        Watch::Totals(memory, places) => {
            let first = read(&memory, &places).context("its totals cannot be read")?;
            maps.gc_totals.insert(pid, Totals { count: first.count, ns: first.ns, ..places }, 0)?;
            maps.gc_totals_used.set(0, 1, 0)?;
            Ok(Watched::Totals { memory, places, first, last: first })
        }
    }
}

fn attach(ebpf: &Ebpf, program: &str, file: &File, sites: &[Site], pid: u32) -> Result<Vec<Uprobe>> {
    let program: &UProbe = ebpf.program(program).context("no such program")?.try_into()?;
    let program = program.fd()?.as_fd();
    let attached = sites.iter().map(|&site| Uprobe::attach(program, file, site, pid));
    attached.collect::<Result<_, _>>().context("the kernel does not attach to it")
}

/// Ends what the programs know of a process.
fn forget(maps: &mut Maps, pid: u32) {
    let _unless_watched = (maps.gc_pauses.remove(&pid), maps.gc_totals.remove(&pid));
}

/// A process's totals as they are now.
fn read(memory: &Live, places: &Totals) -> Option<Sum> {
    let count = memory.word(places.count_address)?;
    let parts = places.ns_addresses.iter().filter(|&&address| address != 0);
    let ns = parts.map(|&address| memory.word(address)).sum::<Option<u64>>()?;
    Some(Sum { count, ns })
}

/// What a collection in progress has taken by now of the thread's slice in progress, in nanoseconds.
pub(crate) fn in_progress(maps: &Maps, reactor: &Reactor, now: u64) -> u64 {
    if reactor.phase != Phase::Slice as u32 {
        return 0;
    }
    let begun = maps.gc_begun.get(&reactor.tid, 0);
    begun.map_or(0, |Begun { since_ns, .. }| now.saturating_sub(since_ns.max(reactor.phase_since_ns)))
}
