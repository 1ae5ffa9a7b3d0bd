//! Which processes are observed besides those that are given by their ids: those of a name, a program, a port, a cgroup, or
//! all that serve. Asked of what is there at the beginning, and of whoever listens or waits for events later.

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

/// Most bytes of a process's name that the kernel keeps.
const NAME: usize = 15;

/// Where cgroups are mounted, which people may well put before a path.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What processes are selected by: one that meets any of these is observed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Criteria {
    /// All that listen or wait for events.
    pub(crate) all: bool,
    /// Names of main threads.
    pub(crate) names: Vec<String>,
    /// Executables: of their whole path, or of their file's name alone.
    pub(crate) executables: Vec<Pattern>,
    /// TCP ports that they listen on.
    pub(crate) ports: Vec<u16>,
    /// Cgroups that they are in, or in others below.
    pub(crate) cgroups: Vec<String>,
}

impl Criteria {
    /// Whether there are none: processes are given by their ids alone.
    pub(crate) fn is_none(&self) -> bool {
        let Self { all, names, executables, ports, cgroups } = self;
        !all && names.is_empty() && executables.is_empty() && ports.is_empty() && cgroups.is_empty()
    }

    /// Those that are there now and are wanted.
    pub(crate) fn present(&self) -> BTreeSet<u32> {
        if self.is_none() {
            return BTreeSet::new();
        }
        let mut listening = Listening::default();
        let all = all_processes().into_iter().flatten().filter_map(Result::ok);
        // A name may be that of one that does nothing yet; one that is wanted for what it does does it.
        let wanted = all.filter(|proc| {
            self.is_met(proc, &mut listening)
                && (!self.all || self.is_named(proc) || serves(proc, &mut listening))
        });
        wanted.filter_map(|proc| id(&proc)).filter(|&pid| is_there(pid)).collect()
    }

    /// Those of these processes that meet any.
    pub(super) fn met_by(&self, pids: impl Iterator<Item = u32>) -> BTreeSet<u32> {
        if self.is_none() {
            return BTreeSet::new();
        }
        // Once for all of them: with many listeners there is much to read.
        let mut listening = Listening::default();
        let is_met = |pid: &u32| {
            let proc = i32::try_from(*pid).ok().and_then(|pid| Proc::new(pid).ok());
            proc.is_some_and(|proc| self.is_met(&proc, &mut listening))
        };
        pids.filter(is_met).collect()
    }

    /// Whether whoever meets any of others' meets one of these.
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

    /// Whether what it is called, runs or is in is among the criteria.
    fn is_named(&self, proc: &Proc) -> bool {
        let by_name = !self.names.is_empty()
            && proc.stat().is_ok_and(|stat| self.names.iter().any(|name| cut(name) == stat.comm));
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

/// Listening sockets by the network namespace they are in: inode number, and port (0 of unix sockets).
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
            // Bound, and connected to nobody: nothing more is told of one that listens.
            let unix = unix.filter(|entry| {
                entry.state == UnixState::UNCONNECTED && entry.path.is_some() && is_of_streams(entry)
            });
            tcp.chain(unix.map(|entry| (entry.inode, 0))).collect()
        }))
    }
}

fn is_of_streams(entry: &UnixNetEntry) -> bool {
    i32::from(entry.socket_type) != SOCK_DGRAM
}

/// Whether a process listens or has what event loops wait on.
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

/// As much of a name as the kernel keeps.
fn cut(name: &str) -> &str {
    let end = (0..=NAME.min(name.len())).rev().find(|&end| name.is_char_boundary(end));
    &name[..end.unwrap_or(0)]
}

/// A pattern without a slash is one of names.
fn matches(pattern: &Pattern, exe: &Path) -> bool {
    if pattern.as_str().contains('/') {
        return pattern.matches_path(exe);
    }
    exe.file_name().is_some_and(|name| pattern.matches(&name.to_string_lossy()))
}

/// Whether one cgroup is another, or below it.
pub(crate) fn is_below(path: &str, outer: &str) -> bool {
    let outer = outer.strip_prefix(CGROUPS).unwrap_or(outer).trim_end_matches('/');
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
    fn nothing_is_selected_by_nothing() {
        assert!(Criteria::default().is_none());
        assert!(Criteria::default().present().is_empty());
    }

    #[test]
    fn what_is_added_takes_nobody_away() {
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
    fn a_name_is_as_long_as_the_kernel_keeps_it() {
        assert_eq!(cut("a-rather-long-name"), "a-rather-long-n");
        assert_eq!(cut("short"), "short");
        // Not in the middle of a letter.
        assert_eq!(cut("fourteen-bytesü"), "fourteen-bytes");
    }

    #[test]
    fn a_program_is_known_by_its_path_or_its_name() {
        let is = |pattern: &str, exe: &str| matches(&Pattern::new(pattern).unwrap(), Path::new(exe));
        assert!(is("/usr/bin/python3*", "/usr/bin/python3.11"));
        assert!(is("python3*", "/usr/bin/python3.11"));
        assert!(is("/opt/**/server", "/opt/app/bin/server"));
        assert!(!is("python3", "/usr/bin/python3.11"));
        assert!(!is("/usr/bin/python3*", "/usr/local/bin/python3"));
    }

    #[test]
    fn a_cgroup_has_others_below() {
        assert!(is_below("/system.slice/nginx.service", "/system.slice"));
        assert!(is_below("/system.slice/nginx.service", "/sys/fs/cgroup/system.slice/nginx.service/"));
        assert!(!is_below("/system.slices", "/system.slice"));
        assert!(is_below("/", "/"));
    }

    #[test]
    fn a_port_is_somebodys() {
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
