//! Kernel features that observer uses: for each the first release, a probe, and what is lost without it. A feature is
//! probed on the running kernel and never derived from its version number.

use aya::{maps::MapType, programs::ProgramType, sys};
use observer_common::{layout::KernelLayout, ring::RingShape};

use super::{layout, tracefs, uprobe};

/// A kernel feature.
pub(crate) struct Feature {
    /// Its usual name.
    pub(crate) name: &'static str,
    /// First kernel release that has it.
    pub(crate) since: &'static str,
    /// Whether observer cannot run without it.
    pub(crate) required: bool,
    /// What it is needed for, or what is not observed without it.
    pub(crate) purpose: &'static str,
    /// What to do if it is missing; `None` to advise a newer kernel.
    pub(crate) cure: Option<&'static str>,
    probe: fn() -> Result<(), Unavailable>,
}

/// Why a feature is unavailable.
struct Unavailable {
    why: String,
    /// What to do if the probe could not determine whether the kernel has the feature.
    cure: Option<&'static str>,
}

impl Unavailable {
    /// The kernel lacks the feature.
    fn of(why: impl Into<String>) -> Self {
        Self { why: why.into(), cure: None }
    }

    /// The kernel refused the probe, for example because a capability is missing.
    fn of_bpf(error: impl Into<anyhow::Error>) -> Self {
        Self { why: format!("{:#}", error.into()), cure: Some("see CAP_BPF and bpf() above") }
    }
}

impl Feature {
    /// Probes the running kernel. An error is the reason and the cure.
    pub(crate) fn probe(&self) -> Result<(), (String, String)> {
        (self.probe)().map_err(|missing| {
            let newer = || format!("upgrade to Linux {} or newer", self.since);
            (missing.why, missing.cure.or(self.cure).map_or_else(newer, Into::into))
        })
    }
}

/// All features, the most important first.
pub(crate) const FEATURES: &[Feature] = &[
    Feature {
        name: "BTF of the kernel",
        since: "5.2",
        required: true,
        purpose: "offsets of kernel fields",
        cure: Some(
            "use a kernel built with CONFIG_DEBUG_INFO_BTF, as distributions' are; in a container, mount the host's /sys",
        ),
        probe: || match std::fs::metadata(layout::VMLINUX) {
            Ok(_) => Ok(()),
            Err(_) => {
                let file = layout::VMLINUX;
                Err(Unavailable::of(format!("no {file}: the kernel was built without CONFIG_DEBUG_INFO_BTF")))
            }
        },
    },
    Feature {
        name: "eBPF programs",
        since: "4.7",
        required: true,
        purpose: "everything; a seccomp profile or a limit can block them even for root",
        cure: None,
        probe: || match sys::is_program_supported(ProgramType::TracePoint) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Unavailable::of("this kernel has no eBPF programs for tracepoints")),
            Err(error) => Err(Unavailable::of_bpf(error)),
        },
    },
    Feature {
        name: "tracefs",
        since: "4.1",
        required: true,
        purpose: "offsets of tracepoint fields, ids of tracepoints",
        cure: Some(
            "see CAP_SYS_ADMIN above, or mount it: `mount -t tracefs nodev /sys/kernel/tracing`; in a container, mount the host's there",
        ),
        probe: || tracefs::ensure_mounted().map_err(|error| Unavailable::of(format!("{error:#}"))),
    },
    Feature {
        name: "system call tracepoints",
        since: "3.5",
        required: true,
        purpose: "waits for events, accept calls",
        cure: None,
        probe: || {
            tracepoint("syscalls/sys_enter_accept4", "the kernel was built without CONFIG_FTRACE_SYSCALLS")
        },
    },
    Feature {
        name: "sock:inet_sock_set_state",
        since: "4.16",
        required: true,
        purpose: "when a connection enters the accept queue",
        cure: None,
        probe: || tracepoint("sock/inet_sock_set_state", "this kernel has no such tracepoint"),
    },
    Feature {
        name: "BTF tracepoints",
        since: "5.5",
        required: true,
        purpose: "scheduler, socket and process events, and the offsets of kernel fields",
        cure: None,
        probe: || kernel_layout().map(drop),
    },
    Feature {
        name: "epoll_pwait2",
        since: "5.11",
        required: false,
        purpose: "event loops that wait in it; without it, nothing is missed",
        cure: None,
        probe: || tracepoint("syscalls/sys_enter_epoll_pwait2", "this kernel has no such system call"),
    },
    Feature {
        name: "io_uring tracepoints",
        since: "6.0",
        required: false,
        purpose: "accepts through io_uring, which are not observed without them",
        cure: None,
        probe: || match kernel_layout()?.ring_shape {
            shape if shape == RingShape::Unknown as u32 => {
                Err(Unavailable::of("this kernel has no io_uring tracepoints that observer supports"))
            }
            _ => Ok(()),
        },
    },
    Feature {
        name: "uprobes",
        since: "4.20",
        required: false,
        purpose: "deferred tasks and collections of CPython and V8, which are not observed without them",
        cure: Some(
            "grant CAP_SYS_ADMIN, which kernels since July 2025 require, or use a kernel with CONFIG_UPROBE_EVENTS",
        ),
        probe: || uprobe::probe().map_err(Unavailable::of),
    },
    Feature {
        name: "ring buffer",
        since: "5.8",
        required: true,
        purpose: "stalls, requests and links, and diagnostics of the programs (-v)",
        cure: None,
        probe: || match sys::is_map_supported(MapType::RingBuf) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Unavailable::of("this kernel has no such map type")),
            Err(error) => Err(Unavailable::of_bpf(error)),
        },
    },
];

fn tracepoint(name: &str, lack: &str) -> Result<(), Unavailable> {
    ensure_readable()?;
    if tracefs::has(name) { Ok(()) } else { Err(Unavailable::of(lack)) }
}

fn kernel_layout() -> Result<KernelLayout, Unavailable> {
    ensure_readable()?;
    layout::of_running_kernel().map_err(|error| Unavailable::of(format!("{error:#}")))
}

fn ensure_readable() -> Result<(), Unavailable> {
    tracefs::ensure_mounted()
        .map_err(|_| Unavailable { why: "cannot read tracefs".into(), cure: Some("see tracefs above") })
}
