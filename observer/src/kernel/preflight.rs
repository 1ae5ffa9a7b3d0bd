//! What must hold before anything is loaded: rights and the pid namespace. Each no comes with its cure.

use std::os::unix::fs::MetadataExt as _;

use caps::{CapSet, Capability};

/// Inode number of the initial pid namespace, fixed in the kernel (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// One requirement on whoever runs observer.
pub(crate) struct Requirement {
    /// What is required.
    pub(crate) name: &'static str,
    /// What does not work without it.
    pub(crate) purpose: &'static str,
    /// What to do if it is missing.
    pub(crate) cure: &'static str,
    met: fn() -> bool,
}

impl Requirement {
    /// Whether this process meets it.
    pub(crate) fn is_met(&self) -> bool {
        (self.met)()
    }
}

/// All of them. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, as it does in the kernel.
pub(crate) const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        name: "CAP_BPF",
        purpose: "load eBPF programs and maps",
        cure: "run observer as root, for example with sudo",
        met: || has(Capability::CAP_BPF) || has(Capability::CAP_SYS_ADMIN),
    },
    Requirement {
        name: "CAP_PERFMON",
        purpose: "attach to tracepoints, read kernel memory",
        cure: "run observer as root, for example with sudo",
        met: || has(Capability::CAP_PERFMON) || has(Capability::CAP_SYS_ADMIN),
    },
    Requirement {
        name: "CAP_SYS_PTRACE",
        purpose: "see the sockets and calls of other users' processes in /proc",
        cure: "run observer as root, for example with sudo",
        met: || has(Capability::CAP_SYS_PTRACE),
    },
    Requirement {
        name: "initial pid namespace",
        purpose: "tell processes by the same ids as the kernel",
        cure: "run observer on the host, or its container with the host's pid namespace (hostPID, --pid=host)",
        met: || {
            std::fs::metadata("/proc/self/ns/pid")
                .is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE)
        },
    },
];

/// A capability counts when it is effective; a process whose capabilities cannot be read has none.
fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}
