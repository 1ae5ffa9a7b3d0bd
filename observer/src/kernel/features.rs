//! The kernel features observer stands on: for each its minimum, how it is probed, and what lacks without it.
//! A feature is what the running kernel shows, never what its version number promises.

use aya::{maps::MapType, programs::ProgramType, sys};
use observer_common::{layout::KernelLayout, ring::RingShape};

use super::{layout, tracefs, uprobe};

/// Something a kernel has or has not.
pub(crate) struct Feature {
    /// What it is called in the field.
    pub(crate) name: &'static str,
    /// First kernel release that has it.
    pub(crate) since: &'static str,
    /// Whether the main job needs it.
    pub(crate) required: bool,
    /// What it is for, or what goes unseen without it.
    pub(crate) purpose: &'static str,
    /// What to do if it is missing, other than a newer kernel.
    pub(crate) cure: Option<&'static str>,
    probe: fn() -> Result<(), Lack>,
}

/// Why something is missing.
struct Lack {
    why: String,
    /// What to do where nobody can tell whether the kernel has it.
    cure: Option<&'static str>,
}

impl Lack {
    /// The kernel has none.
    fn of(why: impl Into<String>) -> Self {
        Self { why: why.into(), cure: None }
    }

    /// The kernel did not answer, as it does not without a right.
    fn of_bpf(error: impl Into<anyhow::Error>) -> Self {
        Self { why: format!("{:#}", error.into()), cure: Some("see CAP_BPF and bpf() above") }
    }
}

impl Feature {
    /// Looks at the running kernel. An error says why not, and what to do.
    pub(crate) fn probe(&self) -> Result<(), (String, String)> {
        (self.probe)().map_err(|lack| {
            let newer = || format!("a kernel that has it: Linux {} or newer", self.since);
            (lack.why, lack.cure.or(self.cure).map_or_else(newer, Into::into))
        })
    }
}

/// All of them, in the order in which a lack matters.
pub(crate) const FEATURES: &[Feature] = &[
    Feature {
        name: "BTF of the kernel",
        since: "5.2",
        required: true,
        purpose: "offsets of kernel fields",
        cure: Some(
            "a kernel built with CONFIG_DEBUG_INFO_BTF, as distributions' are; in a container, the host's /sys",
        ),
        probe: || match std::fs::metadata(layout::VMLINUX) {
            Ok(_) => Ok(()),
            Err(_) => {
                let file = layout::VMLINUX;
                Err(Lack::of(format!("no {file}: the kernel was built without CONFIG_DEBUG_INFO_BTF")))
            }
        },
    },
    Feature {
        name: "eBPF programs",
        since: "4.7",
        required: true,
        purpose: "everything; a seccomp profile or a limit may keep even root from them",
        cure: None,
        probe: || match sys::is_program_supported(ProgramType::TracePoint) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Lack::of("this kernel has none for tracepoints")),
            Err(error) => Err(Lack::of_bpf(error)),
        },
    },
    Feature {
        name: "tracefs",
        since: "4.1",
        required: true,
        purpose: "offsets of tracepoint fields, ids to attach by",
        cure: Some(
            "see CAP_SYS_ADMIN above, or mount it: `mount -t tracefs nodev /sys/kernel/tracing`; in a container, mount the host's there",
        ),
        probe: || tracefs::ensure_mounted().map_err(|error| Lack::of(format!("{error:#}"))),
    },
    Feature {
        name: "system call tracepoints",
        since: "3.5",
        required: true,
        purpose: "waits for events, accept calls",
        cure: None,
        probe: || event("syscalls/sys_enter_accept4", "the kernel was built without CONFIG_FTRACE_SYSCALLS"),
    },
    Feature {
        name: "sock:inet_sock_set_state",
        since: "4.16",
        required: true,
        purpose: "when a connection began to wait",
        cure: None,
        probe: || event("sock/inet_sock_set_state", "this kernel has no such tracepoint"),
    },
    Feature {
        name: "BTF tracepoints",
        since: "5.5",
        required: true,
        purpose: "scheduler, socket and process events, with fields where the programs look",
        cure: None,
        probe: || fields().map(drop),
    },
    Feature {
        name: "epoll_pwait2",
        since: "5.11",
        required: false,
        purpose: "reactors that wait through it; nothing is missed without it",
        cure: None,
        probe: || event("syscalls/sys_enter_epoll_pwait2", "this kernel has no such call"),
    },
    Feature {
        name: "io_uring tracepoints",
        since: "6.0",
        required: false,
        purpose: "accepts through io_uring, which go unseen without them",
        cure: None,
        probe: || match fields()?.ring_shape {
            shape if shape == RingShape::Unknown as u32 => {
                Err(Lack::of("this kernel has none, or none that observer knows"))
            }
            _ => Ok(()),
        },
    },
    Feature {
        name: "uprobes",
        since: "4.20",
        required: false,
        purpose: "deferred work and collections of CPython and V8, which go unseen without them",
        cure: Some(
            "CAP_SYS_ADMIN, which kernels since July 2025 ask for, or a kernel with CONFIG_UPROBE_EVENTS",
        ),
        probe: || uprobe::probe().map_err(Lack::of),
    },
    Feature {
        name: "ring buffer",
        since: "5.8",
        required: true,
        purpose: "diagnostics of the programs themselves (-v)",
        cure: None,
        probe: || match sys::is_map_supported(MapType::RingBuf) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Lack::of("this kernel has no such map")),
            Err(error) => Err(Lack::of_bpf(error)),
        },
    },
];

fn event(name: &str, lack: &str) -> Result<(), Lack> {
    ensure_readable()?;
    if tracefs::has(name) { Ok(()) } else { Err(Lack::of(lack)) }
}

fn fields() -> Result<KernelLayout, Lack> {
    ensure_readable()?;
    layout::of_running_kernel().map_err(|error| Lack::of(format!("{error:#}")))
}

fn ensure_readable() -> Result<(), Lack> {
    tracefs::ensure_mounted()
        .map_err(|_| Lack { why: "tracefs cannot be read".into(), cure: Some("see tracefs above") })
}
