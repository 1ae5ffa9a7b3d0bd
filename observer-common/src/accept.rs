//! Shared types of the *accept* probe: connections that wait to be accepted.

/// Key of `PORTS`: the TCP ports, by network namespace, whose new connections are worth a time stamp.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortKey {
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Local port, host byte order.
    pub port: u32,
}
crate::shared::shared!(PortKey, 8);

/// Value of `QUEUED`, whose key is the address of a connection's socket, of a unix connection that of its client's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// When the connection began to wait, monotonic nanoseconds.
    pub at_ns: u64,
    /// Of a unix connection, its listener's `unix_name`, once that is known; 0 for TCP.
    pub unix_name: u64,
}
crate::shared::shared!(Arrival, 16);

/// Value of `ACCEPTING`, whose key is the thread id: the accept call in progress.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepting {
    /// Key of the listener; 0 if there is no such call.
    pub inode: u64,
    /// Connections that waited when the call began.
    pub depth: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
}
crate::shared::shared!(Accepting, 16);

impl Accepting {
    /// No call.
    pub const NONE: Self = Self { inode: 0, depth: 0, reserved: 0 };
}

/// What stands for the process that accepts, where several do: no process has this id.
pub const SEVERAL: u32 = u32::MAX;
