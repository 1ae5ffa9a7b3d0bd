//! Connections dropped by listeners of a network namespace, from the kernel's counters (`nstat`), and their attribution
//! to a listener.

use std::fs;

/// Counters of a network namespace since its creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListenDrops {
    /// Connections dropped because an accept queue was full.
    pub(crate) overflows: u64,
    /// Connections dropped by listeners for any reason, overflows included.
    pub(crate) drops: u64,
    /// Segments that listeners with `TCP_DEFER_ACCEPT` have set aside. Nobody is turned away: the handshake is completed
    /// by the first data.
    pub(crate) deferred: u64,
}

impl ListenDrops {
    /// Increase of the counters; `None` if a counter decreased, which means that it belongs to another namespace.
    pub(crate) fn since(self, before: Self) -> Option<Self> {
        Some(Self {
            overflows: self.overflows.checked_sub(before.overflows)?,
            drops: self.drops.checked_sub(before.drops)?,
            deferred: self.deferred.checked_sub(before.deferred)?,
        })
    }

    /// Of the segments that a listener with `TCP_DEFER_ACCEPT` dropped in the same time, those that it did not set
    /// aside. The kernel counts segments that were set aside as drops of the listener as well.
    ///
    /// If several listeners of the namespace defer, the result is a lower bound. The listener's counter must be read
    /// first: what is set aside in between makes the result smaller rather than greater.
    pub(crate) fn not_deferred(self, drops: u32) -> u32 {
        u32::try_from(u64::from(drops).saturating_sub(self.deferred)).expect("no greater than drops")
    }

    /// Overflows of the listener that dropped `drops` connections in the same time; `None` if they are uncertain.
    ///
    /// The kernel counts an overflow three times: as an overflow of the namespace, as a drop of the listener, and as a
    /// drop of the namespace. Other drops of connections are counted as the latter two. A drop that only the listener
    /// counts is not a connection but a stray segment, such as a late reset. So if both drop counters rose equally, all
    /// drops were this listener's, unless the drops of another listener happen to equal the number of stray segments.
    /// `others_dropped` is false if no other listener is known to have dropped any, which makes that all but
    /// impossible.
    ///
    /// The listener's counter must be read first, and over a time no longer than the namespace's: drops in between make
    /// the counters differ, so the result is `None` rather than wrong.
    pub(crate) fn overflows_of(self, drops: u32, others_dropped: bool) -> Option<u64> {
        match self {
            _ if drops == 0 => Some(0),
            Self { overflows: 0, .. } => Some(0),
            _ if !others_dropped && self.drops == u64::from(drops) => Some(self.overflows),
            _ => None,
        }
    }
}

/// Counters of the network namespace of a process; `None` if the process is gone.
pub(crate) fn of_namespace(pid: u32) -> Option<ListenDrops> {
    parse(&fs::read_to_string(format!("/proc/{pid}/net/netstat")).ok()?)
}

/// Parses `/proc/PID/net/netstat`: a line of names is followed by a line of values, both with the same first word.
pub(crate) fn parse(netstat: &str) -> Option<ListenDrops> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let value = |wanted: &str| {
        let mut both = names.split_whitespace().zip(values.split_whitespace());
        both.find(|(name, _)| *name == wanted)?.1.parse().ok()
    };
    Some(ListenDrops {
        overflows: value("ListenOverflows")?,
        drops: value("ListenDrops")?,
        deferred: value("TCPDeferAcceptDrop")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_name() {
        let netstat = "TcpExt: SyncookiesSent ListenOverflows ListenDrops TCPDeferAcceptDrop\nTcpExt: 1 22 333 4\n\
                       IpExt: A\nIpExt: 5\n";
        assert_eq!(parse(netstat), Some(ListenDrops { overflows: 22, drops: 333, deferred: 4 }));
        assert_eq!(parse("TcpExt: Other\nTcpExt: 1\n"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn overflows_are_attributed_only_where_certain() {
        let namespace = ListenDrops { overflows: 7, drops: 9, deferred: 0 };
        assert_eq!(namespace.overflows_of(9, false), Some(7));
        assert_eq!(namespace.overflows_of(0, true), Some(0));
        // Drops of another listener or after the listener was read; stray segments; another listener dropped as well.
        assert_eq!(namespace.overflows_of(8, false), None);
        assert_eq!(namespace.overflows_of(10, false), None);
        assert_eq!(namespace.overflows_of(9, true), None);
        assert_eq!(ListenDrops { overflows: 0, ..namespace }.overflows_of(4, true), Some(0));
    }

    #[test]
    fn segments_that_were_set_aside_are_no_drops() {
        let namespace = ListenDrops { overflows: 0, drops: 3, deferred: 23 };
        assert_eq!(namespace.not_deferred(26), 3);
        assert_eq!(namespace.not_deferred(23), 0);
        // Some were set aside after the listener was read, or by another listener.
        assert_eq!(namespace.not_deferred(20), 0);
    }

    #[test]
    fn a_counter_that_decreases_is_of_another_namespace() {
        let before = ListenDrops { overflows: 2, drops: 3, deferred: 4 };
        assert_eq!(
            ListenDrops { overflows: 2, drops: 5, deferred: 7 }.since(before),
            Some(ListenDrops { overflows: 0, drops: 2, deferred: 3 })
        );
        assert_eq!(ListenDrops { overflows: 0, drops: 5, deferred: 4 }.since(before), None);
    }

    #[test]
    fn the_namespace_of_this_process_has_counters() {
        of_namespace(std::process::id()).unwrap();
    }
}
