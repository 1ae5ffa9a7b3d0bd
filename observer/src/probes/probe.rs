//! The description of a probe: purpose, cost, and its programs with the events that they attach to.

use crate::process::wait_call::WaitCall;

/// A probe.
pub(crate) struct Probe {
    /// Name of its file in `probes/`, here and in `observer-ebpf`.
    pub(crate) name: &'static str,
    /// What it measures.
    pub(crate) purpose: &'static str,
    /// First kernel release it runs on.
    pub(crate) since: &'static str,
    /// The condition for attaching it.
    pub(crate) when: When,
    /// Which processes pay for it, and for which events.
    pub(crate) cost: &'static str,
    /// Its programs, with the events they attach to.
    pub(crate) hooks: &'static [Hook],
}

/// The condition for attaching a probe. Once attached, it costs non-target processes as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Unconditional.
    Always,
    /// The arguments of the kernel's io_uring tracepoints are known.
    RingsUnderstood,
    /// A target listens on a unix socket.
    UnixListener,
    /// The garbage collector of a target's runtime can be probed.
    Collector,
    /// A profile describes how a target's runtime defers tasks.
    Deferring,
}

/// A program and the events it attaches to.
pub(crate) struct Hook {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// The events.
    pub(crate) events: Events,
}

/// Events that a program attaches to.
pub(crate) enum Events {
    /// A BTF tracepoint, whose argument types the verifier knows, by all names it has had, newest first.
    Btf(&'static [&'static str]),
    /// Plain tracepoints, as (category, name). The first is required; a kernel may lack the others.
    Plain(&'static [(&'static str, &'static str)]),
    /// Plain tracepoints of calls that only some event loops wait in, attached if the user selects them. A kernel may
    /// lack any.
    Waits(WaitCall, &'static [&'static str]),
    /// None: user space runs the program over all items of this kind.
    Iterator(&'static str),
    /// None: user space runs the program with arguments.
    OnDemand,
    /// None: the program attaches to functions of targets' runtimes, as profiles say.
    Runtime(&'static str),
}
