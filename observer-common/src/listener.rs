//! Shared types of the *listener* probe: listening sockets and the state of their accept queues.

use crate::histogram::Histogram;

/// Maximum length of a listener's name, the path of a unix socket, in bytes.
pub const NAME: usize = 108;

/// Number of buckets of the depth distribution: 0, 1, 2, up to 4, up to 8 … up to 32,768, and above.
pub const DEPTHS: usize = 18;

/// The bucket that contains an accept queue of this depth; always below [`DEPTHS`].
#[inline(always)]
pub const fn depth_bucket(depth: u32) -> usize {
    if depth == 0 {
        return 0;
    }
    let bucket = 1 + (32 - (depth - 1).leading_zeros()) as usize;
    if bucket < DEPTHS { bucket } else { DEPTHS - 1 }
}

/// Upper bound of a bucket in connections, inclusive; `None` for the last one, which has no bound.
pub const fn depth_bound(bucket: usize) -> Option<u32> {
    match bucket {
        0 => Some(0),
        b if b < DEPTHS - 1 => Some(1 << (b - 1)),
        _ => None,
    }
}

/// State of an accept queue when it was last read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// When it was read, in monotonic nanoseconds; 0 if never.
    pub read_ns: u64,
    /// When the connection that has waited longest completed its handshake, in monotonic nanoseconds; 0 if that was not
    /// observed or if no connection waits.
    pub oldest_ns: u64,
    /// Address of that connection's `struct sock`; 0 if no connection waits.
    pub oldest_sk: u64,
    /// Position of the walk over the queue: connections from here on have not been visited. 0 at the end of the queue.
    pub rest: u64,
    /// Connections that wait.
    pub depth: u32,
    /// Of those, connections that their clients have reset.
    pub aborted: u32,
    /// Maximum number of connections that may wait.
    pub limit: u32,
    /// Handshakes in progress.
    pub half_open: u32,
    /// Segments that the kernel has dropped since the socket was created; wraps around.
    pub drops: u32,
    /// 1 if the socket no longer listens.
    pub closed: u32,
    /// 1 if connections have ever stayed half open until their first data (`TCP_DEFER_ACCEPT`). The kernel counts the
    /// last segment of such a handshake as dropped.
    pub defers: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(Queue, 64);

/// Value of `LISTENERS`, whose key is the inode number of the listening socket (as in `/proc/PID/fd`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Address of the `struct sock` with the accept queue.
    pub sk: u64,
    /// Address of the `struct sock` behind the descriptor. It differs from `sk` for Multipath TCP, whose socket owns a
    /// TCP listener.
    pub file_sk: u64,
    /// When the listener was found, in monotonic nanoseconds. Connections that arrived earlier have no timestamp.
    pub since_ns: u64,
    /// Address of the socket's name in the kernel, for a unix socket; connections made to it share that name. 0 for
    /// TCP.
    pub unix_name: u64,
    /// Process that has the socket open: the first one that was seen, replaced by another when it is no longer a
    /// target.
    pub owner: u32,
    /// Process that accepts from it; 0 while none does, [`SEVERAL_PROCESSES`](crate::accept::SEVERAL_PROCESSES) if several do.
    pub accepter: u32,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// `AF_INET`, `AF_INET6` or `AF_UNIX`.
    pub family: u16,
    /// TCP: the port, in host byte order. Unix: the length of the name.
    pub port: u16,
    /// The address: 4 or 16 bytes in network order, or a unix socket's path (abstract if it begins with a zero).
    pub name: [u8; NAME],
    /// Greatest queue depth that an accept has found, in connections.
    pub peak: u32,
    /// Connections accepted by targets.
    pub accepts: u64,
    /// Of those, connections that their clients had reset while they waited.
    pub accepts_aborted: u64,
    /// Of those, connections whose arrival was not observed (queued before observer attached).
    pub accepts_without_arrival: u64,
    /// Number of accepts by the queue depth they found, see [`depth_bucket`].
    pub depths: [u64; DEPTHS],
    /// Sum of the queue depths that accepts found.
    pub depths_sum: u64,
    /// Current state of the queue.
    pub queue: Queue,
    /// Time from the end of the handshake to the return of accept.
    pub wait: Histogram,
}
crate::shared::shared!(Listener, 160 + 24 + 8 * DEPTHS + 8 + size_of::<Queue>() + size_of::<Histogram>());

impl Listener {
    /// Whether it accepts Multipath TCP.
    #[inline(always)]
    pub const fn is_multipath(&self) -> bool {
        self.sk != self.file_sk
    }

    /// An empty entry.
    pub const EMPTY: Self = Self {
        sk: 0,
        file_sk: 0,
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
            read_ns: 0,
            oldest_ns: 0,
            oldest_sk: 0,
            rest: 0,
            depth: 0,
            aborted: 0,
            limit: 0,
            half_open: 0,
            drops: 0,
            closed: 0,
            defers: 0,
            reserved: 0,
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
