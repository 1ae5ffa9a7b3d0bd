//! How many connections a network namespace's listeners have dropped, as the kernel counts them (`nstat`).

use std::{fs, ops::Sub};

/// Two counters of one network namespace, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListenDrops {
    /// Connections dropped because an accept queue was full.
    pub(crate) overflows: u64,
    /// Connections dropped by listeners for any reason, overflows included.
    pub(crate) drops: u64,
}

/// How much both have grown.
impl Sub for ListenDrops {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            overflows: self.overflows.saturating_sub(before.overflows),
            drops: self.drops.saturating_sub(before.drops),
        }
    }
}

/// The counters of the network namespace that a process is in; `None` if it is gone.
pub(crate) fn of_namespace(pid: u32) -> Option<ListenDrops> {
    parse(&fs::read_to_string(format!("/proc/{pid}/net/netstat")).ok()?)
}

/// Understands `/proc/PID/net/netstat`: a line of names follows a line of figures, with the same first word.
fn parse(netstat: &str) -> Option<ListenDrops> {
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
    fn this_namespace_has_them() {
        of_namespace(std::process::id()).unwrap();
    }
}
