//! observer measures from outside how late an event-loop server is, and why.
//!
//! Data flows one way and imports the other: a module uses only modules that are declared before it, and never the
//! file that declares it. `xtask/tests/modules.rs` checks this here and in every folder.

// Utilities for all modules.
mod sanitize;
mod failure;
mod check_result;
mod heap;
mod setting;
mod signals;
#[cfg(test)]
mod generated;

// Files and memory of processes, and what depends on the architecture.
mod binary;
mod arch;

// The data model.
mod model;

// The running kernel, and the maps that the eBPF programs share with observer.
mod kernel;
mod read;

// The processes under observation.
mod stacks;
mod profiles;
mod process;

// From maps to snapshots, and from snapshots to reports and exporters.
mod probes;
mod observation;
mod export;

// The command line and what it runs.
mod cli;
mod config;
mod manual;
mod commands;
mod worker;
mod run;
mod demo;

#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;

use std::{env, io, process::ExitCode};

use anyhow::Result;

use cli::{Cli, Command, CommandLine};
use sanitize::clean_lines;

/// Runs what the command line asks for. Errors are printed on standard error and set the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let (line, cli) = CommandLine::parse(env::args_os()).unwrap_or_else(|error| error.exit());
    let code = match dispatch(cli, &line) {
        Ok(code) => code,
        // The reader of the output has closed it, as `head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("observer: {}", clean_lines(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    };
    run::wait_for_removal();
    code
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let json = error.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
    io.or(json) == Some(io::ErrorKind::BrokenPipe)
}

fn dispatch(cli: Cli, line: &CommandLine) -> Result<ExitCode> {
    match cli.command {
        None => run::observe(cli.observe, line),
        Some(Command::Check(check)) => commands::check(check.pid, &check.known),
        Some(Command::Probes) => commands::probes(),
        Some(Command::Profiles) => commands::profiles(),
        Some(Command::Metrics) => commands::metrics(),
        Some(Command::Completions(asked)) => commands::completions(asked.shell),
        Some(Command::Man) => commands::manual(),
        Some(Command::Demo(demo)) => demo::run(demo.output),
        Some(Command::DemoServer) => demo::server::run(),
    }
}
