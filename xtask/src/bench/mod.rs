//! `xtask bench`: repeats every figure of cost and writes them down with the machine they are of. Nothing here passes
//! or fails by its figures: they depend on the machine, so they are read by people.

mod load;
mod machine;
mod page;
mod process;
mod programs;
mod servers;
mod statistics;
mod throughput;
mod tools;

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::shell::is_root;
use crate::workspace::{build, root};
use crate::{observer, packages};

/// Where the figures go, in the repository.
const PAGE: &str = "docs/benchmarks.md";

/// Server and load apart, so that they do not meet on a CPU now and then; on a machine with one they must.
#[derive(Clone, Copy)]
struct Cpus {
    server: Option<u32>,
    load: Option<u32>,
}

/// How often and how long.
struct Plan {
    program_rounds: usize,
    program_seconds: u64,
    server_rounds: usize,
    server_seconds: u64,
}

const FULL: Plan = Plan { program_rounds: 3, program_seconds: 3, server_rounds: 15, server_seconds: 2 };
const QUICK: Plan = Plan { program_rounds: 1, program_seconds: 1, server_rounds: 3, server_seconds: 1 };

/// Runs everything. A quick run proves that all of it works; its figures are printed and not kept.
pub(crate) fn run(is_quick: bool) -> Result<()> {
    if !is_root() {
        bail!("eBPF programs can only be measured as root\nby hand: run this command as root");
    }
    let observer = observer::build()?;
    let built = build("build", &["--package", "observer", "--example", "ring_acceptor"])?;
    let acceptor = built.into_iter().find(|executable| executable.name == "ring_acceptor");
    let acceptor = acceptor.context("package observer has no example ring_acceptor")?.path;
    packages::install(&packages::for_bench())?;

    process::catch_signals()?;
    let start = Instant::now();
    let cpus = machine::cpus()?;
    // Before we are what keeps it busy.
    let surroundings = machine::describe(&observer, cpus)?;
    let plan = if is_quick { QUICK } else { FULL };
    let (rounds, seconds) = (plan.program_rounds, plan.program_seconds);
    let programs =
        programs::Bench { observer: &observer, acceptor: &acceptor, cpus, rounds, seconds }.run()?;
    let (rounds, seconds) = (plan.server_rounds, plan.server_seconds);
    let servers = throughput::Bench { observer: &observer, cpus, rounds, seconds }.run()?;

    let probes = machine::probes(&observer)?;
    let page = page::write(&plan, &surroundings, &probes, &programs, &servers);
    if is_quick {
        print!("{page}");
    } else {
        fs::write(root().join(PAGE), page).with_context(|| format!("cannot write {PAGE}"))?;
        println!("{PAGE}");
    }
    progress(&format!("took {} s", start.elapsed().as_secs()));
    Ok(())
}

/// Tells who waits what goes on.
fn progress(what: &str) {
    eprintln!("bench: {what}");
}
