//! Connections that a process accepted before observer attached.

use std::collections::{HashMap, HashSet};

use procfs::{
    net::TcpState,
    process::{FDTarget, Process},
};

/// Descriptors of a process's established connections to these local ports, each with its socket's inode number.
/// Empty if the process is gone.
pub(crate) fn accepted(pid: u32, ports: &HashSet<u16>) -> Vec<(u32, u64)> {
    let Some(process) = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok()) else {
        return Vec::new();
    };
    let (v4, v6) = (process.tcp().unwrap_or_default(), process.tcp6().unwrap_or_default());
    let open = v4.iter().chain(&v6).filter(|entry| entry.state == TcpState::Established);
    let ours: HashSet<u64> =
        open.filter(|entry| ports.contains(&entry.local_address.port())).map(|entry| entry.inode).collect();
    let descriptors: HashMap<u64, u32> = process
        .fd()
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|open| match open.target {
            FDTarget::Socket(inode) => Some((inode, u32::try_from(open.fd).ok()?)),
            _ => None,
        })
        .collect();
    ours.into_iter().filter_map(|inode| Some((*descriptors.get(&inode)?, inode))).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd as _,
    };

    use super::*;

    #[test]
    fn only_accepted_connections_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        let found = accepted(std::process::id(), &HashSet::from([address.port()]));
        let descriptors: Vec<_> = found.iter().map(|(fd, _)| i32::try_from(*fd).unwrap()).collect();
        assert_eq!(descriptors, [server.as_raw_fd()]);
        assert!(
            accepted(std::process::id(), &HashSet::from([client.local_addr().unwrap().port() ^ 1]))
                .is_empty()
        );
    }
}
