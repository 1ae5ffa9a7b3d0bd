//! Access to the running kernel: its types, tracepoints and clocks, its features, uprobes, and what this process may do.

pub(crate) mod btf;
pub(crate) mod syscalls;
pub(crate) mod clock;
pub(crate) mod descriptor;
pub(crate) mod detach;
pub(crate) mod memory;
pub(crate) mod tracefs;
pub(crate) mod layout;
pub(crate) mod rights;
pub(crate) mod uprobe;
pub(crate) mod features;
pub(crate) mod preflight;
