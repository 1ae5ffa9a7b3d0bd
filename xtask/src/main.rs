//! `cargo xtask`: everything about this repository that is not plain `cargo build`.
//! One subcommand each; the modules below hold the work, this file only the command line. A module uses only those declared
//! before it.

mod workspace;
mod shell;
mod pins;
mod packages;
mod toolchain;
mod python;
mod observer;
mod results;
mod report;
mod dashboards;
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
mod nextest;
mod suite;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::kernel::Series;
use crate::suite::{Machine, Options};

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
    /// Run what CI runs: lints, the tests against real servers here, a short contract on each kernel.
    Test {
        /// Run every test on every kernel, on the newest one that Debian has as well.
        #[arg(long)]
        full: bool,
        /// Repeat the tests N times without reruns and print how often each failed.
        #[arg(long, value_name = "N")]
        soak: Option<u32>,
        /// Where to run the tests; may be repeated.
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
        Command::Bench { parts, quick } => bench::run(&parts, quick)?,
        Command::Fuzz { targets, seconds } => return fuzz::run(&targets, seconds),
        Command::Vm { kernel, command } => return vm::enter(kernel, &command),
        Command::Test { full, soak, machines, names } => {
            return Ok(suite::run(&Options { full, soak, machines, names }));
        }
    }
    Ok(ExitCode::SUCCESS)
}
