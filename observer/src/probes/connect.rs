//! *connect*: time stamps of connections to targets' unix sockets. Their waits are counted in the listener's entry, which
//! `listener.rs` decodes.

use super::probe::{Events, Hook, Probe, When};

pub(super) const PROBE: Probe = Probe {
    name: "connect",
    purpose: "how long connections to unix sockets wait to be accepted",
    since: "5.5",
    when: When::UnixListener,
    cost: "every connect call on the machine, from when a target listens on a unix socket",
    hooks: &[
        Hook { program: "connect_enter", events: Events::Plain(&[("syscalls", "sys_enter_connect")]) },
        Hook { program: "connect_exit", events: Events::Plain(&[("syscalls", "sys_exit_connect")]) },
    ],
};
