//! *accept*: connections that wait in targets' accept queues. Their waits are counted in the listener's entry, which
//! `listener.rs` decodes.

use super::probe::{Events, Hook, Probe, When};

pub(super) const PROBE: Probe = Probe {
    name: "accept",
    purpose: "how long connections wait to be accepted, and the queue's depth at each accept",
    since: "5.5",
    when: When::Always,
    cost: "every accept call and TCP state change on the machine; one lookup for other processes",
    hooks: &[
        Hook { program: "sock_state", events: Events::Btf(&["inet_sock_set_state"]) },
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
