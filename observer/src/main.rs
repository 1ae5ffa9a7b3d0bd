//! observer: tells, from outside, how late an event-loop server is and why.
//!
//! Data flows one way, and the folders show it: `probes` (kernel) -> `read` -> `model` -> `export`;
//! `observation` holds it together, `kernel` and `target` know the surroundings.

mod cli;
mod commands;
mod demo;
mod export;
mod failure;
mod kernel;
mod model;
mod observation;
mod probes;
mod read;
mod run;
mod target;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser as _;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("observer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        None => run::observe(&cli.observe),
        Some(Command::Check) => Ok(commands::check()),
        Some(Command::Probes) => commands::probes(),
        Some(Command::Demo(demo)) => demo::run(demo.output),
        Some(Command::DemoServer) => demo::server::run(),
    }
}
