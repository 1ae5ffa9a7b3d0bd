//! Criteria that select targets besides those given by process id: name, executable, port, cgroup, or all servers.
//! Evaluated for the processes that exist at the start, and for each process that later listens or waits for events.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::Path,
};

use glob::Pattern;
use nix::libc::SOCK_DGRAM;
use procfs::{
    net::{TcpNetEntry, TcpState, UnixNetEntry, UnixState},
    process::{FDTarget, Process as Proc, all_processes},
};

use super::info::{is_there, network_namespace};

/// Length of a process name in bytes (`TASK_COMM_LEN` without the terminating zero).
const MAX_NAME: usize = 15;

/// Mount point of cgroups, which users may prepend to a path.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Criteria for processes; a process that meets any of them is selected.
#[derive(Clone, Debug, Default)]
pub(crate) struct Criteria {
    /// All processes that listen or wait for events.
    pub(crate) all: bool,
    /// Names of main threads.
    pub(crate) names: Vec<String>,
    /// Patterns for executables: with a slash for the whole path, else for the file name.
    pub(crate) executables: Vec<Pattern>,
    /// Local TCP ports with a listener.
    pub(crate) ports: Vec<u16>,
    /// Cgroups, descendants included.
    pub(crate) cgroups: Vec<String>,
}

impl Criteria {
    /// Whether there are no criteria.
    pub(crate) fn is_none(&self) -> bool {
        let Self { all, names, executables, ports, cgroups } = self;
        !all && names.is_empty() && executables.is_empty() && ports.is_empty() && cgroups.is_empty()
    }

    /// Processes that exist now and meet any criterion.
    pub(crate) fn present(&self) -> BTreeSet<u32> {
        if self.is_none() {
            return BTreeSet::new();
        }
        let mut listening = Listening::default();
        let all = all_processes().into_iter().flatten().filter_map(Result::ok);
        // With `all`, a process must already listen or wait for events; one selected by name or cgroup need not.
        let wanted = all.filter(|proc| {
            self.is_met(proc, &mut listening)
                && (!self.all || self.is_named(proc) || serves(proc, &mut listening))
        });
        wanted.filter_map(|proc| id(&proc)).filter(|&pid| is_there(pid)).collect()
    }

    /// The processes among these that meet any criterion.
    pub(super) fn met_by(&self, pids: impl Iterator<Item = u32>) -> BTreeSet<u32> {
        if self.is_none() {
            return BTreeSet::new();
        }
        // One cache for all processes: with many listeners, the socket tables are long.
        let mut listening = Listening::default();
        let is_met = |pid: &u32| {
            let proc = i32::try_from(*pid).ok().and_then(|pid| Proc::new(pid).ok());
            proc.is_some_and(|proc| self.is_met(&proc, &mut listening))
        };
        pids.filter(is_met).collect()
    }

    /// Whether every process that meets `others` also meets `self`.
    pub(crate) fn cover(&self, others: &Self) -> bool {
        fn contain<T: PartialEq>(these: &[T], others: &[T]) -> bool {
            others.iter().all(|other| these.contains(other))
        }
        self.all
            || (!others.all
                && contain(&self.names, &others.names)
                && contain(&self.executables, &others.executables)
                && contain(&self.ports, &others.ports)
                && contain(&self.cgroups, &others.cgroups))
    }

    fn is_met(&self, proc: &Proc, listening: &mut Listening) -> bool {
        id(proc).is_some_and(|pid| pid != std::process::id())
            && (self.all || self.is_named(proc) || self.has_port(proc, listening))
    }

    /// Whether the process's name, executable or cgroup meets a criterion.
    fn is_named(&self, proc: &Proc) -> bool {
        let by_name = !self.names.is_empty()
            && proc.stat().is_ok_and(|stat| self.names.iter().any(|name| truncate(name) == stat.comm));
        let by_executable = || {
            let exe = proc.exe().unwrap_or_default();
            self.executables.iter().any(|pattern| matches(pattern, &exe))
        };
        by_name || (!self.executables.is_empty() && by_executable()) || self.is_inside(proc)
    }

    fn is_inside(&self, proc: &Proc) -> bool {
        !self.cgroups.is_empty()
            && proc.cgroups().is_ok_and(|paths| {
                paths.into_iter().any(|path| self.cgroups.iter().any(|outer| is_below(&path.pathname, outer)))
            })
    }

    fn has_port(&self, proc: &Proc, listening: &mut Listening) -> bool {
        !self.ports.is_empty()
            && listening.of(proc).is_some_and(|known| {
                let has = |inode: &u64| known.get(inode).is_some_and(|port| self.ports.contains(port));
                sockets(proc).iter().any(has)
            })
    }
}

/// Listening sockets by network namespace: inode number and port (0 for unix sockets).
#[derive(Default)]
struct Listening(HashMap<u32, HashMap<u64, u16>>);

impl Listening {
    fn of(&mut self, proc: &Proc) -> Option<&HashMap<u64, u16>> {
        let namespace = network_namespace(id(proc)?)?;
        Some(self.0.entry(namespace).or_insert_with(|| {
            let tcp = proc.tcp().into_iter().chain(proc.tcp6()).flatten();
            let is_listener = |entry: &TcpNetEntry| entry.state == TcpState::Listen;
            let tcp = tcp.filter(is_listener).map(|entry| (entry.inode, entry.local_address.port()));
            let unix = proc.unix().into_iter().flatten();
            // A listening unix socket is one that is bound and unconnected: the state is not shown.
            let unix = unix.filter(|entry| {
                entry.state == UnixState::UNCONNECTED && entry.path.is_some() && is_connection_based(entry)
            });
            tcp.chain(unix.map(|entry| (entry.inode, 0))).collect()
        }))
    }
}

fn is_connection_based(entry: &UnixNetEntry) -> bool {
    i32::from(entry.socket_type) != SOCK_DGRAM
}

/// Whether a process listens or has an epoll set or an io_uring.
pub(super) fn is_server(pid: u32) -> bool {
    let proc = i32::try_from(pid).ok().and_then(|pid| Proc::new(pid).ok());
    proc.is_some_and(|proc| serves(&proc, &mut Listening::default()))
}

fn serves(proc: &Proc, listening: &mut Listening) -> bool {
    let descriptors = proc.fd().into_iter().flatten().filter_map(Result::ok);
    let mut own = HashSet::new();
    for descriptor in descriptors {
        match descriptor.target {
            FDTarget::AnonInode(kind) if kind == "[eventpoll]" || kind == "[io_uring]" => return true,
            FDTarget::Socket(inode) => {
                own.insert(inode);
            }
            _ => {}
        }
    }
    !own.is_empty()
        && listening.of(proc).is_some_and(|known| own.iter().any(|inode| known.contains_key(inode)))
}

/// Inode numbers of a process's sockets.
fn sockets(proc: &Proc) -> HashSet<u64> {
    let descriptors = proc.fd().into_iter().flatten().filter_map(Result::ok);
    let sockets = descriptors.filter_map(|descriptor| match descriptor.target {
        FDTarget::Socket(inode) => Some(inode),
        _ => None,
    });
    sockets.collect()
}

fn id(proc: &Proc) -> Option<u32> {
    u32::try_from(proc.pid).ok()
}

/// The name as the kernel keeps it, cut at a character boundary.
fn truncate(name: &str) -> &str {
    let end = (0..=MAX_NAME.min(name.len())).rev().find(|&end| name.is_char_boundary(end));
    &name[..end.unwrap_or(0)]
}

/// Matches the whole path if the pattern has a slash, else the file name.
fn matches(pattern: &Pattern, exe: &Path) -> bool {
    if pattern.as_str().contains('/') {
        return pattern.matches_path(exe);
    }
    exe.file_name().is_some_and(|name| pattern.matches(&name.to_string_lossy()))
}

/// Whether a cgroup is `outer` or a descendant of it.
pub(crate) fn is_below(path: &str, outer: &str) -> bool {
    let outer = outer.strip_prefix(CGROUP_ROOT).unwrap_or(outer).trim_end_matches('/');
    path.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn me() -> Proc {
        Proc::myself().unwrap()
    }

    #[test]
    fn no_criteria_select_no_process() {
        assert!(Criteria::default().is_none());
        assert!(Criteria::default().present().is_empty());
    }

    #[test]
    fn added_criteria_cover_the_previous_ones() {
        let of = |names: &[&str], all| Criteria {
            all,
            names: names.iter().copied().map(Into::into).collect(),
            ..Criteria::default()
        };
        assert!(of(&["nginx", "redis"], false).cover(&of(&["redis"], false)));
        assert!(of(&[], true).cover(&of(&["redis"], false)));
        assert!(!of(&["nginx"], false).cover(&of(&["redis"], false)));
        assert!(!of(&["nginx"], false).cover(&of(&["nginx"], true)));
    }

    #[test]
    fn names_are_truncated_as_in_the_kernel() {
        assert_eq!(truncate("a-rather-long-name"), "a-rather-long-n");
        assert_eq!(truncate("short"), "short");
        // Not in the middle of a character.
        assert_eq!(truncate("fourteen-bytesü"), "fourteen-bytes");
    }

    #[test]
    fn an_executable_is_matched_by_path_or_file_name() {
        let is = |pattern: &str, exe: &str| matches(&Pattern::new(pattern).unwrap(), Path::new(exe));
        assert!(is("/usr/bin/python3*", "/usr/bin/python3.11"));
        assert!(is("python3*", "/usr/bin/python3.11"));
        assert!(is("/opt/**/server", "/opt/app/bin/server"));
        assert!(!is("python3", "/usr/bin/python3.11"));
        assert!(!is("/usr/bin/python3*", "/usr/local/bin/python3"));
    }

    #[test]
    fn cgroups_include_their_descendants() {
        assert!(is_below("/system.slice/nginx.service", "/system.slice"));
        assert!(is_below("/system.slice/nginx.service", "/sys/fs/cgroup/system.slice/nginx.service/"));
        assert!(!is_below("/system.slices", "/system.slice"));
        assert!(is_below("/", "/"));
    }

    #[test]
    fn a_port_is_matched_while_it_has_a_listener() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let criteria = Criteria { ports: vec![port], ..Criteria::default() };
        assert!(criteria.has_port(&me(), &mut Listening::default()));
        assert!(serves(&me(), &mut Listening::default()));
        drop(listener);
        assert!(!criteria.has_port(&me(), &mut Listening::default()));
    }

    #[test]
    fn observer_does_not_select_itself() {
        let criteria = Criteria { all: true, ..Criteria::default() };
        assert!(criteria.met_by([std::process::id()].into_iter()).is_empty());
        assert!(!criteria.present().contains(&std::process::id()));
    }
}
