//! The probes: what each measures, what it attaches to, and what that costs. [`PROBES`] lists them; each probe's file
//! also decodes the maps of its programs.

mod probe;
mod attach;
pub(crate) mod process;
pub(crate) mod listener;
pub(crate) mod accept;
pub(crate) mod ring;
pub(crate) mod connect;
pub(crate) mod gc;
pub(crate) mod reactor;
pub(crate) mod origin;
pub(crate) mod deferred;

use anyhow::Result;
use aya::Ebpf;

use crate::{model::snapshot::Missing, process::wait_call::WaitCall};

pub(crate) use attach::Types;
pub(crate) use probe::{Events, Probe, When};

/// All probes, in the order in which they are attached.
pub(crate) const PROBES: &[Probe] = &[
    process::PROBE,
    listener::PROBE,
    accept::PROBE,
    ring::PROBE,
    connect::PROBE,
    gc::PROBE,
    reactor::PROBE,
    origin::PROBE,
    deferred::PROBE,
];

/// Loads and attaches the programs of all probes with this `when`; of waits for events, only those for `calls`.
pub(crate) fn attach(ebpf: &mut Ebpf, types: &Types, when: When, calls: &[WaitCall]) -> Result<Vec<Missing>> {
    attach::attach(ebpf, types, PROBES.iter().filter(|probe| probe.when == when), calls)
}
