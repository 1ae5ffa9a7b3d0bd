//! *process*: follows targets through fork, exec and exit. Its map is the set of targets.

use super::probe::{Events, Hook, Probe, When};

pub(super) const PROBE: Probe = Probe {
    name: "process",
    purpose: "the set of targets: adds children that targets fork, nominates other processes for selection, removes \
              processes that exit",
    since: "5.5",
    when: When::Always,
    cost: "every fork, exec and exit on the machine; one lookup for other processes",
    hooks: &[
        Hook { program: "process_fork", events: Events::Btf(&["sched_process_fork"]) },
        Hook { program: "process_exec", events: Events::Btf(&["sched_process_exec"]) },
        Hook { program: "process_exit", events: Events::Btf(&["sched_process_exit"]) },
    ],
};
