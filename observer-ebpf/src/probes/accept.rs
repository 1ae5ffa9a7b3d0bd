//! *accept*: how long connections wait between the end of their handshake and the target's accept.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map, tracepoint},
    maps::HashMap,
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::warn;
use observer_common::{
    accept::{Listener, PortKey},
    loss::Loss,
};

use super::process;
use crate::{
    emit::{add, lost, record},
    kernel::{self, OpenSocket, Sock},
};

/// Listeners of targets, by inode number of the socket.
#[map]
static LISTENERS: HashMap<u64, Listener> = HashMap::with_max_entries(1024, 0);

/// Ports of targets' listeners: other connections get no time stamp.
#[map]
static PORTS: HashMap<PortKey, u8> = HashMap::with_max_entries(4096, 0);

/// When each connection that waits to be accepted had its handshake done, by address of its socket.
#[map]
static QUEUED: HashMap<u64, u64> = HashMap::with_max_entries(65_536, 0);

/// Listener that each thread inside an accept call accepts from, by thread id.
#[map]
static ACCEPTING: HashMap<u32, u64> = HashMap::with_max_entries(8192, 0);

/// What a new entry starts from: too large for the stack.
static NEW: Listener = Listener::EMPTY;

const ESTABLISHED: u32 = 1;
const SYN_RECEIVED: u32 = 3;
const CLOSED: u32 = 7;
const LISTENING: u32 = 10;

/// A TCP socket changes its state: a handshake ends, a connection dies, or a target begins to listen.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn sock_state(ctx: BtfTracePointContext) -> u32 {
    let sock = Sock::argument(&ctx, 0);
    let (from, to): (u32, u32) = (ctx.arg(1), ctx.arg(2));
    if to == ESTABLISHED && from == SYN_RECEIVED {
        if sock.is_tcp() && is_wanted(&sock) && queue(sock.address()).is_err() {
            lost(Loss::QueuedFull);
            warn!(&ctx, "no room for a connection that waits on port {}", sock.port());
        }
    } else if to == CLOSED {
        let _absent = QUEUED.remove(sock.address());
    } else if to == LISTENING && sock.is_tcp() {
        let (tgid, _) = kernel::current();
        if process::is_target(tgid) {
            want(sock.netns(), sock.port());
        }
    }
    0
}

/// The current thread calls accept: what it finds queued is a local peak, for between two accepts a queue only grows.
#[tracepoint]
fn accept_enter(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if process::is_target(tgid) {
        let _not_tcp = enter(&ctx, tid);
    }
    0
}

/// The current thread returns from accept, with a connection or without one.
#[tracepoint]
fn accept_exit(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if process::is_target(tgid) {
        let _not_tcp = exit(&ctx, tid);
    }
    0
}

/// Forgets a call that the thread never returned from.
#[inline(always)]
pub(super) fn thread_exited(tid: u32) {
    let _absent = ACCEPTING.remove(tid);
}

#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
fn enter(ctx: &TracePointContext, tid: u32) -> Option<()> {
    let socket = OpenSocket::of(kernel::accept_fd(ctx)?)?;
    let inode = socket.inode()?;
    let listener = match LISTENERS.get_ptr_mut(inode) {
        Some(listener) => listener,
        None => {
            want(socket.netns()?, socket.port()?);
            if LISTENERS.insert(inode, &NEW, u64::from(BPF_NOEXIST)).is_err() {
                lost(Loss::ListenersFull);
                warn!(ctx, "no room for listener {}", inode);
            }
            LISTENERS.get_ptr_mut(inode)?
        }
    };
    let queued = socket.queued()?;
    // SAFETY: a live map value; a lost race between two accepts leaves the lesser of two peaks.
    unsafe {
        if queued > (*listener).depth_peak {
            (*listener).depth_peak = queued;
        }
    }
    if ACCEPTING.insert(tid, inode, u64::from(BPF_ANY)).is_err() {
        lost(Loss::AcceptingFull);
    }
    Some(())
}

#[inline(always)]
fn exit(ctx: &TracePointContext, tid: u32) -> Option<()> {
    let inode = ACCEPTING.get_ptr(tid).map(|inode| {
        // SAFETY: a live map value that only this thread writes.
        unsafe { *inode }
    });
    if inode.is_some() {
        let _absent = ACCEPTING.remove(tid);
    }
    let fd = u32::try_from(kernel::returned(ctx)?).ok()?;
    let connection = OpenSocket::of(fd)?;
    let Some(listener) = inode.and_then(|inode| LISTENERS.get_ptr_mut(inode)) else {
        lost(Loss::AcceptUnattributed);
        return None;
    };
    let arrived = QUEUED.get_ptr(connection.address()).map(|at| {
        // SAFETY: a live map value, written once.
        unsafe { *at }
    });
    // SAFETY: a live map value; counters and histogram are updated atomically.
    unsafe {
        add(&raw mut (*listener).accepts, 1);
        match arrived {
            Some(at) => {
                record(&raw mut (*listener).wait, bpf_ktime_get_ns().saturating_sub(at));
                let _present = QUEUED.remove(connection.address());
            }
            None => add(&raw mut (*listener).accepts_without_arrival, 1),
        }
    }
    Some(())
}

/// Whether a connection to this socket's port is one a target may accept.
#[inline(always)]
fn is_wanted(sock: &Sock) -> bool {
    PORTS.get_ptr(PortKey { netns: sock.netns(), port: u32::from(sock.port()) }).is_some()
}

#[inline(always)]
fn want(netns: u32, port: u16) {
    let key = PortKey { netns, port: u32::from(port) };
    let _full_means_unknown_waits = PORTS.insert(key, 1, u64::from(BPF_ANY));
}

#[inline(always)]
fn queue(address: u64) -> Result<(), i32> {
    // SAFETY: has no preconditions.
    QUEUED.insert(address, unsafe { bpf_ktime_get_ns() }, u64::from(BPF_ANY))
}
