//! Measures what observer costs and writes the results to `docs/benchmarks.md` and `docs/benchmarks/`.
//!
//! `cargo xtask bench` builds observer and this program, installs the servers and tools that the benchmarks run, and
//! starts this program in the root of the repository. No result makes a run fail: results depend on the machine and
//! are read by people.

mod part;
mod latency;
mod process;
mod machine;
mod crowd;
mod servers;
mod load;
mod statistics;
mod goals;
mod page;
mod comparison;
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

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum as _};

use crate::page::Page;
use crate::part::{Cpus, Part, progress};

/// Measures what observer costs. Started by `cargo xtask bench`.
#[derive(Parser)]
struct Options {
    /// Parts to measure. Without any, all parts are measured.
    parts: Vec<Part>,
    /// Run few and short rounds, print the results and write no files.
    #[arg(long)]
    quick: bool,
    /// The observer binary.
    #[arg(long)]
    observer: PathBuf,
    /// observer's example `crowd`.
    #[arg(long)]
    crowd: PathBuf,
    /// observer's example `ring_acceptor`.
    #[arg(long)]
    ring_acceptor: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    process::catch_signals()?;
    let cpus = machine::cpus()?;
    // Before the benchmarks add to the machine's load.
    let machine = machine::describe(&options.observer, cpus)?;
    let root = Path::new(".");
    let mut pages = Vec::new();
    for &part in if options.parts.is_empty() { Part::value_variants() } else { &options.parts } {
        let start = Instant::now();
        let page = measure(part, options, cpus)?;
        progress(&format!("{} took {} s", part.name(), start.elapsed().as_secs()));
        if options.quick {
            println!("{}", page.finished());
        } else {
            println!("{}", index::save_part(root, part, &machine, &page)?);
        }
        pages.push(page);
    }
    if options.quick {
        print!("{}", index::goals_of(&pages).finished());
    } else {
        println!("{}", index::save_index(root, &machine)?);
    }
    Ok(())
}

fn measure(part: Part, options: &Options, cpus: Cpus) -> Result<Page> {
    let Options { observer, quick, .. } = options;
    let mut page = Page::default();
    match part {
        Part::Programs => {
            let (rounds, seconds) = if *quick { (1, 1) } else { (3, 3) };
            let acceptor = &options.ring_acceptor;
            let results = programs::Bench { observer, acceptor, cpus, rounds, seconds }.run()?;
            page_programs::write(&mut page, &machine::hooks(observer)?, &results, rounds, seconds);
            calls::run(&mut page, observer, if *quick { 2 } else { 7 })?;
        }
        Part::Bcc => {
            let (rounds, seconds) = if *quick { (1, 1) } else { (3, 2) };
            bcc::Bench { observer, cpus, rounds, seconds }.run(&mut page)?;
        }
        Part::Servers => {
            let (rounds, seconds) = if *quick { (2, 1) } else { (16, 2) };
            let results = throughput::Bench { observer, cpus, rounds, seconds }.run()?;
            page_servers::write(&mut page, &results, rounds, seconds);
        }
        Part::Start => {
            let (starts, rounds, seconds) = if *quick { (3, 1, 1) } else { (15, 4, 2) };
            start::Bench { observer, cpus, starts, rounds, seconds }.run(&mut page)?;
        }
        Part::Growth => {
            let (seconds, scrapes) = if *quick { (1, 3) } else { (4, 5) };
            let crowd = &options.crowd;
            growth::Bench { observer, crowd, cpus, seconds, scrapes }.run(&mut page)?;
        }
    }
    Ok(page)
}
