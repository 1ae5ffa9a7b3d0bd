//! Shared types of the *origin* probe: the requests that arrive on the connections that a target has accepted.

/// Bytes that are kept of a request: its first line, and as many headers as fit.
pub const HEAD: usize = 1024;

/// Number of requests kept for each CPU, in case a task is enqueued for one later. New requests overwrite the oldest.
pub const HEADS_PER_CPU: u32 = 256;

/// A file descriptor of a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Process.
    pub tgid: u32,
    /// Descriptor number.
    pub fd: u32,
}
crate::shared::shared!(Descriptor, 8);

/// The request or connection that a thread or a deferred task works for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// ID of the request; 0 if it is unknown or none has arrived yet.
    pub request: u64,
    /// Inode number of the connection's socket; 0 if there is no connection.
    pub inode: u64,
    /// Descriptor of the connection.
    pub fd: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(Origin, 24);

impl Origin {
    /// No known origin.
    pub const NONE: Self = Self { request: 0, inode: 0, fd: 0, reserved: 0 };
}

/// Value of `CONNECTIONS`, whose key is the [`Descriptor`]: a connection that a target has accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Inode number of the connection's socket, to detect that the descriptor has been reused.
    pub inode: u64,
    /// ID of the latest request; 0 before the first.
    pub request: u64,
    /// Index of that request in `HEADS`.
    pub head: u32,
    /// 1 once that request has been sent to user space.
    pub is_emitted: u32,
    /// 1 once anything has been written since that request arrived.
    pub is_answered: u32,
    /// 1 once a request looked like HTTP. From then on, data that does not start a request continues the last one.
    pub is_http: u32,
    /// 1 once a request arrived before the previous one was answered. From then on it is unknown which one is worked
    /// on.
    pub overlaps: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(Connection, 40);

/// A request as it was received: value of `HEADS`, and sent through `REQUESTS` when a task or a stall refers to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Unique ID.
    pub id: u64,
    /// When its first bytes had been read, in monotonic nanoseconds.
    pub at_ns: u64,
    /// When the first write after that began, likewise; 0 if there was none.
    pub answered_ns: u64,
    /// Inode number of the connection's socket.
    pub inode: u64,
    /// Process that read it.
    pub tgid: u32,
    /// Descriptor of the connection.
    pub fd: u32,
    /// Number of bytes received.
    pub received: u32,
    /// Number of bytes in `bytes`.
    pub kept: u32,
    /// Beginning of the request.
    pub bytes: [u8; HEAD],
}
crate::shared::shared!(Request, 48 + HEAD);

/// The answer to a request that had already been sent to user space, as sent through `ANSWERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// As in [`Request`].
    pub request: u64,
    /// As in [`Request`].
    pub answered_ns: u64,
}
crate::shared::shared!(Answer, 16);
