//! Targets. `TARGETS` maps a process ID in the initial PID namespace to a [`Target`].

/// A process under observation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// 1 once its last thread has exited.
    pub exited: u32,
    /// Number of times that the process has executed another program.
    pub execs: u32,
    /// 1 if it was not selected by its process ID: it has listened or waited for events, and the loader decides about
    /// it.
    pub is_candidate: u32,
}
crate::shared::shared!(Target, 12);
