//! Which processes are targets: `TARGETS` maps a process id (as the initial pid namespace has it) to this.

/// A process under observation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// 1 when its last thread has exited.
    pub exited: u32,
    /// How many other programs it has started in its own place.
    pub execs: u32,
}
crate::shared!(Target, 8);
