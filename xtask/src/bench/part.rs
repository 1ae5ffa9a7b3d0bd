//! The parts of the benchmark, and what they have in common.

use clap::ValueEnum;

/// What can be measured by itself.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Part {
    /// What eBPF programs cost
    Programs,
    /// What tools of the same purpose cost
    Bcc,
    /// What servers get done beside observer
    Servers,
    /// What grows with what is observed
    Growth,
    /// How long a start takes, and what attaching does to a target
    Start,
}

impl Part {
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(super) fn about(self) -> &'static str {
        match self {
            Self::Programs => "what each eBPF program takes for an event, beside bpftrace's",
            Self::Servers => "throughput, latency and CPU time of servers under saturating load",
            Self::Bcc => "what the programs of bcc's tools take for an event, where they run",
            Self::Start => {
                "from the start to the first figure; latency of a target while observer comes and goes"
            }
            Self::Growth => {
                "1 to 10,000 threads, 1 to 1,000 listeners and targets, 10 to 100,000 connections a second"
            }
        }
    }
}

/// Server and load apart, so that they do not meet on a CPU now and then; on a machine with one they must.
#[derive(Clone, Copy)]
pub(super) struct Cpus {
    pub(super) server: Option<u32>,
    pub(super) load: Option<u32>,
}

/// Tells who waits what goes on.
pub(super) fn progress(what: &str) {
    eprintln!("bench: {what}");
}
