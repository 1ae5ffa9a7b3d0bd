//! What the running kernel is like: its structures, its tracepoints, its clock, and what it lets us do.

pub(crate) mod btf;
pub(crate) mod calls;
pub(crate) mod clock;
pub(crate) mod detach;
pub(crate) mod memory;
pub(crate) mod tracefs;
pub(crate) mod layout;
pub(crate) mod rights;
pub(crate) mod uprobe;
pub(crate) mod features;
pub(crate) mod preflight;
