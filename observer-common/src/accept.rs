//! Shared types of the *accept* probe: listeners, and connections that wait to be accepted.

use crate::histogram::Histogram;

/// Key of `PORTS`: the TCP ports, by network namespace, whose new connections are worth a time stamp.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortKey {
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Local port, host byte order.
    pub port: u32,
}
crate::shared!(PortKey, 8);

/// Value of `LISTENERS`, whose key is the inode number of the listening socket (as in `/proc/PID/fd`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Connections handed to the target.
    pub accepts: u64,
    /// Of those, the ones whose arrival nobody saw (queued before observer attached).
    pub accepts_without_arrival: u64,
    /// Longest queue met by an accept, in connections.
    pub depth_peak: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
    /// Handshake done -> accept returned.
    pub wait: Histogram,
}
crate::shared!(Listener, 24 + size_of::<Histogram>());

impl Listener {
    /// One that nobody connected to.
    pub const EMPTY: Self =
        Self { accepts: 0, accepts_without_arrival: 0, depth_peak: 0, reserved: 0, wait: Histogram::EMPTY };
}
