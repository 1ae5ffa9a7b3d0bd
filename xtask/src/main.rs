//! `cargo xtask`: everything about this repository that is not plain `cargo build`.
//! One subcommand each; the modules below hold the work, this file only the command line.

mod bench;
mod dashboards;
mod dependencies;
mod dist;
mod documents;
mod fuzz;
mod guest;
mod image;
mod kernel;
mod manifests;
mod observer;
mod packages;
mod python;
mod report;
mod shell;
mod suite;
mod tally;
mod toolchain;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::kernel::Series;
use crate::suite::Machine;

/// Builds, tests and tries out observer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install what building eBPF programs needs.
    Setup,
    /// Build the static observer binary.
    Build,
    /// Make what is handed out: a static binary with documents, manifests and dashboards, checksums, a bill of materials.
    Dist,
    /// Build observer and run its demo (as root, through sudo where needed).
    Demo {
        /// Passed on to `observer demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Boot a Debian kernel in QEMU with observer aboard; without a command, to a shell.
    Vm {
        /// Which kernel.
        kernel: Series,
        /// What to run there, as root; its exit code becomes this command's.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Write docs/metrics.md and the dashboards anew.
    Docs,
    /// Measure what observer costs and write docs/benchmarks.md (as root; half an hour, more on a busy machine).
    Bench {
        /// What to measure; everything if nothing is named.
        parts: Vec<bench::Part>,
        /// Only try out that it works: few and short rounds, whose figures are printed and not kept.
        #[arg(long)]
        quick: bool,
    },
    /// Feed the parsers of foreign bytes with what a fuzzer makes up.
    Fuzz {
        /// Which parsers; all if none is named.
        targets: Vec<String>,
        /// How long each is fed.
        #[arg(long, default_value_t = 600)]
        seconds: u32,
    },
    /// Run everything that CI runs.
    Test {
        /// Where to run the tests; may be repeated, default is everywhere.
        #[arg(long = "kernel", value_name = "KERNEL")]
        machines: Vec<Machine>,
        /// Run only the tests whose name contains this.
        filter: Option<String>,
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
        Command::Bench { parts, quick } => bench::run(&parts, quick)?,
        Command::Fuzz { targets, seconds } => return fuzz::run(&targets, seconds),
        Command::Vm { kernel, command } => return vm::enter(kernel, &command),
        Command::Test { machines, filter } => return Ok(suite::run(&machines, filter.as_deref())),
    }
    Ok(ExitCode::SUCCESS)
}
