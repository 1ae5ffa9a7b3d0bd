//! *origin*: requests on connections that a target accepted, as origins of deferred tasks and stalls.

use std::sync::OnceLock;

use super::probe::{Events, Hook, Probe, When};
use crate::{
    kernel::clock,
    model::request::{Head, Request},
};
use observer_common::origin::Request as Raw;

pub(super) const PROBE: Probe = Probe {
    name: "origin",
    purpose: "requests that enqueue deferred tasks or stall: method, path without query, trace context",
    since: "5.10",
    when: When::Deferring,
    cost: "one map lookup for every read, recvfrom, recvmsg, readv, write, writev, sendto, sendmsg and sendfile on the machine; reads of targets whose deferred tasks are followed copy the first KiB of each request, and the first write of each answer takes another 0.3 us",
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

/// Decodes a request: method, path and trace context of its first bytes.
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
