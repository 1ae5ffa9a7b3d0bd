//! Which processes are targets: `TARGETS` maps a process id (as the initial pid namespace has it) to this.

/// A process under observation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// 1 when its last thread has exited.
    pub exited: u32,
    /// How many other programs it has started in its own place.
    pub execs: u32,
    /// 1 if nobody has asked for it by its id: it has listened, or waited for events, and the loader is to decide.
    pub is_candidate: u32,
}
crate::shared::shared!(Target, 12);
