//! What must hold before anything is loaded: rights, what others have allowed or forbidden here, and the kernel's features.

use std::{fs, os::unix::fs::MetadataExt as _};

use aya::{maps::MapType, sys};
use perf_event::{Builder, events::Software};

use super::{features::FEATURES, rights::RIGHTS};
use crate::{failure::Failure, finding::Finding};

/// Inode number of the initial pid namespace, fixed in the kernel (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// Something that whoever looks after this machine has set.
struct Setting {
    name: &'static str,
    purpose: &'static str,
    cure: &'static str,
    probe: fn() -> Result<(), String>,
}

/// All of them; the main job needs each.
const SETTINGS: &[Setting] = &[
    Setting {
        name: "initial pid namespace",
        purpose: "tell processes by the same ids as the kernel",
        cure: "run observer on the host, or its container with the host's pid namespace (hostPID, --pid=host)",
        probe: || match fs::metadata("/proc/self/ns/pid") {
            Ok(namespace) if namespace.ino() == INITIAL_PID_NAMESPACE => Ok(()),
            Ok(_) => Err("this is another one, as in a container".into()),
            Err(error) => Err(format!("/proc/self/ns/pid cannot be read: {error}")),
        },
    },
    Setting {
        name: "/proc shows all processes",
        purpose: "names, sockets and calls of what is observed",
        cure: "mount /proc without hidepid, or with a gid that observer has",
        probe: || match fs::metadata("/proc/1/ns") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("/proc/1 cannot be looked at: {error}")),
        },
    },
    Setting {
        name: "lockdown",
        purpose: "programs may read kernel memory",
        cure: "boot with lockdown=integrity or less, or ask whoever set it",
        probe: || match fs::read_to_string("/sys/kernel/security/lockdown") {
            Ok(mode) if mode.contains("[confidentiality]") => Err("it is `confidentiality`".into()),
            _ => Ok(()),
        },
    },
    Setting {
        name: "bpf()",
        purpose: "make maps and load programs",
        cure: "see CAP_BPF above; in a container, a seccomp profile that lets bpf() through; before Linux 5.11 also \
               `ulimit -l unlimited`",
        probe: || match sys::is_map_supported(MapType::Array) {
            Ok(true) => Ok(()),
            Ok(false) => Err(refused("kernel.unprivileged_bpf_disabled")),
            Err(error) => {
                let why = anyhow::Error::from(error);
                Err(format!("{why:#}; {}", refused("kernel.unprivileged_bpf_disabled")))
            }
        },
    },
    Setting {
        name: "perf_event_open()",
        purpose: "attach to tracepoints, look at threads that compute",
        cure: "see CAP_PERFMON above, or `sysctl kernel.perf_event_paranoid=2`; in a container, a seccomp profile that \
               lets perf_event_open() through",
        probe: || match Builder::new(Software::CPU_CLOCK).include_kernel().any_cpu().build() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("{error}; {}", refused("kernel.perf_event_paranoid"))),
        },
    },
];

/// What an administrator has set for those without rights.
fn refused(setting: &str) -> String {
    match fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/"))) {
        Ok(value) => format!("{setting} is {}", value.trim()),
        Err(_) => format!("this kernel has no {setting}"),
    }
}

/// Looks at everything: rights, settings, features.
pub(crate) fn findings() -> impl Iterator<Item = Finding> {
    look(|_required| true)
}

/// Looks at what is asked for, of what the main job requires and of what it goes without.
fn look(is_asked: fn(bool) -> bool) -> impl Iterator<Item = Finding> {
    let rights = RIGHTS.iter().filter(move |right| is_asked(right.required)).map(|right| Finding {
        name: right.capability.to_string(),
        purpose: right.purpose.into(),
        required: right.required,
        outcome: right.probe(),
        cure: right.cure(),
    });
    let settings = SETTINGS.iter().map(|setting| Finding {
        name: setting.name.into(),
        purpose: setting.purpose.into(),
        required: true,
        outcome: (setting.probe)(),
        cure: setting.cure.into(),
    });
    let features = FEATURES.iter().filter(move |feature| is_asked(feature.required)).map(|feature| {
        let (outcome, cure) = match feature.probe() {
            Ok(()) => (Ok(()), String::new()),
            Err((why, cure)) => (Err(why), cure),
        };
        let (name, purpose) = (feature.name.into(), feature.purpose.into());
        Finding { name, purpose, required: feature.required, outcome, cure }
    });
    rights.chain(settings).chain(features)
}

/// Makes sure that the main job can be done. Runs before any thread is started.
pub(crate) fn ensure() -> Result<(), Failure> {
    let missing = RIGHTS.iter().filter(|right| right.required && right.probe().is_err());
    let missing: Vec<_> = missing.collect();
    if let Some(first) = missing.first() {
        let names: Vec<_> = missing.iter().map(|right| right.capability.to_string()).collect();
        let cure = if missing.len() == 1 {
            first.cure()
        } else {
            "run observer as root, for example with sudo; in a container, add these capabilities".into()
        };
        return Err(Failure::new(format!("missing rights: {}", names.join(", ")), cure));
    }
    match look(|required| required).find(Finding::prevents) {
        Some(Finding { name, outcome: Err(reason), cure, .. }) => {
            let what = format!("it takes {name}, which is not to be had here: {reason}");
            Err(Failure::new(what, format!("{cure}; see `observer check`")))
        }
        _ => Ok(()),
    }
}
