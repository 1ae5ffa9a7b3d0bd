//! The capabilities that observer works with: what each is for, whether it is there, and how all others are given up.
//! The manifests in `deploy/` grant these and nothing else.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};
use nix::{sys::prctl::set_no_new_privs, unistd::geteuid};

use super::layout;

/// A capability that observer makes use of.
pub(crate) struct Right {
    pub(crate) capability: Capability,
    /// What it is for, which goes unseen without it.
    pub(crate) purpose: &'static str,
    /// Whether the main job needs it.
    pub(crate) required: bool,
    /// Whether it is kept once everything is attached.
    kept: bool,
}

/// All of them. `CAP_SYS_ADMIN` stands for the first two as well, as it does in the kernel.
pub(crate) const RIGHTS: &[Right] = &[
    Right {
        capability: Capability::CAP_BPF,
        purpose: "load eBPF programs and maps",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_PERFMON,
        purpose: "attach to tracepoints, read kernel memory",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_ADMIN,
        purpose: "deferred work, collections of CPython and V8; in what part of the kernel threads block; tracepoints where kernel.perf_event_paranoid is above 2",
        required: false,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_PTRACE,
        purpose: "see the sockets, calls and memory of other users' processes",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_DAC_READ_SEARCH,
        purpose: "read other users' files: descriptors in /proc, code with its names",
        required: true,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYSLOG,
        purpose: "name functions of the kernel where kernel.kptr_restrict hides them",
        required: false,
        kept: true,
    },
    Right {
        capability: Capability::CAP_SYS_RESOURCE,
        purpose: "room for maps before Linux 5.11, where they count as locked memory",
        required: false,
        kept: false,
    },
];

impl Right {
    /// Looks at this process. An error says why not.
    pub(crate) fn probe(&self) -> Result<(), String> {
        let stands_in = matches!(self.capability, Capability::CAP_BPF | Capability::CAP_PERFMON)
            && has(Capability::CAP_SYS_ADMIN);
        let is_useless = self.capability == Capability::CAP_SYS_RESOURCE && !layout::maps_are_locked_memory();
        if stands_in || is_useless || has(self.capability) {
            return Ok(());
        }
        let user = geteuid();
        Err(if user.is_root() {
            "root runs this, without that capability: in a container, or dropped".into()
        } else {
            format!("user {user} runs this, not root")
        })
    }

    /// What to do if it is missing.
    pub(crate) fn cure(&self) -> String {
        let name = self.capability.to_string();
        let short = name.trim_start_matches("CAP_");
        format!("run observer as root, for example with sudo; in a container, add the capability {short}")
    }
}

/// A capability counts when it is effective; a process whose capabilities cannot be read has none.
fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// Gives up, for good, what is not needed any more once all that is there is attached to: for the calling thread and those
/// that it starts from now on. Much is still needed for processes that come later.
pub(crate) fn drop_others() -> Result<()> {
    let kept = RIGHTS.iter().filter(|right| right.kept).map(|right| right.capability);
    drop_all_but(&kept.collect()).context("cannot give up the rights that are not needed")
}

fn drop_all_but(kept: &CapsHashSet) -> Result<()> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.intersection(&permitted).copied().collect();
    set_no_new_privs()?;
    // What may be regained by starting another program, which observer never does.
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
    fn what_is_given_up_is_gone() {
        // In a thread of its own, which takes it with it.
        let left = thread::spawn(|| {
            let before = caps::read(None, CapSet::Permitted).unwrap();
            drop_others().unwrap();
            let regained = caps::raise(None, CapSet::Permitted, Capability::CAP_CHOWN);
            (before, caps::read(None, CapSet::Permitted).unwrap(), regained.is_ok())
        });
        let (before, after, regained) = left.join().unwrap();
        if before.is_empty() {
            eprintln!("skipped: kernel::rights::what_is_given_up_is_gone: there are no rights to give up");
            return;
        }
        assert!(!regained);
        assert!(after.is_subset(&before));
        assert!(!after.contains(&Capability::CAP_SYS_RESOURCE), "{after:?}");
        assert!(after.contains(&Capability::CAP_BPF), "{after:?}");
    }
}
