//! Checks before anything is loaded: capabilities, settings of this machine, and features of the kernel.

use std::{fs, os::unix::fs::MetadataExt as _};

use aya::{maps::MapType, sys};
use perf_event::{Builder, events::Software};

use super::{features::FEATURES, rights::RIGHTS};
use crate::{check_result::CheckResult, failure::Failure};

/// Inode number of the initial pid namespace, fixed in the kernel (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// A setting of this machine or its container.
struct Setting {
    name: &'static str,
    purpose: &'static str,
    cure: &'static str,
    probe: fn() -> Result<(), String>,
}

/// All settings; each is required.
const SETTINGS: &[Setting] = &[
    Setting {
        name: "initial pid namespace",
        purpose: "the same process ids as the kernel's",
        cure: "run observer on the host, or its container with the host's pid namespace (hostPID, --pid=host)",
        probe: || match fs::metadata("/proc/self/ns/pid") {
            Ok(namespace) if namespace.ino() == INITIAL_PID_NAMESPACE => Ok(()),
            Ok(_) => Err("observer runs in a nested pid namespace, as in a container".into()),
            Err(error) => Err(format!("cannot read /proc/self/ns/pid: {error}")),
        },
    },
    Setting {
        name: "/proc shows all processes",
        purpose: "names, sockets and system calls of targets",
        cure: "mount /proc without hidepid, or with a gid that observer has",
        probe: || match fs::metadata("/proc/1/ns") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("cannot access /proc/1/ns: {error}")),
        },
    },
    Setting {
        name: "lockdown",
        purpose: "reading kernel memory from programs",
        cure: "boot with lockdown=integrity or less, or ask the administrator who set it",
        probe: || match fs::read_to_string("/sys/kernel/security/lockdown") {
            Ok(mode) if mode.contains("[confidentiality]") => Err("lockdown is `confidentiality`".into()),
            _ => Ok(()),
        },
    },
    Setting {
        name: "bpf()",
        purpose: "creating maps and loading programs",
        cure: "see CAP_BPF above; in a container, use a seccomp profile that allows bpf(); before Linux 5.11 also \
               `ulimit -l unlimited`",
        probe: || match sys::is_map_supported(MapType::Array) {
            Ok(true) => Ok(()),
            Ok(false) => Err(value_of("kernel.unprivileged_bpf_disabled")),
            Err(error) => {
                let why = anyhow::Error::from(error);
                Err(format!("{why:#}; {}", value_of("kernel.unprivileged_bpf_disabled")))
            }
        },
    },
    Setting {
        name: "perf_event_open()",
        purpose: "attaching to tracepoints, sampling threads that compute",
        cure: "see CAP_PERFMON above, or `sysctl kernel.perf_event_paranoid=2`; in a container, use a seccomp profile \
               that allows perf_event_open()",
        probe: || match Builder::new(Software::CPU_CLOCK).include_kernel().any_cpu().build() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("{error}; {}", value_of("kernel.perf_event_paranoid"))),
        },
    },
];

/// The value of a sysctl that restricts unprivileged users.
fn value_of(setting: &str) -> String {
    match fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/"))) {
        Ok(value) => format!("{setting} is {}", value.trim()),
        Err(_) => format!("this kernel has no {setting}"),
    }
}

/// Checks everything: capabilities, settings, features.
pub(crate) fn findings() -> impl Iterator<Item = CheckResult> {
    check(|_required| true)
}

/// Checks capabilities and features that `is_asked` selects by whether they are required, and all settings.
fn check(is_asked: fn(bool) -> bool) -> impl Iterator<Item = CheckResult> {
    let rights = RIGHTS.iter().filter(move |right| is_asked(right.required)).map(|right| CheckResult {
        name: right.capability.to_string(),
        purpose: right.purpose.into(),
        required: right.required,
        outcome: right.probe(),
        cure: right.cure(),
    });
    let settings = SETTINGS.iter().map(|setting| CheckResult {
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
        CheckResult { name, purpose, required: feature.required, outcome, cure }
    });
    rights.chain(settings).chain(features)
}

/// Checks everything that is required. Must run before any thread is started, because it may mount tracefs.
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
    match check(|required| required).find(CheckResult::prevents) {
        Some(CheckResult { name, outcome: Err(reason), cure, .. }) => {
            let what = format!("{name} is required but unavailable: {reason}");
            Err(Failure::new(what, format!("{cure}; see `observer check`")))
        }
        _ => Ok(()),
    }
}
