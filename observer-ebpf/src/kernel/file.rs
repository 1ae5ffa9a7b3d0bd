//! Open files and sockets, and the queues of connections that wait to be accepted.

use core::{ffi::c_void, ptr::null};

use aya_ebpf::{
    helpers::{bpf_get_current_task, bpf_probe_read_kernel_buf},
    programs::BtfTracePointContext,
};
use observer_common::{block::Block, layout::ABSENT, listener::NAME};

use super::access::{LAYOUT, load, offset, probe};

const TCP: u16 = 6;
/// `IPPROTO_MPTCP`.
const MULTIPATH_TCP: u16 = 262;
pub(crate) const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCK_STREAM: u16 = 1;
const SOCK_SEQPACKET: u16 = 5;
const CLOSED: u8 = 7;
const LISTENING: u8 = 10;
/// `S_IFMT`, `S_IFSOCK`, `S_IFREG` and `S_IFBLK`.
const FILE_KINDS: u16 = 0o170_000;
const SOCKET_FILE: u16 = 0o140_000;
const REGULAR_FILE: u16 = 0o100_000;
const BLOCK_DEVICE: u16 = 0o060_000;

/// A `struct sock` passed to a BTF tracepoint.
pub(crate) struct Sock(*const u8);

impl Sock {
    #[inline(always)]
    pub(crate) fn argument(ctx: &BtfTracePointContext, n: usize) -> Self {
        Self(ctx.arg(n))
    }

    /// The socket's address, which identifies it while it exists.
    #[inline(always)]
    pub(crate) fn address(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // SAFETY: typed pointer, offset of this field.
        let protocol: u16 = unsafe { load(self.0, offset(&LAYOUT.sock_protocol)) };
        protocol == TCP
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub(crate) fn port(&self) -> u16 {
        // SAFETY: as above.
        unsafe { load(self.0, offset(&LAYOUT.sock_port)) }
    }

    /// Whether this TCP connection is a further path of a Multipath TCP connection. Such a path is never accepted.
    #[inline(always)]
    pub(crate) fn is_further_path(&self) -> bool {
        let first = || {
            let context: *const u8 = probe(self.0, offset(&LAYOUT.sock_upper))?;
            first_path(probe(context, offset(&LAYOUT.subflow_parent))?)
        };
        // Old kernels set the first path of a new connection when it is accepted.
        first().is_some_and(|first| first != self.0)
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u32 {
        // SAFETY: as above; `net` is a typed pointer as well.
        unsafe {
            let net: *const u8 = load(self.0, offset(&LAYOUT.sock_net));
            load(net, offset(&LAYOUT.net_inum))
        }
    }
}

/// The first TCP connection, or the TCP listener, of a Multipath TCP socket; `None` if it has none.
#[inline(always)]
fn first_path(sk: *const u8) -> Option<*const u8> {
    let field = offset(&LAYOUT.multipath_first);
    if field == ABSENT as usize {
        return None;
    }
    let first: *const u8 = probe(sk, field)?;
    if first.is_null() { None } else { Some(first) }
}

/// The process, the descriptor and the file that an iterator over open files visits; `None` at its end.
#[inline(always)]
pub(crate) fn iterated(ctx: *mut c_void) -> Option<(u32, u32, OpenFile)> {
    // The verifier allows direct loads from the context only at constant offsets. The helper has no such limit.
    let task: *const u8 = probe(ctx.cast(), offset(&LAYOUT.iter_task))?;
    let file: *const u8 = probe(ctx.cast(), offset(&LAYOUT.iter_file))?;
    if task.is_null() || file.is_null() {
        return None;
    }
    let fd = probe(ctx.cast(), offset(&LAYOUT.iter_fd))?;
    Some((probe(task, offset(&LAYOUT.task_tgid))?, fd, OpenFile(file)))
}

/// A file that some process has open.
#[derive(Clone, Copy)]
pub(crate) struct OpenFile(pub(super) *const u8);

impl OpenFile {
    /// The file behind descriptor `fd` of the current process.
    #[inline(always)]
    pub(crate) fn of(fd: u32) -> Option<Self> {
        // SAFETY: has no preconditions.
        let task = unsafe { bpf_get_current_task() } as *const u8;
        let files: *const u8 = probe(task, offset(&LAYOUT.task_files))?;
        let table: *const u8 = probe(files, offset(&LAYOUT.files_fdt))?;
        let (max, open): (u32, *const u8) = Self::table(table)?;
        if fd >= max {
            return None;
        }
        let file: *const u8 = probe(open, fd as usize * size_of::<*const u8>())?;
        if file.is_null() { None } else { Some(Self(file)) }
    }

    /// The size of a descriptor table, and the address of its array. The two fields have been adjacent so far, so they
    /// are read at once.
    #[inline(always)]
    fn table(table: *const u8) -> Option<(u32, *const u8)> {
        let (max, open) = (offset(&LAYOUT.fdt_max_fds), offset(&LAYOUT.fdt_fd));
        if open == max + size_of::<u64>() {
            let [max, open]: [u64; 2] = probe(table, max)?;
            #[expect(clippy::cast_possible_truncation, reason = "the number is in the lower half")]
            return Some((max as u32, open as *const u8));
        }
        Some((probe(table, max)?, probe(table, open)?))
    }

    /// The file's address, which identifies it while it is open.
    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    /// Inode number, as in `/proc/PID/fd`.
    #[inline(always)]
    pub(crate) fn inode(self) -> Option<u64> {
        probe(probe(self.0, offset(&LAYOUT.file_inode))?, offset(&LAYOUT.inode_number))
    }

    /// Whether the file is anonymous, that is, without a file type: an `eventfd`, a `timerfd`, or a similar object.
    #[inline(always)]
    pub(crate) fn is_anonymous(self) -> Option<bool> {
        let inode = probe(self.0, offset(&LAYOUT.file_inode))?;
        Some(probe::<u16>(inode, offset(&LAYOUT.inode_mode))? & FILE_KINDS == 0)
    }

    /// What a thread that is blocked on this file waits for.
    #[inline(always)]
    pub(crate) fn block(self) -> Option<Block> {
        let inode = probe(self.0, offset(&LAYOUT.file_inode))?;
        Some(match probe::<u16>(inode, offset(&LAYOUT.inode_mode))? & FILE_KINDS {
            SOCKET_FILE => Block::Network,
            REGULAR_FILE | BLOCK_DEVICE => Block::Disk,
            _ => Block::Other,
        })
    }

    /// The socket behind the file. The caller knows that it is a socket.
    #[inline(always)]
    pub(crate) fn socket_unchecked(self) -> Option<Socket> {
        let socket: *const u8 = probe(self.0, offset(&LAYOUT.file_private_data))?;
        Some(Socket(probe(socket, offset(&LAYOUT.socket_sk))?))
    }

    /// The unix stream socket behind the file. The caller knows that it is a socket of some kind.
    #[inline(always)]
    pub(crate) fn unix_socket(self) -> Option<Socket> {
        let socket = self.socket_unchecked()?;
        if socket.is_unix() { Socket::from_stream_sock(socket.0) } else { None }
    }

    /// The stream socket behind the file, for Multipath TCP its first TCP socket; `None` if it is anything else.
    #[inline(always)]
    pub(crate) fn socket(self) -> Option<Socket> {
        let socket: *const u8 = probe(self.0, offset(&LAYOUT.file_private_data))?;
        // Every file may have private data, but only a socket points back at its file.
        if probe::<*const u8>(socket, offset(&LAYOUT.socket_file))? != self.0 {
            return None;
        }
        Socket::from_stream_sock(probe(socket, offset(&LAYOUT.socket_sk))?)
    }
}

/// A `struct sock` of TCP or of a unix stream socket.
#[derive(Clone, Copy)]
pub(crate) struct Socket(*const u8);

impl Socket {
    #[inline(always)]
    fn from_stream_sock(sk: *const u8) -> Option<Self> {
        let family: u16 = probe(sk, offset(&LAYOUT.sock_family))?;
        let protocol: u16 = probe(sk, offset(&LAYOUT.sock_protocol))?;
        let kind: u16 = probe(sk, offset(&LAYOUT.sock_type))?;
        let is_tcp = (family == AF_INET || family == AF_INET6) && protocol == TCP;
        let is_stream = family == AF_UNIX && (kind == SOCK_STREAM || kind == SOCK_SEQPACKET);
        if is_tcp || is_stream {
            return Some(Self(sk));
        }
        let is_multipath = (family == AF_INET || family == AF_INET6) && protocol == MULTIPATH_TCP;
        if is_multipath { first_path(sk).map(Self) } else { None }
    }

    /// The socket at this address, which the caller knows to be open.
    #[inline(always)]
    pub(crate) fn at(address: u64) -> Self {
        Self(address as *const u8)
    }

    /// The first TCP connection of a Multipath TCP connection; any other socket itself.
    #[inline(always)]
    pub(crate) fn first_path(self) -> Self {
        if probe::<u16>(self.0, offset(&LAYOUT.sock_protocol)) == Some(MULTIPATH_TCP)
            && let Some(first) = first_path(self.0)
        {
            return Self(first);
        }
        self
    }

    /// The socket that was at this address, the one behind a descriptor, if it still is there: it may have been freed
    /// since.
    #[inline(always)]
    pub(crate) fn still_at(address: u64, inode: u64) -> Option<Self> {
        let sk = address as *const u8;
        let socket: *const u8 = probe(sk, offset(&LAYOUT.sock_socket))?;
        let file = OpenFile(probe(socket, offset(&LAYOUT.socket_file))?);
        if file.inode()? == inode { Self::from_stream_sock(sk) } else { None }
    }

    /// The socket's address, which identifies it while it exists, as [`Sock::address`] does.
    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn is_listening(self) -> bool {
        probe::<u8>(self.0, offset(&LAYOUT.sock_state)) == Some(LISTENING)
    }

    /// Whether the connection is closed. A connection that was reset while it waited stays in the accept queue.
    #[inline(always)]
    pub(crate) fn is_closed(self) -> bool {
        probe::<u8>(self.0, offset(&LAYOUT.sock_state)) == Some(CLOSED)
    }

    #[inline(always)]
    pub(crate) fn family(self) -> Option<u16> {
        probe(self.0, offset(&LAYOUT.sock_family))
    }

    #[inline(always)]
    pub(crate) fn is_unix(self) -> bool {
        self.family() == Some(AF_UNIX)
    }

    /// The other end of a unix connection. For a connection that waits to be accepted, it is the client's socket.
    #[inline(always)]
    pub(crate) fn peer(self) -> Option<Self> {
        let peer: *const u8 = probe(self.0, offset(&LAYOUT.unix_peer))?;
        if peer.is_null() { None } else { Some(Self(peer)) }
    }

    /// Identifies the name of a unix socket. A listener and the connections made to it share the name.
    #[inline(always)]
    pub(crate) fn unix_name(self) -> Option<u64> {
        probe(self.0, offset(&LAYOUT.unix_address))
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub(crate) fn port(self) -> Option<u16> {
        probe(self.0, offset(&LAYOUT.sock_port))
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(self) -> Option<u32> {
        probe(probe(self.0, offset(&LAYOUT.sock_net))?, offset(&LAYOUT.net_inum))
    }

    /// Writes the local address, or the path of a unix socket, to `to` and returns its length in bytes.
    #[inline(always)]
    pub(crate) fn name(self, to: &mut [u8; NAME]) -> Option<u16> {
        match self.family()? {
            AF_INET => {
                let address: [u8; 4] = probe(self.0, offset(&LAYOUT.sock_address4))?;
                to[..4].copy_from_slice(&address);
                Some(4)
            }
            AF_INET6 => {
                let address: [u8; 16] = probe(self.0, offset(&LAYOUT.sock_address6))?;
                to[..16].copy_from_slice(&address);
                Some(16)
            }
            _ => {
                let address: *const u8 = probe(self.0, offset(&LAYOUT.unix_address))?;
                let length: i32 = probe(address, offset(&LAYOUT.address_length))?;
                let name = address.wrapping_add(offset(&LAYOUT.address_name)).wrapping_add(size_of::<u16>());
                // SAFETY: the helper checks the address.
                unsafe { bpf_probe_read_kernel_buf(name, to) }.ok()?;
                u16::try_from(length).ok()?.checked_sub(2)
            }
        }
    }

    /// Number of connections in the accept queue. `family` is that of the socket.
    #[inline(always)]
    pub(crate) fn queue_depth(self, family: u16) -> Option<u32> {
        if family == AF_UNIX {
            probe(self.0, offset(&LAYOUT.sock_received))
        } else {
            probe(self.0, offset(&LAYOUT.sock_ack_backlog))
        }
    }

    /// Maximum number of connections that the kernel lets wait.
    #[inline(always)]
    pub(crate) fn limit(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.sock_max_ack_backlog))
    }

    /// Segments that the kernel has dropped since the socket was created.
    #[inline(always)]
    pub(crate) fn drops(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.sock_drops))
    }

    /// Handshakes in progress. TCP only.
    #[inline(always)]
    pub(crate) fn half_open(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.accept_half_open))
    }

    /// Whether connections stay half open until their first data arrives (`TCP_DEFER_ACCEPT`). TCP only.
    #[inline(always)]
    pub(crate) fn defers_accepts(self) -> bool {
        probe::<u8>(self.0, offset(&LAYOUT.accept_defer)).is_some_and(|retransmissions| retransmissions != 0)
    }

    /// First connection in the accept queue of a unix socket: the one that has waited longest.
    #[inline(always)]
    pub(crate) fn first_unix_waiting(self) -> Option<Self> {
        let buffer: *const u8 = probe(self.0, offset(&LAYOUT.sock_received_first))?;
        // The list is circular: its end is the head, inside the listener.
        if buffer == self.0.wrapping_add(offset(&LAYOUT.sock_received_first)) {
            return None;
        }
        Some(Self(probe(buffer, offset(&LAYOUT.buffer_sk))?))
    }

    /// First entry of the accept queue: the connection that has waited longest. TCP only.
    #[inline(always)]
    pub(crate) fn first_waiting(self) -> QueueEntry {
        QueueEntry(probe(self.0, offset(&LAYOUT.accept_head)).unwrap_or(null()))
    }
}

/// An entry of a TCP accept queue, or its end.
#[derive(Clone, Copy)]
pub(crate) struct QueueEntry(*const u8);

impl QueueEntry {
    /// The entry at this address, which the caller has read from the kernel.
    #[inline(always)]
    pub(crate) fn at(address: u64) -> Self {
        Self(address as *const u8)
    }

    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    /// Whether this is the end of the queue.
    #[inline(always)]
    pub(crate) fn is_end(self) -> bool {
        self.0.is_null()
    }

    /// The connection of this entry, and the next entry.
    #[inline(always)]
    pub(crate) fn read(self) -> Option<(Socket, Self)> {
        if self.0.is_null() {
            return None;
        }
        // An unreadable field reads as null, without a branch: the verifier analyses every branch.
        let connection = Socket(probe(self.0, offset(&LAYOUT.request_sk)).unwrap_or(null()));
        Some((connection, Self(probe(self.0, offset(&LAYOUT.request_next)).unwrap_or(null()))))
    }
}
