//! *ring*: accepts through io_uring. Their waits are counted in the listener's entry, which `listener.rs` decodes.

use super::probe::{Events, Hook, Probe, When};

pub(super) const PROBE: Probe = Probe {
    name: "ring",
    purpose: "connections that targets accept through io_uring",
    since: "5.10 with the io_uring of 5.15, as in Debian, or 6.0",
    when: When::RingsUnderstood,
    cost: "every io_uring operation on the machine; one lookup for those that are not accepts",
    hooks: &[
        Hook { program: "ring_submit", events: Events::Btf(&["io_uring_submit_req", "io_uring_submit_sqe"]) },
        Hook { program: "ring_wakeup", events: Events::Btf(&["io_uring_task_add"]) },
        Hook { program: "ring_complete", events: Events::Btf(&["io_uring_complete"]) },
    ],
};
