//! What a probe is: its purpose, its cost, and its programs with the events that they are attached to.

use crate::process::wait_call::WaitCall;

/// A probe.
pub(crate) struct Probe {
    /// Name of its file, here and on the kernel side.
    pub(crate) name: &'static str,
    /// What it tells.
    pub(crate) purpose: &'static str,
    /// First kernel release it runs on.
    pub(crate) since: &'static str,
    /// When it is attached.
    pub(crate) when: When,
    /// Who pays, and for which events.
    pub(crate) cost: &'static str,
    /// Its programs and where they are attached.
    pub(crate) hooks: &'static [Hook],
}

/// What a probe waits for before it is attached: strangers pay for it from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Nothing.
    Always,
    /// A kernel whose tracepoints of io_uring are understood.
    RingsUnderstood,
    /// A target that listens on a unix socket.
    UnixListener,
    /// A target whose runtime's garbage collector can be probed.
    Collector,
    /// A target whose runtime puts work off in a way that is known.
    Deferring,
}

/// A program and where it is attached.
pub(crate) struct Hook {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// Tracepoints it serves.
    pub(crate) events: Events,
}

/// Tracepoints of one kind.
pub(crate) enum Events {
    /// One whose arguments the verifier knows the types of, by all names it has had, newest first.
    Btf(&'static [&'static str]),
    /// Plain ones, as (category, name). The first must be there; others may be missing from a kernel.
    Plain(&'static [(&'static str, &'static str)]),
    /// Plain ones of calls that only some event loops wait with, attached where the user says so. Each may be missing.
    Waits(WaitCall, &'static [&'static str]),
    /// None: the program is run when the loader wants it, over everything of this kind.
    Iterator(&'static str),
    /// None: the program is run when the loader wants it, with arguments.
    OnDemand,
    /// None: the program is attached to places in targets' runtimes, which profiles name.
    Runtime(&'static str),
}
