//! Tests that drive the real binary against real servers; they need root. One file a probe, and one each for the
//! command line and for what comes out. They run one at a time, because they share the machine's scheduler.

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
mod stacks;
mod stalls;
mod support;
mod symbols;

fn main() -> std::process::ExitCode {
    harness::run()
}
