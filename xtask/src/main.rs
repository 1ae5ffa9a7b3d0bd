//! `cargo xtask`: build, test, package and benchmark tasks that plain `cargo build` does not cover.
//! This file is the command line; each subcommand has a module. A module may use only the modules declared before it.

mod workspace;
mod shell;
mod pins;
mod packages;
mod toolchain;
mod python;
mod observer;
mod results;
mod report;
mod documents;
mod dependencies;
mod manifests;
mod dist;
mod bench;
mod fuzz;
mod image;
mod kernel;
mod guest;
mod vm;
mod ledger;
mod nextest;
mod suite;
mod zoo;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::kernel::Series;
use crate::suite::{Machine, Options};

/// Builds, tests and benchmarks observer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install the toolchain that builds the eBPF programs.
    Setup,
    /// Build the static observer binary.
    Build,
    /// Build the release archive: static binary, documents, manifests, dashboards, checksums and SBOM.
    Dist,
    /// Build observer and run its demo (as root, through sudo where needed).
    Demo {
        /// Arguments for `observer demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Boot a Debian kernel in QEMU with observer installed and run a command there, or a shell if none is given.
    Vm {
        /// Kernel to boot.
        kernel: Series,
        /// Command to run in the guest as root; its exit code becomes the exit code of xtask.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Generate docs/metrics.md, docs/report.schema.json and docs/live.svg.
    Docs,
    /// Measure what observer costs and write docs/benchmarks.md. Takes half an hour or more; requires root.
    Bench {
        /// Parts to measure. Without any, all parts are measured.
        #[arg(value_parser = bench::PARTS)]
        parts: Vec<String>,
        /// Run few and short rounds, print the results and write no files.
        #[arg(long)]
        quick: bool,
    },
    /// Count the instructions that observer adds to system calls, waits and switches, in an emulated guest.
    Ledger {
        /// Write the counts to bench/ledger.json.
        #[arg(long)]
        update: bool,
    },
    /// Fuzz the parsers of untrusted input.
    Fuzz {
        /// Fuzz targets to run; all if omitted.
        targets: Vec<String>,
        /// Seconds to fuzz each target.
        #[arg(long, default_value_t = 600)]
        seconds: u32,
    },
    /// Run what CI runs: lints, the tests on this machine, and the kernel contract tests on each kernel.
    Test {
        /// Run every test on every kernel, including the newest kernel in Debian.
        #[arg(long)]
        full: bool,
        /// Run only the zoo, real servers of many kinds, which is installed; write what was seen to docs/servers.md.
        #[arg(long, conflicts_with_all = ["full", "soak", "machines", "names"])]
        zoo: bool,
        /// Repeat the tests N times without reruns and print how often each failed.
        #[arg(long, value_name = "N")]
        soak: Option<u32>,
        /// Where to run the tests; can be given several times.
        #[arg(long = "kernel", value_name = "KERNEL")]
        machines: Vec<Machine>,
        /// Run only the tests whose names contain one of these, and no lints.
        names: Vec<String>,
    },
}

fn main() -> ExitCode {
    run(Cli::parse().command).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => toolchain::setup()?,
        Command::Build => observer::build_and_print()?,
        Command::Dist => dist::make()?,
        Command::Demo { args } => return Err(observer::demo(&args)),
        Command::Docs => documents::write()?,
        Command::Bench { parts, quick } => return Err(bench::run(&parts, quick)),
        Command::Ledger { update } => ledger::run(update)?,
        Command::Fuzz { targets, seconds } => return fuzz::run(&targets, seconds),
        Command::Vm { kernel, command } => return vm::enter(kernel, &command),
        Command::Test { zoo: true, .. } => return zoo::run(),
        Command::Test { full, soak, machines, names, .. } => {
            return Ok(suite::run(&Options { full, soak, machines, names }));
        }
    }
    Ok(ExitCode::SUCCESS)
}
