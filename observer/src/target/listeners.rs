//! The listening sockets of a network namespace, as the kernel's sock_diag tells them (what `ss -ltn` asks, too).

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    thread,
};

use anyhow::{Context as _, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        socket::{setsockopt, sockopt::ReceiveTimeout},
        time::{TimeVal, TimeValLike as _},
    },
};

/// A TCP socket that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listening {
    /// Inode number of the socket.
    pub(crate) inode: u64,
    /// Inode number of its network namespace.
    pub(crate) netns: u32,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Connections that wait to be accepted now.
    pub(crate) depth: u32,
    /// Most connections the kernel lets wait.
    pub(crate) limit: u32,
}

/// Asks one network namespace after another, over one socket kept open in each.
#[derive(Default)]
pub(crate) struct SockDiag {
    sockets: HashMap<u32, Socket>,
}

impl SockDiag {
    /// All TCP listeners of the network namespace that a process is in.
    pub(crate) fn listening(&mut self, pid: u32) -> Result<Vec<Listening>> {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        let netns = u32::try_from(namespace.metadata()?.ino())?;
        let socket = match self.sockets.entry(netns) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(place) => place.insert(open_in(namespace)?),
        };
        let mut found = dump(socket, AF_INET, netns)?;
        found.extend(dump(socket, AF_INET6, netns)?);
        Ok(found)
    }
}

/// Opens a sock_diag socket in another network namespace. A thread's namespace cannot be lent to its
/// siblings, so one that lives just for this enters it.
fn open_in(namespace: File) -> Result<Socket> {
    thread::spawn(move || -> Result<Socket> {
        let own = File::open("/proc/thread-self/ns/net")?;
        if own.metadata()?.ino() != namespace.metadata()?.ino() {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .context("cannot enter the target's network namespace")?;
        }
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).context("cannot open a sock_diag socket")?;
        // The kernel answers at once or not at all; observer must not hang either way.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5))?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        Ok(socket)
    })
    .join()
    .expect("the thread does not panic")
}

fn dump(socket: &Socket, family: u8, netns: u32) -> Result<Vec<Listening>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::LISTEN,
        socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
    });
    let mut request = NetlinkMessage::new(header, request.into());
    request.finalize();
    let mut buffer = vec![0; request.buffer_len()];
    request.serialize(&mut buffer);
    socket.send(&buffer, 0).context("sock_diag does not take a request")?;

    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full().context("sock_diag does not answer")?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)?;
            // Messages are padded to four bytes, but for the last.
            let length = (message.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
            rest = &rest[length..];
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    found.push(listening(&response.header, netns));
                }
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => bail!("sock_diag answers with {error}"),
                _ => {}
            }
        }
    }
}

/// For a listener the kernel reports the depth of its accept queue and its limit in place of byte counts.
fn listening(response: &InetResponseHeader, netns: u32) -> Listening {
    let id = &response.socket_id;
    let address: IpAddr = id.source_address;
    Listening {
        inode: u64::from(response.inode),
        netns,
        address: SocketAddr::new(address, id.source_port),
        depth: response.recv_queue,
        limit: response.send_queue,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn depth_and_address_of_a_listener_of_our_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let waiting: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut diag = SockDiag::default();
        let found = diag.listening(std::process::id()).unwrap();
        let mine: Vec<_> = found.iter().filter(|l| l.address == address).collect();
        assert_eq!(mine.len(), 1);
        assert_eq!(mine[0].depth as usize, waiting.len());
        assert!(mine[0].limit >= 128, "std asks for at least 128: {}", mine[0].limit);
    }
}
