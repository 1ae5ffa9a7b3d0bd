//! Shared types of the *ring* probe: accepts that a process requests through io_uring.

/// Argument lists of the kernel's io_uring tracepoints, which have changed over time.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingShape {
    /// Unknown: there are no such tracepoints, or their arguments are not supported.
    Unknown = 0,
    /// Debian's 5.10 and 5.15. Submission: ring, request, operation, user data. Wake-up: ring, operation, user data.
    /// Completion: ring, user data, result.
    Loose = 1,
    /// 6.0 and newer. Submission and wake-up: request. Completion: ring, request, user data, result, flags.
    Request = 2,
    /// 6.13 and newer. Like `Request`, but the last three arguments of the completion are one entry.
    Entry = 3,
}

/// Key of `RING_ACCEPTS`: identifies an operation of a ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingKey {
    /// Address of the ring.
    pub ring: u64,
    /// The user data that the process gave to the operation.
    pub user_data: u64,
}
crate::shared::shared!(RingKey, 16);

/// Value of `RING_ACCEPTS`: accepts in flight. A process may give several of them the same `user_data`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAccept {
    /// Key of the listener; 0 if it is unknown or if there are several.
    pub inode: u64,
    /// Address of the request, if there is only one and the kernel has not looked up its listener yet; otherwise 0.
    pub request: u64,
    /// Number of accepts in flight.
    pub pending: u64,
    /// 1 if the connections become direct descriptors, which only the ring can look up.
    pub direct: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(RingAccept, 32);
