//! `xtask bench`: repeats every figure of cost and writes them down with the machine they are of. Nothing here passes
//! or fails by its figures: they depend on the machine, so they are read by people.

mod latency;
mod part;
mod machine;
mod process;
mod crowd;
mod servers;
mod load;
mod statistics;
mod goals;
mod page;
mod repeat;
mod index;
mod tools;
mod calls;
mod growth;
mod programs;
mod bcc;
mod page_programs;
mod start;
mod throughput;
mod page_servers;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

pub(crate) use self::part::Part;

use self::page::Page;
use self::part::{Cpus, progress};
use crate::shell::is_root;
use crate::workspace::{build, root};
use crate::{observer, packages};

fn measure(part: Part, bench: &Bench) -> Result<Page> {
    let Bench { observer, cpus, is_quick, .. } = bench;
    let (mut page, cpus) = (Page::default(), *cpus);
    match part {
        Part::Programs => {
            let (rounds, seconds) = if *is_quick { (1, 1) } else { (3, 3) };
            let acceptor = &bench.example("ring_acceptor")?;
            let figures = programs::Bench { observer, acceptor, cpus, rounds, seconds }.run()?;
            page_programs::write(&mut page, &machine::probes(observer)?, &figures, rounds, seconds);
            calls::run(&mut page, observer, if *is_quick { 2 } else { 7 })?;
        }
        Part::Bcc => {
            let (rounds, seconds) = if *is_quick { (1, 1) } else { (3, 2) };
            bcc::Bench { observer, cpus, rounds, seconds }.run(&mut page)?;
        }
        Part::Servers => {
            let (rounds, seconds) = if *is_quick { (2, 1) } else { (16, 2) };
            let figures = throughput::Bench { observer, cpus, rounds, seconds }.run()?;
            page_servers::write(&mut page, &figures, rounds, seconds);
        }
        Part::Start => {
            let (starts, rounds, seconds) = if *is_quick { (3, 1, 1) } else { (15, 4, 2) };
            start::Bench { observer, cpus, starts, rounds, seconds }.run(&mut page)?;
        }
        Part::Growth => {
            let (seconds, scrapes) = if *is_quick { (1, 3) } else { (4, 5) };
            let crowd = &bench.example("crowd")?;
            growth::Bench { observer, crowd, cpus, seconds, scrapes }.run(&mut page)?;
        }
    }
    Ok(page)
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
        let page = measure(part, &bench)?;
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
