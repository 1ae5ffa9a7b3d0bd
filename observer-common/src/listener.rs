//! Shared types of the *listener* probe: who listens, and what its accept queue is like now.

use crate::histogram::Histogram;

/// Longest name of a listener, in bytes: a unix socket's path.
pub const NAME: usize = 108;

/// Buckets of the depth distribution: 0, 1, 2, up to 4, up to 8 … up to 32,768, and above.
pub const DEPTHS: usize = 18;

/// The bucket that holds an accept queue of this depth; always below [`DEPTHS`].
#[inline(always)]
pub const fn depth_bucket(depth: u32) -> usize {
    if depth == 0 {
        return 0;
    }
    let bucket = 1 + (32 - (depth - 1).leading_zeros()) as usize;
    if bucket < DEPTHS { bucket } else { DEPTHS - 1 }
}

/// Upper bound of a bucket in connections, itself inside; `None` for the last, which has no bound.
pub const fn depth_bound(bucket: usize) -> Option<u32> {
    match bucket {
        0 => Some(0),
        b if b < DEPTHS - 1 => Some(1 << (b - 1)),
        _ => None,
    }
}

/// An accept queue as it was when last looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// When that was, monotonic nanoseconds; 0 if never.
    pub looked_ns: u64,
    /// When the handshake of the connection that waits longest was done, monotonic nanoseconds; 0 if nobody saw
    /// that or none waits.
    pub oldest_ns: u64,
    /// Address of that connection's `struct sock`; 0 if none waits.
    pub longest_sk: u64,
    /// Where the walk over them has got to: those from there on nobody looked at. 0 if that is the end.
    pub rest: u64,
    /// Connections that wait.
    pub depth: u32,
    /// Of those, the ones their clients have reset.
    pub aborted: u32,
    /// Most connections that may wait.
    pub limit: u32,
    /// Handshakes that have begun and are not done.
    pub half_open: u32,
    /// Connections the kernel has dropped since the socket was made; wraps around.
    pub drops: u32,
    /// 1 if the socket does not listen any more.
    pub closed: u32,
}
crate::shared::shared!(Queue, 56);

/// Value of `LISTENERS`, whose key is the inode number of the listening socket (as in `/proc/PID/fd`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Address of its `struct sock`.
    pub sk: u64,
    /// When it was found, monotonic nanoseconds: connections that arrived before have no time stamp.
    pub since_ns: u64,
    /// Address of a unix socket's name in the kernel, which the connections made to it share; 0 for TCP.
    pub unix_name: u64,
    /// Process that was first seen to have it open.
    pub owner: u32,
    /// Process that accepts from it; 0 while none does, `u32::MAX` if several do.
    pub accepter: u32,
    /// Inode number of its network namespace.
    pub netns: u32,
    /// `AF_INET`, `AF_INET6` or `AF_UNIX`.
    pub family: u16,
    /// Port in host byte order; of a unix socket, the length of its name.
    pub port: u16,
    /// The address: 4 or 16 bytes in network order, or a unix socket's path (abstract if it begins with a zero).
    pub name: [u8; NAME],
    /// Longest queue met by an accept, in connections.
    pub peak: u32,
    /// Connections handed to targets.
    pub accepts: u64,
    /// Of those, the ones whose clients had reset them while they waited.
    pub accepts_aborted: u64,
    /// Of those, the ones whose arrival nobody saw (queued before observer attached).
    pub accepts_without_arrival: u64,
    /// Accepts by the depth they met, see [`depth_bucket`].
    pub depths: [u64; DEPTHS],
    /// Sum of the depths that accepts met.
    pub depths_sum: u64,
    /// The queue now.
    pub queue: Queue,
    /// Handshake done -> accept returned.
    pub wait: Histogram,
}
crate::shared::shared!(Listener, 152 + 24 + 8 * DEPTHS + 8 + size_of::<Queue>() + size_of::<Histogram>());

impl Listener {
    /// One that nothing is known of.
    pub const EMPTY: Self = Self {
        sk: 0,
        since_ns: 0,
        unix_name: 0,
        owner: 0,
        accepter: 0,
        netns: 0,
        family: 0,
        port: 0,
        name: [0; NAME],
        peak: 0,
        accepts: 0,
        accepts_aborted: 0,
        accepts_without_arrival: 0,
        depths: [0; DEPTHS],
        depths_sum: 0,
        queue: Queue {
            looked_ns: 0,
            oldest_ns: 0,
            longest_sk: 0,
            rest: 0,
            depth: 0,
            aborted: 0,
            limit: 0,
            half_open: 0,
            drops: 0,
            closed: 0,
        },
        wait: Histogram::EMPTY,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        for bucket in 0..DEPTHS - 1 {
            let bound = depth_bound(bucket).unwrap();
            assert_eq!(depth_bucket(bound), bucket, "{bound}");
            assert_eq!(depth_bucket(bound + 1), bucket + 1, "{bound} + 1");
        }
        assert_eq!(depth_bucket(u32::MAX), DEPTHS - 1);
        assert_eq!(depth_bound(DEPTHS - 1), None);
    }
}
