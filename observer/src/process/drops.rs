//! How many connections a network namespace's listeners have dropped, as the kernel counts them (`nstat`), and
//! which listener's those were.

use std::fs;

/// Two counters of one network namespace, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListenDrops {
    /// Connections dropped because an accept queue was full.
    pub(crate) overflows: u64,
    /// Connections dropped by listeners for any reason, overflows included.
    pub(crate) drops: u64,
}

impl ListenDrops {
    /// How much both have grown; `None` if they have not, but are another namespace's.
    pub(crate) fn since(self, before: Self) -> Option<Self> {
        Some(Self {
            overflows: self.overflows.checked_sub(before.overflows)?,
            drops: self.drops.checked_sub(before.drops)?,
        })
    }

    /// Of these, the overflows of a listener that has dropped so many, where they are certain.
    ///
    /// The kernel counts an overflow three times, once each: as the namespace's overflow, as the listener's drop,
    /// as the namespace's drop. Other drops are counted as the latter two. What it counts as the listener's drop
    /// alone is no connection: a segment that does not begin one, such as a reset that comes too late. So equal
    /// drops mean that they were all this listener's, unless another one's are as many as those segments: that no
    /// other listener is known to have dropped any makes that all but impossible.
    ///
    /// The listener's drops have to be read first and over a time no longer than the namespace's: what is dropped
    /// in between makes them differ, and nothing certain that is not so.
    pub(crate) fn overflows_of(self, drops: u32, others_dropped: bool) -> Option<u64> {
        match self {
            _ if drops == 0 => Some(0),
            Self { overflows: 0, .. } => Some(0),
            _ if !others_dropped && self.drops == u64::from(drops) => Some(self.overflows),
            _ => None,
        }
    }
}

/// The counters of the network namespace that a process is in; `None` if it is gone.
pub(crate) fn of_namespace(pid: u32) -> Option<ListenDrops> {
    parse(&fs::read_to_string(format!("/proc/{pid}/net/netstat")).ok()?)
}

/// Understands `/proc/PID/net/netstat`: a line of names follows a line of figures, with the same first word.
pub(crate) fn parse(netstat: &str) -> Option<ListenDrops> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, figures) = (lines.next()?, lines.next()?);
    let figure = |wanted: &str| {
        let mut both = names.split_whitespace().zip(figures.split_whitespace());
        both.find(|(name, _)| *name == wanted)?.1.parse().ok()
    };
    Some(ListenDrops { overflows: figure("ListenOverflows")?, drops: figure("ListenDrops")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_under_their_names() {
        let netstat =
            "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 1 22 333\nIpExt: A\nIpExt: 4\n";
        assert_eq!(parse(netstat), Some(ListenDrops { overflows: 22, drops: 333 }));
        assert_eq!(parse("TcpExt: Other\nTcpExt: 1\n"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn overflows_are_a_listeners_only_where_nobody_else_can_have_had_them() {
        let namespace = ListenDrops { overflows: 7, drops: 9 };
        assert_eq!(namespace.overflows_of(9, false), Some(7));
        assert_eq!(namespace.overflows_of(0, true), Some(0));
        // Another one's drops, or this one's since it was looked at; late resets; somebody else as well.
        assert_eq!(namespace.overflows_of(8, false), None);
        assert_eq!(namespace.overflows_of(10, false), None);
        assert_eq!(namespace.overflows_of(9, true), None);
        assert_eq!(ListenDrops { overflows: 0, drops: 9 }.overflows_of(4, true), Some(0));
    }

    #[test]
    fn counters_that_shrink_are_not_the_same_ones() {
        let before = ListenDrops { overflows: 2, drops: 3 };
        assert_eq!(
            ListenDrops { overflows: 2, drops: 5 }.since(before),
            Some(ListenDrops { overflows: 0, drops: 2 })
        );
        assert_eq!(ListenDrops { overflows: 0, drops: 5 }.since(before), None);
    }

    #[test]
    fn this_namespace_has_them() {
        of_namespace(std::process::id()).unwrap();
    }
}
