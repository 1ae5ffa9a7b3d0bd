//! `xtask bench`: repeats every figure of cost and writes them down with the machine they are of. Nothing here passes
//! or fails by its figures: they depend on the machine, so they are read by people.

mod bcc;
mod calls;
mod crowd;
mod goals;
mod growth;
mod index;
mod latency;
mod load;
mod machine;
mod page;
mod page_programs;
mod page_servers;
mod process;
mod programs;
mod repeat;
mod servers;
mod start;
mod statistics;
mod throughput;
mod tools;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use self::page::Page;
use crate::shell::is_root;
use crate::workspace::{build, root};
use crate::{observer, packages};

/// What can be measured by itself.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Part {
    /// What eBPF programs cost
    Programs,
    /// What tools of the same purpose cost
    Bcc,
    /// What servers get done beside observer
    Servers,
    /// What grows with what is observed
    Growth,
    /// How long a start takes, and what attaching does to a target
    Start,
}

impl Part {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn about(self) -> &'static str {
        match self {
            Self::Programs => "what each eBPF program takes for an event, beside bpftrace's",
            Self::Servers => "throughput, latency and CPU time of servers under saturating load",
            Self::Bcc => "what the programs of bcc's tools take for an event, where they run",
            Self::Start => {
                "from the start to the first figure; latency of a target while observer comes and goes"
            }
            Self::Growth => {
                "1 to 10,000 threads, 1 to 1,000 listeners and targets, 10 to 100,000 connections a second"
            }
        }
    }

    fn measure(self, bench: &Bench) -> Result<Page> {
        let Bench { observer, cpus, is_quick, .. } = bench;
        let (mut page, cpus) = (Page::default(), *cpus);
        match self {
            Self::Programs => {
                let (rounds, seconds) = if *is_quick { (1, 1) } else { (3, 3) };
                let acceptor = &bench.example("ring_acceptor")?;
                let figures = programs::Bench { observer, acceptor, cpus, rounds, seconds }.run()?;
                page_programs::write(&mut page, &machine::probes(observer)?, &figures, rounds, seconds);
                calls::run(&mut page, observer, if *is_quick { 2 } else { 7 })?;
            }
            Self::Bcc => {
                let (rounds, seconds) = if *is_quick { (1, 1) } else { (3, 2) };
                bcc::Bench { observer, cpus, rounds, seconds }.run(&mut page)?;
            }
            Self::Servers => {
                let (rounds, seconds) = if *is_quick { (2, 1) } else { (16, 2) };
                let figures = throughput::Bench { observer, cpus, rounds, seconds }.run()?;
                page_servers::write(&mut page, &figures, rounds, seconds);
            }
            Self::Start => {
                let (starts, rounds, seconds) = if *is_quick { (3, 1, 1) } else { (15, 4, 2) };
                start::Bench { observer, cpus, starts, rounds, seconds }.run(&mut page)?;
            }
            Self::Growth => {
                let (seconds, scrapes) = if *is_quick { (1, 3) } else { (4, 5) };
                let crowd = &bench.example("crowd")?;
                growth::Bench { observer, crowd, cpus, seconds, scrapes }.run(&mut page)?;
            }
        }
        Ok(page)
    }
}

/// Server and load apart, so that they do not meet on a CPU now and then; on a machine with one they must.
#[derive(Clone, Copy)]
struct Cpus {
    server: Option<u32>,
    load: Option<u32>,
}

/// What all parts have in common.
struct Bench {
    observer: PathBuf,
    /// The tests' programs, by name.
    examples: Vec<(String, PathBuf)>,
    cpus: Cpus,
    is_quick: bool,
}

impl Bench {
    fn example(&self, name: &str) -> Result<PathBuf> {
        let found = self.examples.iter().find(|(example, _)| example == name);
        Ok(found.with_context(|| format!("package observer has no example {name}"))?.1.clone())
    }
}

/// Runs these parts, or all. A quick run proves that all of it works; its figures are printed and not kept.
pub(crate) fn run(parts: &[Part], is_quick: bool) -> Result<()> {
    if !is_root() {
        bail!("eBPF programs can only be measured as root\nby hand: run this command as root");
    }
    let observer = observer::build()?;
    let built = build("build", &["--package", "observer", "--examples"])?;
    let examples = built.into_iter().map(|executable| (executable.name, executable.path)).collect();
    packages::install(&packages::for_bench())?;

    process::catch_signals()?;
    let cpus = machine::cpus()?;
    // Before we are what keeps it busy.
    let machine = machine::describe(&observer, cpus)?;
    let bench = Bench { observer, examples, cpus, is_quick };
    let mut pages = Vec::new();
    for &part in if parts.is_empty() { Part::value_variants() } else { parts } {
        let start = Instant::now();
        let page = part.measure(&bench)?;
        progress(&format!("{} took {} s", part.name(), start.elapsed().as_secs()));
        if is_quick {
            println!("{}", page.finished());
        } else {
            println!("{}", index::keep(root(), part, &machine, &page)?);
        }
        pages.push(page);
    }
    if is_quick {
        print!("{}", index::goals_of(&pages).finished());
    } else {
        println!("{}", index::write(root(), &machine)?);
    }
    Ok(())
}

/// Tells who waits what goes on.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
