//! The parts of the benchmark, and what they share.

use clap::ValueEnum;

/// A part that can be measured on its own.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Part {
    /// Cost of observer's eBPF programs
    Programs,
    /// Cost of bcc's tools
    Bcc,
    /// Throughput of servers while observer runs
    Servers,
    /// Costs that grow with the number of observed threads, listeners, processes and connections
    Growth,
    /// Time to start, and the effect of attaching on a target
    Start,
}

impl Part {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Its entry in the list of parts.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Self::Programs => "run time of each eBPF program per event, compared with bpftrace",
            Self::Servers => "throughput, latency and CPU time of servers under saturating load",
            Self::Bcc => "run time of the programs of bcc's tools per event, where they run",
            Self::Start => {
                "time from the start to the first metric; latency of a target while observer attaches and detaches"
            }
            Self::Growth => {
                "1 to 10,000 threads, 1 to 1,000 listeners and targets, 10 to 100,000 connections per second"
            }
        }
    }
}

/// The CPUs of the server and of the load generator: two different ones, so that they never compete. None on a machine
/// with a single CPU.
#[derive(Clone, Copy)]
pub(crate) struct Cpus {
    pub(crate) server: Option<u32>,
    pub(crate) load: Option<u32>,
}

/// Prints what is being measured.
pub(crate) fn progress(what: &str) {
    eprintln!("bench: {what}");
}
