//! Shared types of the *ring* probe: accepts that a process asks for through io_uring.

/// What the kernel's tracepoints of io_uring pass; it has changed over time.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingShape {
    /// Nothing known: no such tracepoints, or none that anybody here has seen.
    Unknown = 0,
    /// Debian's 5.10 and 5.15. Submission: ring, request, operation, user data. Wake-up: ring, operation, user data.
    /// Completion: ring, user data, result.
    Loose = 1,
    /// 6.0 and newer. Submission and wake-up: the request. Completion: ring, request, user data, result, flags.
    Request = 2,
    /// 6.13 and newer. As before, but the completion's last three are one entry.
    Entry = 3,
}

/// Key of `RING_ACCEPTS`: what a ring calls an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingKey {
    /// Address of the ring.
    pub ring: u64,
    /// What the process gave the operation to know it by.
    pub user_data: u64,
}
crate::shared::shared!(RingKey, 16);

/// Value of `RING_ACCEPTS`: accepts in flight, of which a process may give several the same `user_data`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAccept {
    /// Key of the listener; 0 while it is unknown, or if there are several.
    pub inode: u64,
    /// Address of the only request, while the kernel has not looked up its listener; else 0.
    pub request: u64,
    /// How many are in flight.
    pub pending: u64,
    /// 1 if connections go to a table of the ring's own, where nobody else finds them.
    pub direct: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
}
crate::shared::shared!(RingAccept, 32);
