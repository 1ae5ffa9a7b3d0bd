//! Shared types of the *origin* probe: what the work of a target is done for, namely requests that arrive on the
//! connections it has accepted.

/// How much of a request is kept, in bytes: its first line, and headers as far as they fit.
pub const HEAD: usize = 1024;

/// Requests kept for each CPU until something is done for them later.
pub const HEADS_PER_CPU: u32 = 256;

/// A descriptor of a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Process.
    pub tgid: u32,
    /// Its number.
    pub fd: u32,
}
crate::shared::shared!(Descriptor, 8);

/// What something is done for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The request; 0 if that is not known, or if there has been none yet.
    pub request: u64,
    /// Inode number of the connection's socket; 0 if there is none.
    pub inode: u64,
    /// The connection's descriptor.
    pub fd: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
}
crate::shared::shared!(Origin, 24);

impl Origin {
    /// Nothing that anybody knows of.
    pub const NONE: Self = Self { request: 0, inode: 0, fd: 0, reserved: 0 };
}

/// Value of `CONNECTIONS`, whose key is its [`Descriptor`]: a connection that a target has accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Inode number of its socket: the descriptor may be another file's by now.
    pub inode: u64,
    /// The request that came last; 0 before the first.
    pub request: u64,
    /// Where in `HEADS` that is.
    pub head: u32,
    /// 1 once that request has been sent to the user side.
    pub is_emitted: u32,
    /// 1 once anything was written since that request came.
    pub is_answered: u32,
    /// 1 once a request looked like HTTP: what does not is part of one that did.
    pub is_http: u32,
    /// 1 once a request came before the one before it was answered: from then on nobody knows which is worked on.
    pub overlaps: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
}
crate::shared::shared!(Connection, 40);

/// A request as it came in: value of `HEADS`, and what `REQUESTS` passes on of those that matter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Tells it from all others.
    pub id: u64,
    /// When its first bytes had been read, monotonic nanoseconds.
    pub at_ns: u64,
    /// When something was about to be written for the first time after that, likewise; 0 if nothing was.
    pub answered_ns: u64,
    /// Inode number of its connection's socket.
    pub inode: u64,
    /// Process that read it.
    pub tgid: u32,
    /// The connection's descriptor.
    pub fd: u32,
    /// How many bytes were read at once.
    pub received: u32,
    /// How many of them are in `bytes`.
    pub kept: u32,
    /// Its beginning.
    pub bytes: [u8; HEAD],
}
crate::shared::shared!(Request, 48 + HEAD);

/// A request that was answered after the user side had been told of it, as `ANSWERS` passes it on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// As in [`Request`].
    pub request: u64,
    /// As in [`Request`].
    pub answered_ns: u64,
}
crate::shared::shared!(Answer, 16);
