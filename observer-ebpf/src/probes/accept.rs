//! *accept*: how long connections wait between the end of their handshake and the target's accept.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_EXIST},
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map, tracepoint},
    maps::HashMap,
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::warn;
use observer_common::{
    accept::{Accepting, Arrival, PortKey, SEVERAL},
    listener::{DEPTHS, Listener, depth_bucket},
    loss::Loss,
};

use super::{listener, origin, process};
use crate::{
    emit::{add, lost, record},
    kernel::{self, AF_UNIX, OpenFile, Sock, Socket},
    presence,
};

/// Ports of targets' listeners, each with the listener's key, or 0 if there are several: other connections get no
/// time stamp.
#[map]
static PORTS: HashMap<PortKey, u64> = HashMap::with_max_entries(4096, 0);

/// When each connection that waits to be accepted had its handshake done, by address of its socket; of a unix
/// connection, of its client's.
#[map]
static QUEUED: HashMap<u64, Arrival> = HashMap::with_max_entries(65_536, 0);

/// What each thread that has called accept is in, by thread id. An entry stays until its thread is gone: to make one anew and
/// remove it would cost a sixth of what an accept does.
#[map]
static ACCEPTING: HashMap<u32, Accepting> = HashMap::with_max_entries(8192, 0);

const ESTABLISHED: u32 = 1;
const SYN_RECEIVED: u32 = 3;
const CLOSED: u32 = 7;
const CLOSE_WAIT: u32 = 8;

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
    } else if to == CLOSED && matches!(from, ESTABLISHED | SYN_RECEIVED | CLOSE_WAIT) {
        // Of all that end, only those: whoever closes a connection in order has accepted it before.
        forget(sock.address());
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
    if presence::of_process(tgid) {
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
        let depth = Socket::known((*listener).sk).queued((*listener).family)?;
        if depth > (*listener).peak {
            (*listener).peak = depth;
        }
        depth
    };
    let call = Accepting { inode, depth, reserved: 0 };
    if let Some(known) = ACCEPTING.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe { *known = call };
    } else if ACCEPTING.insert(tid, call, u64::from(BPF_ANY)).is_err() {
        lost(Loss::AcceptingFull);
    }
    Some(())
}

#[inline(always)]
fn exit(ctx: &TracePointContext, tgid: u32, tid: u32) -> Option<()> {
    // SAFETY: a live map value that only this thread writes.
    let call = ACCEPTING.get_ptr_mut(tid).map(|call| unsafe { call.replace(Accepting::NONE) });
    let call = call.filter(|call| call.inode != 0);
    // Whoever has such a call was a target when it began.
    if call.is_none() && !process::is_target(tgid) {
        return None;
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
    // SAFETY: a live map value.
    unsafe { count(listener, file.known_socket(), call.depth, tgid) };
    origin::accepted(tgid, tid, fd, file);
    Some(())
}

/// Counts a connection that a target has accepted, and how many had waited when it did. `None` stands for a connection
/// that nobody can find any more.
///
/// # Safety
/// `listener` points to a live map value.
#[inline(always)]
pub(super) unsafe fn count(listener: *mut Listener, connection: Option<Socket>, depth: u32, tgid: u32) {
    // SAFETY: by contract; counters and histogram are updated atomically, and of two processes that write `accepter`
    // at once either makes it right with its next accept.
    unsafe {
        add(&raw mut (*listener).accepts, 1);
        add(&raw mut (*listener).depths_sum, u64::from(depth));
        count_depth(listener, depth);
        match (*listener).accepter {
            0 => (*listener).accepter = tgid,
            other if other != tgid => (*listener).accepter = SEVERAL,
            _ => {}
        }
        let family = (*listener).family;
        if let Some(address) = connection.and_then(|connection| queued_as(connection, family))
            && let Some(arrival) = QUEUED.get_ptr(address)
        {
            record(&raw mut (*listener).wait, bpf_ktime_get_ns().saturating_sub((*arrival).at_ns));
            let _present = QUEUED.remove(address);
        } else if connection.is_some_and(Socket::is_closed) {
            add(&raw mut (*listener).accepts_aborted, 1);
        } else {
            add(&raw mut (*listener).accepts_without_arrival, 1);
        }
    }
}

/// What a connection of this family that waits, or has just been accepted, is known by in `QUEUED`.
#[inline(always)]
pub(super) fn queued_as(connection: Socket, family: u16) -> Option<u64> {
    if family == AF_UNIX { Some(connection.peer()?.address()) } else { Some(connection.address()) }
}

/// # Safety
/// `listener` points to a live map value.
#[inline(always)]
unsafe fn count_depth(listener: *mut Listener, depth: u32) {
    let bucket = depth_bucket(depth);
    // SAFETY: reads a local; volatile for the reason given in `emit::bucket`.
    let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
    if bucket < DEPTHS {
        // SAFETY: by contract, and `bucket` is inside.
        unsafe { add((&raw mut (*listener).depths).cast::<u64>().add(bucket), 1) };
    }
}

/// When a connection that waits, known by this, had its handshake done, if anybody saw that.
#[inline(always)]
pub(super) fn arrival_of(address: u64) -> Option<u64> {
    QUEUED.get_ptr(address).map(|arrival| {
        // SAFETY: a live map value; eight bytes are written at once.
        unsafe { (*arrival).at_ns }
    })
}

/// Whether a connection to this socket's port is one a target may accept.
#[inline(always)]
fn is_wanted(sock: &Sock) -> bool {
    PORTS.get_ptr(PortKey { netns: sock.netns(), port: u32::from(sock.port()) }).is_some()
}

/// Makes connections to this listener's port worth a time stamp.
#[inline(always)]
pub(super) fn want(netns: u32, port: u16, inode: u64) {
    let key = PortKey { netns, port: u32::from(port) };
    let only = if PORTS.get_ptr(key).is_some() { 0 } else { inode };
    let _full_means_unknown_waits = PORTS.insert(key, only, u64::from(BPF_ANY));
}

/// Key of the listener that a connection was made to, if only one can be meant.
#[inline(always)]
pub(super) fn only_listener_for(connection: Socket) -> Option<u64> {
    let key = PortKey { netns: connection.netns()?, port: u32::from(connection.port()?) };
    PORTS.get_ptr(key).map(|inode| {
        // SAFETY: a live map value; eight bytes are written at once.
        unsafe { *inode }
    })
}

/// Remembers that a connection begins to wait now.
#[inline(always)]
pub(super) fn queue(address: u64) -> Result<(), i32> {
    // SAFETY: has no preconditions.
    let arrival = Arrival { at_ns: unsafe { bpf_ktime_get_ns() }, unix_name: 0 };
    QUEUED.insert(address, arrival, u64::from(BPF_ANY))
}

/// The same of a unix connection to the listener of this name, unless it has been accepted in the meantime.
#[inline(always)]
pub(super) fn queue_again(address: u64, unix_name: u64) {
    // SAFETY: has no preconditions.
    let arrival = Arrival { at_ns: unsafe { bpf_ktime_get_ns() }, unix_name };
    let _accepted = QUEUED.insert(address, arrival, u64::from(BPF_EXIST));
}

/// Forgets a connection that does not wait.
#[inline(always)]
pub(super) fn forget(address: u64) {
    // A removal takes a lock also where there is nothing.
    if QUEUED.get_ptr(address).is_some() {
        let _accepted = QUEUED.remove(address);
    }
}
