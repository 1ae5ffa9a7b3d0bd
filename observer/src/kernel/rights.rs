//! The capabilities that observer needs, what each is for, and how all others are dropped. The manifests in `deploy/`
//! grant exactly these.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};
use nix::{sys::prctl::set_no_new_privs, unistd::geteuid};

use super::layout;

/// A capability that observer needs.
pub(crate) struct Right {
    pub(crate) capability: Capability,
    /// What it is needed for, and what is not observed without it.
    pub(crate) purpose: &'static str,
    /// Whether observer cannot run without it.
    pub(crate) required: bool,
    /// Whether it is kept after attaching.
    kept: bool,
}

/// All capabilities. `CAP_SYS_ADMIN` implies the first two, as in the kernel.
pub(crate) const RIGHTS: &[Right] = &[
    Right {
        capability: Capability::CAP_BPF,
        purpose: "loading eBPF programs and maps",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_PERFMON,
        purpose: "attaching to tracepoints, reading kernel memory",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_ADMIN,
        purpose: "deferred tasks, collections of CPython and V8; kernel stacks of blocked threads; tracepoints where kernel.perf_event_paranoid is above 2",
        required: false,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_PTRACE,
        purpose: "sockets, system calls and memory of other users' processes",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_DAC_READ_SEARCH,
        purpose: "other users' files: descriptors in /proc, executables and their symbols",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYSLOG,
        purpose: "names of kernel functions where kernel.kptr_restrict hides them",
        required: false,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_RESOURCE,
        purpose: "memory for maps before Linux 5.11, where they count as locked memory",
        required: false,
        kept: false,
    },
];

impl Right {
    /// Checks that this process has the capability, or does not need it here. An error says why not.
    pub(crate) fn probe(&self) -> Result<(), String> {
        let is_implied = matches!(self.capability, Capability::CAP_BPF | Capability::CAP_PERFMON)
            && has(Capability::CAP_SYS_ADMIN);
        let is_needless =
            self.capability == Capability::CAP_SYS_RESOURCE && !layout::maps_are_locked_memory();
        if is_implied || is_needless || has(self.capability) {
            return Ok(());
        }
        let user = geteuid();
        Err(if user.is_root() {
            "running as root without this capability: in a container, or it was dropped".into()
        } else {
            format!("running as user {user}, not root")
        })
    }

    /// What to do if the capability is missing.
    pub(crate) fn cure(&self) -> String {
        let name = self.capability.to_string();
        let short = name.trim_start_matches("CAP_");
        format!("run observer as root, for example with sudo; in a container, add the capability {short}")
    }
}

/// Whether this thread has a capability in its effective set; `false` if it cannot be read.
fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// Drops all capabilities that are not needed after attaching, for good: for the calling thread and threads that it
/// starts later. Processes that start later still need most capabilities.
pub(crate) fn drop_others() -> Result<()> {
    let kept = RIGHTS.iter().filter(|right| right.kept).map(|right| right.capability);
    drop_all_but(&kept.collect()).context("cannot drop capabilities that are not needed")
}

fn drop_all_but(kept: &CapsHashSet) -> Result<()> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.intersection(&permitted).copied().collect();
    set_no_new_privs()?;
    // The bounding set limits what another program could regain on execve, which observer never calls.
    if has(Capability::CAP_SETPCAP) {
        for capability in caps::all() {
            if !kept.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability)? {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    Ok(caps::set(None, CapSet::Permitted, &kept)?)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn dropped_capabilities_cannot_be_regained() {
        // In a separate thread, because capabilities are per thread.
        let left = thread::spawn(|| {
            let before = caps::read(None, CapSet::Permitted).unwrap();
            drop_others().unwrap();
            let regained = caps::raise(None, CapSet::Permitted, Capability::CAP_CHOWN);
            (before, caps::read(None, CapSet::Permitted).unwrap(), regained.is_ok())
        });
        let (before, after, regained) = left.join().unwrap();
        if before.is_empty() {
            eprintln!(
                "skipped: kernel::rights::dropped_capabilities_cannot_be_regained: there are no capabilities to drop"
            );
            return;
        }
        assert!(!regained);
        assert!(after.is_subset(&before));
        assert!(!after.contains(&Capability::CAP_SYS_RESOURCE), "{after:?}");
        assert!(after.contains(&Capability::CAP_BPF), "{after:?}");
    }
}
