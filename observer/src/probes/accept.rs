//! *accept*: connections that wait for a target to accept them.

use observer_common::accept::Listener as Raw;

use super::{Events, Hook, Probe};
use crate::model::{histogram::Histogram, snapshot::Listener};

pub(super) const PROBE: Probe = Probe {
    name: "accept",
    purpose: "accept queues: how many connections wait, how long, against which limit",
    since: "5.5",
    cost: "every accept call and TCP state change on the machine; one look-up for a stranger's",
    hooks: &[
        Hook { program: "sock_state", events: Events::Btf("inet_sock_set_state") },
        Hook {
            program: "accept_enter",
            events: Events::Plain(&[("syscalls", "sys_enter_accept4"), ("syscalls", "sys_enter_accept")]),
        },
        Hook {
            program: "accept_exit",
            events: Events::Plain(&[("syscalls", "sys_exit_accept4"), ("syscalls", "sys_exit_accept")]),
        },
    ],
};

/// What `/proc` and sock_diag know of a listener.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// Process it is listed with.
    pub(crate) owner: u32,
    /// Where it listens.
    pub(crate) address: String,
    /// Connections that waited when it was first seen.
    pub(crate) depth_before: u32,
    /// Connections that wait now, or did when it was last seen.
    pub(crate) depth: u32,
    /// Most connections that sampling saw waiting.
    pub(crate) peak: u32,
    /// Most connections that may wait.
    pub(crate) limit: u32,
    /// Its last figures, if it no longer listens.
    pub(crate) closed: Option<Box<Raw>>,
}

/// A listener's figures. Whatever joined the queue has either been accepted or still waits, so arrivals
/// follow from accepts and depths on every kernel, without a hook on the arrivals themselves.
pub(crate) fn decode(known: &Known, raw: &Raw) -> Listener {
    Listener {
        protocol: "tcp",
        address: known.address.clone(),
        member: None,
        limit: known.limit,
        depth: known.depth,
        peak: known.peak.max(raw.depth_peak),
        arrivals: (raw.accepts + u64::from(known.depth)).saturating_sub(known.depth_before.into()),
        accepts: raw.accepts,
        accepts_unknown_wait: raw.accepts_without_arrival,
        wait: Histogram::from(&raw.wait),
        closed: known.closed.is_some(),
    }
}
