//! *process*: follows targets through fork and exit. Its map is the set of targets itself.

use super::probe::{Events, Hook, Probe, When};

pub(super) const PROBE: Probe = Probe {
    name: "process",
    purpose: "which processes are targets: children that targets fork join, others come up for selection, processes that \
              exit leave",
    since: "5.5",
    when: When::Always,
    cost: "every fork, exec and exit on the machine; one look-up for a stranger's",
    hooks: &[
        Hook { program: "process_fork", events: Events::Btf(&["sched_process_fork"]) },
        Hook { program: "process_exec", events: Events::Btf(&["sched_process_exec"]) },
        Hook { program: "process_exit", events: Events::Btf(&["sched_process_exit"]) },
    ],
};
