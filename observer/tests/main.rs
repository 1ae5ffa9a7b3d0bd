//! Tests that run the observer binary against real servers, as root. There is a file for each probe, for the command
//! line and for each output. How many run concurrently is configured in `.config/nextest.toml`.

#[macro_use]
extern crate real_test;

mod accept;
mod calls;
mod causes;
mod churn;
mod cli;
mod clocks;
mod config;
mod container;
mod context;
mod contract;
mod deferred;
mod deferred_rage;
mod deploy;
mod detach;
mod drops;
mod endpoint;
mod exports;
mod faults;
mod flood;
mod gc;
mod harness;
mod lag;
mod listener;
mod live;
mod multipath;
mod namespaces;
mod otlp;
mod otlp_traces;
mod process;
mod prometheus;
mod reactor;
mod reactors;
mod rights;
mod ring;
mod selection;
mod servers;
mod shared_sets;
mod stacks;
mod stalls;
mod support;
mod symbols;
mod workers;
mod zoo;

fn main() -> std::process::ExitCode {
    harness::run()
}
