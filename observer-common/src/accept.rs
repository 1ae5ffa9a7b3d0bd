//! Shared types of the *accept* probe: connections that wait to be accepted.

/// Key of `PORTS`: a TCP port in a network namespace. Only connections to these ports get a timestamp.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortKey {
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Local port, host byte order.
    pub port: u32,
}
crate::shared::shared!(PortKey, 8);

/// Flag in a value of `PORTS`: a listener of the port accepts Multipath TCP. Inode numbers of sockets have 32 bits.
pub const MULTIPATH: u64 = 1 << 63;

/// Value of `QUEUED`: when a connection was queued. The key is the address of the connection's `struct sock`, or of the
/// client's for a unix connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// When the connection was queued, in monotonic nanoseconds.
    pub at_ns: u64,
    /// Unix: the `unix_name` of the listener, once it is known. TCP: 0.
    pub unix_name: u64,
}
crate::shared::shared!(Arrival, 16);

/// Value of `ACCEPTING`: the accept call that a thread is in. The key is the thread ID.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcceptCall {
    /// Key of the listener; 0 if no call is in progress.
    pub inode: u64,
    /// Connections in the accept queue when the call began.
    pub depth: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(AcceptCall, 16);

impl AcceptCall {
    /// No call in progress.
    pub const NONE: Self = Self { inode: 0, depth: 0, reserved: 0 };
}

/// Value of `accepter` for a listener that several processes accept from. No process has this ID.
pub const SEVERAL_PROCESSES: u32 = u32::MAX;
