//! *accept*: how long connections wait between the end of their handshake and the target's accept.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map, tracepoint},
    maps::HashMap,
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::warn;
use observer_common::{
    accept::{Accepting, PortKey, SEVERAL},
    listener::{DEPTHS, Listener, depth_bucket},
    loss::Loss,
};

use super::{listener, process};
use crate::{
    emit::{add, lost, record},
    kernel::{self, OpenFile, Sock, Socket},
};

/// Ports of targets' listeners: other connections get no time stamp.
#[map]
static PORTS: HashMap<PortKey, u8> = HashMap::with_max_entries(4096, 0);

/// When each connection that waits to be accepted had its handshake done, by address of its socket.
#[map]
static QUEUED: HashMap<u64, u64> = HashMap::with_max_entries(65_536, 0);

/// Each thread inside an accept call, by thread id.
#[map]
static ACCEPTING: HashMap<u32, Accepting> = HashMap::with_max_entries(8192, 0);

const ESTABLISHED: u32 = 1;
const SYN_RECEIVED: u32 = 3;
const CLOSED: u32 = 7;

/// A TCP socket changes its state: a handshake ends, or a connection dies.
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
    }
    0
}

/// The current thread calls accept: what it finds queued is a local peak, for between two accepts a queue only grows.
#[tracepoint]
fn accept_enter(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if process::is_target(tgid) {
        let _no_socket = enter(&ctx, tgid, tid);
    }
    0
}

/// The current thread returns from accept, with a connection or without one.
#[tracepoint]
fn accept_exit(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if process::is_target(tgid) {
        let _no_socket = exit(&ctx, tgid, tid);
    }
    0
}

/// Forgets a call that the thread never returned from.
#[inline(always)]
pub(super) fn thread_exited(tid: u32) {
    let _absent = ACCEPTING.remove(tid);
}

#[inline(always)]
fn enter(ctx: &TracePointContext, tgid: u32, tid: u32) -> Option<()> {
    let (inode, listener) = listener::listener_of(OpenFile::of(kernel::fd_argument(ctx)?)?, tgid)?;
    // SAFETY: a live map value; a lost race between two accepts leaves the lesser of two peaks.
    let depth = unsafe {
        let depth = Socket::known((*listener).sk).queued()?;
        if depth > (*listener).peak {
            (*listener).peak = depth;
        }
        depth
    };
    if ACCEPTING.insert(tid, Accepting { inode, depth, reserved: 0 }, u64::from(BPF_ANY)).is_err() {
        lost(Loss::AcceptingFull);
    }
    Some(())
}

#[inline(always)]
fn exit(ctx: &TracePointContext, tgid: u32, tid: u32) -> Option<()> {
    let call = ACCEPTING.get_ptr(tid).map(|call| {
        // SAFETY: a live map value that only this thread writes.
        unsafe { *call }
    });
    if call.is_some() {
        let _present = ACCEPTING.remove(tid);
    }
    let fd = u32::try_from(kernel::returned(ctx)?).ok()?;
    let file = OpenFile::of(fd)?;
    let Some(call) = call else {
        // Of a stream socket, that is: nobody promised to know of others.
        file.socket()?;
        lost(Loss::AcceptUnattributed);
        return None;
    };
    let listener = listener::listener_with(call.inode)?;
    let connection = file.known_socket()?;
    let depth = call.depth;
    let arrived = arrival_of(connection);
    // SAFETY: a live map value; counters and histogram are updated atomically, and of two processes that write
    // `accepter` at once either makes it right with its next accept.
    unsafe {
        add(&raw mut (*listener).accepts, 1);
        add(&raw mut (*listener).depths_sum, u64::from(depth));
        count_depth(listener, depth);
        match (*listener).accepter {
            0 => (*listener).accepter = tgid,
            other if other != tgid => (*listener).accepter = SEVERAL,
            _ => {}
        }
        if let Some(at) = arrived {
            record(&raw mut (*listener).wait, bpf_ktime_get_ns().saturating_sub(at));
            let _present = QUEUED.remove(connection.address());
        } else if connection.is_closed() {
            add(&raw mut (*listener).accepts_aborted, 1);
        } else {
            add(&raw mut (*listener).accepts_without_arrival, 1);
        }
    }
    Some(())
}

/// # Safety
/// `listener` points to a live map value.
#[inline(always)]
unsafe fn count_depth(listener: *mut Listener, depth: u32) {
    let bucket = depth_bucket(depth);
    // SAFETY: reads a local; volatile for the reason given in `emit::record`.
    let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
    if bucket < DEPTHS {
        // SAFETY: by contract, and `bucket` is inside.
        unsafe { add((&raw mut (*listener).depths).cast::<u64>().add(bucket), 1) };
    }
}

/// When a connection that waits had its handshake done, if anybody saw that.
#[inline(always)]
pub(super) fn arrival_of(connection: Socket) -> Option<u64> {
    QUEUED.get_ptr(connection.address()).map(|at| {
        // SAFETY: a live map value, written once.
        unsafe { *at }
    })
}

/// Whether a connection to this socket's port is one a target may accept.
#[inline(always)]
fn is_wanted(sock: &Sock) -> bool {
    PORTS.get_ptr(PortKey { netns: sock.netns(), port: u32::from(sock.port()) }).is_some()
}

/// Makes connections to this port worth a time stamp.
#[inline(always)]
pub(super) fn want(netns: u32, port: u16) {
    let key = PortKey { netns, port: u32::from(port) };
    let _full_means_unknown_waits = PORTS.insert(key, 1, u64::from(BPF_ANY));
}

#[inline(always)]
fn queue(address: u64) -> Result<(), i32> {
    // SAFETY: has no preconditions.
    QUEUED.insert(address, unsafe { bpf_ktime_get_ns() }, u64::from(BPF_ANY))
}
