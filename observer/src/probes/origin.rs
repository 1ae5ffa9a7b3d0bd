//! *origin*: requests that arrive on connections which a target has accepted, for the work that is put off for them.

use std::sync::OnceLock;

use super::probe::{Events, Hook, Probe, When};
use crate::{
    kernel::clock,
    model::request::{Head, Request},
};
use observer_common::origin::Request as Raw;

pub(super) const PROBE: Probe = Probe {
    name: "origin",
    purpose: "requests, as far as deferred work or a stall is due to them: method, path without query, trace context",
    since: "5.10",
    when: When::Deferring,
    cost: "every read, recvfrom, recvmsg, readv, write, writev, sendto, sendmsg and sendfile on the machine looks into a map; reads of targets whose deferred work is followed copy the first KiB of each request, and the first write of each answer takes 0.3 us more",
    hooks: &[
        Hook {
            program: "received_exit",
            events: Events::Plain(&[("syscalls", "sys_exit_read"), ("syscalls", "sys_exit_recvfrom")]),
        },
        Hook { program: "received_parts_exit", events: Events::Plain(&[("syscalls", "sys_exit_readv")]) },
        Hook { program: "received_message_exit", events: Events::Plain(&[("syscalls", "sys_exit_recvmsg")]) },
        Hook {
            program: "answer_enter",
            events: Events::Plain(&[
                ("syscalls", "sys_enter_write"),
                ("syscalls", "sys_enter_writev"),
                ("syscalls", "sys_enter_sendto"),
                ("syscalls", "sys_enter_sendmsg"),
                ("syscalls", "sys_enter_sendfile64"),
            ]),
        },
    ],
};

/// What a request asked for.
pub(crate) fn decode(raw: &Raw) -> Request {
    let kept = usize::try_from(raw.kept).unwrap_or(0).min(raw.bytes.len());
    let Head { method, path, traceparent } =
        Head::of(&raw.bytes[..kept], usize::try_from(raw.received).unwrap_or(usize::MAX));
    let answered = OnceLock::new();
    if raw.answered_ns != 0 {
        let _first = answered.set(raw.answered_ns);
    }
    Request {
        id: raw.id,
        time: clock::written(raw.at_ns),
        at_ns: raw.at_ns,
        answered,
        method,
        path,
        traceparent,
    }
}
