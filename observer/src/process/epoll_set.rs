//! What an epoll set holds. It shows whether the thread that waits on it serves several clients, for which it is an event
//! loop, or one connection at a time.

use std::{fs, os::fd::AsRawFd as _, path::Path};

use nix::sys::{
    socket::{UnixAddr, getpeername, getsockname},
    stat::stat,
};
use rustix::fs::getxattr;

use crate::kernel::descriptor::duplicate;

/// What the sockets in an epoll set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Connections of several clients, a listener and connections, datagram sockets, or too much to look at.
    Several,
    /// One connection, and neither a listener nor a socket pair, through which others may come.
    OneConnection,
    /// Listeners only.
    Listeners,
    /// None of these.
    Other,
}

/// Maximum number of members that are examined. The set of a thread that serves one connection is small.
const MEMBERS: usize = 16;

/// Maximum size of a process's table of descriptors. While the kernel lists the members of a set, its events are not
/// delivered, so sets that may be large are not listed.
const TABLE: u64 = 1024;

/// What the sockets are in the epoll set behind a descriptor of a process; `None` if that is unknown.
pub(crate) fn served(pid: u32, set: u32, is_listener: impl Fn(u64) -> bool) -> Option<Served> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let size = status.lines().find_map(|line| line.strip_prefix("FDSize:"))?;
    if size.trim().parse::<u64>().ok()? > TABLE {
        return Some(Served::Several);
    }
    let members = members(&fs::read_to_string(format!("/proc/{pid}/fdinfo/{set}")).ok()?)?;
    if members.len() > MEMBERS {
        return Some(Served::Several);
    }
    let (mut listeners, mut connections, mut pairs) = (0, 0, 0);
    for fd in members {
        let path = format!("/proc/{pid}/fd/{fd}");
        let Some(inode) = stat(Path::new(&path)).ok().map(|stat| stat.st_ino) else { continue };
        match protocol(&path).as_deref() {
            None | Some("NETLINK") => {}
            Some(_) if is_listener(inode) => listeners += 1,
            Some(name) if name.starts_with("UNIX") && is_pair(pid, fd) => pairs += 1,
            Some(name) if name.starts_with("UDP") => return Some(Served::Several),
            Some(_) => connections += 1,
        }
    }
    Some(match (listeners, connections) {
        (0, 1) if pairs == 0 => Served::OneConnection,
        (0, 0 | 1) => Served::Other,
        (_, 0) => Served::Listeners,
        _ => Served::Several,
    })
}

/// The descriptors that are listed in the `fdinfo` of an epoll set; `None` if it is of another file.
fn members(info: &str) -> Option<Vec<u32>> {
    // An empty set has no line of its own.
    if !info
        .lines()
        .all(|line| ["pos:", "flags:", "mnt_id:", "ino:", "tfd:"].iter().any(|key| line.starts_with(key)))
    {
        return None;
    }
    let listed = info.lines().filter_map(|line| line.strip_prefix("tfd:"));
    listed.map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

/// The protocol of a socket, such as `TCP`; `None` if the file is not a socket.
fn protocol(path: &str) -> Option<String> {
    let mut name = [0; 32];
    let length = getxattr(path, "system.sockprotoname", &mut name).ok()?;
    let name = name.get(..length)?;
    Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
}

/// Whether a Unix socket of a process is an end of a socket pair: neither end has a name.
///
/// Its descriptor is duplicated for a moment. If the process closes the socket meanwhile, it is closed that much later.
fn is_pair(pid: u32, fd: u32) -> bool {
    let is_unnamed = |address: nix::Result<UnixAddr>| {
        address.is_ok_and(|address| address.path().is_none() && address.as_abstract().is_none())
    };
    let is_unix = |path: &str| protocol(path).is_some_and(|name| name.starts_with("UNIX"));
    duplicate(pid, fd, is_unix).ok().flatten().is_some_and(|socket| {
        let socket = socket.as_raw_fd();
        is_unnamed(getsockname(socket)) && is_unnamed(getpeername(socket))
    })
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::{
            fd::{AsFd, BorrowedFd},
            unix::net::{UnixListener, UnixStream},
        },
        process,
    };

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

    use super::*;

    fn inode(socket: impl AsFd) -> u64 {
        nix::sys::stat::fstat(socket.as_fd()).unwrap().st_ino
    }

    #[test]
    fn what_a_set_serves_follows_from_its_sockets() {
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let borrowed: BorrowedFd<'_> = set.0.as_fd();
        let number: u32 = borrowed.as_raw_fd().try_into().unwrap();
        let add = |file: BorrowedFd<'_>| set.add(file, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = UnixListener::bind(folder.path().join("s")).unwrap();
        let inodes = [inode(&listener), inode(&local)];
        let served = || served(process::id(), number, |inode| inodes.contains(&inode));
        assert_eq!(served(), Some(Served::Other));

        let (pair, _other) = UnixStream::pair().unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        add(pair.as_fd());
        add(pipe.as_fd());
        assert_eq!(served(), Some(Served::Other));

        let _client = UnixStream::connect(folder.path().join("s")).unwrap();
        let (accepted, _) = local.accept().unwrap();
        add(accepted.as_fd());
        assert_eq!(served(), Some(Served::Other));
        set.delete(&pair).unwrap();
        assert_eq!(served(), Some(Served::OneConnection));
        set.delete(&accepted).unwrap();

        add(pair.as_fd());
        add(listener.as_fd());
        assert_eq!(served(), Some(Served::Listeners));
        add(local.as_fd());
        assert_eq!(served(), Some(Served::Listeners));
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        add(accepted.as_fd());
        assert_eq!(served(), Some(Served::Several));
        set.delete(&listener).unwrap();
        set.delete(&local).unwrap();
        set.delete(&pair).unwrap();
        assert_eq!(served(), Some(Served::OneConnection));
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        add(datagrams.as_fd());
        assert_eq!(served(), Some(Served::Several));
    }

    #[test]
    fn other_files_are_no_sets() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        let other = nix::sys::eventfd::EventFd::new().unwrap();
        assert_eq!(served(process::id(), other.as_fd().as_raw_fd().try_into().unwrap(), |_| false), None);
        assert_eq!(served(process::id(), u32::MAX, |_| false), None);
        drop(pipe);
    }

    #[test]
    fn members_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t1038\n\
                    tfd:        7 events:       19 data:     5628  pos:0 ino:40e sdev:10\n\
                    tfd:       31 events:       19 data:     5628  pos:0 ino:30 sdev:9\n";
        assert_eq!(members(info), Some(vec![7, 31]));
        assert_eq!(members("pos:\t0\nflags:\t02\neventfd-count: 0\n"), None);
    }
}
