//! observer: tells, from outside, how late an event-loop server is and why.
//!
//! Data flows one way, and the folders show it: `probes` (kernel) -> `read` -> `model` -> `export`;
//! `observation` holds it together, `kernel` and `target` know the surroundings.

mod cli;
mod commands;
mod config;
mod demo;
mod export;
mod failure;
mod finding;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod heap;
mod kernel;
mod manual;
mod model;
mod observation;
mod probes;
mod profiles;
mod read;
mod run;
mod stacks;
mod target;

use std::{io, process::ExitCode};

use anyhow::Result;
use clap::{CommandFactory as _, FromArgMatches as _, parser::ValueSource};

use cli::{Cli, Command};
use export::plain::clean_lines;

/// Does what the command line asks for. Errors end up on standard error, and in the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let is_given = |setting: &str| {
        matches.try_contains_id(setting).is_ok()
            && matches.value_source(setting) == Some(ValueSource::CommandLine)
    };
    let code = match dispatch(cli, is_given) {
        Ok(code) => code,
        // Whoever read the output has had enough, as `head` has.
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

fn dispatch(cli: Cli, is_given: impl Fn(&str) -> bool) -> Result<ExitCode> {
    match cli.command {
        None => run::observe(cli.observe, is_given),
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
