//! *accept*: records when connections are queued, and which call accepts them. `state/accept_queue.rs` counts the wait.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::warn;
use observer_common::{accept::AcceptCall, loss::Loss};

use crate::{
    emit::count_loss,
    kernel::{self, OpenFile, Sock, Socket},
    state::{
        accept_queue::{ACCEPTING, count_accept, forget, is_tracked, record_arrival},
        id_filter, listeners, requests, targets,
    },
};

const ESTABLISHED: u32 = 1;
const SYN_RECEIVED: u32 = 3;
const CLOSED: u32 = 7;
const CLOSE_WAIT: u32 = 8;

/// A TCP socket changes its state: a handshake ends, or a connection closes.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn sock_state(ctx: BtfTracePointContext) -> u32 {
    let sock = Sock::argument(&ctx, 0);
    let (from, to): (u32, u32) = (ctx.arg(1), ctx.arg(2));
    if to == ESTABLISHED && from == SYN_RECEIVED {
        if sock.is_tcp() && is_tracked(&sock) && record_arrival(sock.address()).is_err() {
            count_loss(Loss::QueuedFull);
            warn!(&ctx, "no room for a connection that waits on port {}", sock.port());
        }
    } else if to == CLOSED && matches!(from, ESTABLISHED | SYN_RECEIVED | CLOSE_WAIT) {
        // Only connections that close from one of these states may still be queued. One that is closed in the regular
        // order has been accepted before.
        forget(sock.address());
    }
    0
}

/// The current thread calls `accept`. The queue depth that it finds is a local maximum, because between two accepts a
/// queue only grows.
#[tracepoint]
fn accept_enter(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if targets::is_target(tgid) {
        let _no_socket = record_call(&ctx, tgid, tid);
    }
    0
}

/// The current thread returns from `accept`, with or without a connection.
#[tracepoint]
fn accept_exit(ctx: TracePointContext) -> u32 {
    let (tgid, tid) = kernel::current();
    if id_filter::may_contain_process(tgid) {
        let _no_socket = complete_call(&ctx, tgid, tid);
    }
    0
}

#[inline(always)]
fn record_call(ctx: &TracePointContext, tgid: u32, tid: u32) -> Option<()> {
    let (inode, listener) = listeners::listener_of(OpenFile::of(kernel::fd_argument(ctx)?)?, tgid)?;
    // SAFETY: a live map value; if two accepts race, the lower of the two peaks may remain.
    let depth = unsafe {
        let depth = Socket::at((*listener).sk).queue_depth((*listener).family)?;
        if depth > (*listener).peak {
            (*listener).peak = depth;
        }
        depth
    };
    let call = AcceptCall { inode, depth, reserved: 0 };
    if let Some(known) = ACCEPTING.get_ptr_mut(tid) {
        // SAFETY: a live map value that only this thread writes.
        unsafe { *known = call };
    } else if ACCEPTING.insert(tid, call, u64::from(BPF_ANY)).is_err() {
        count_loss(Loss::AcceptingFull);
    }
    Some(())
}

#[inline(always)]
fn complete_call(ctx: &TracePointContext, tgid: u32, tid: u32) -> Option<()> {
    // SAFETY: a live map value that only this thread writes.
    let call = ACCEPTING.get_ptr_mut(tid).map(|call| unsafe { call.replace(AcceptCall::NONE) });
    let call = call.filter(|call| call.inode != 0);
    // A thread with a recorded call belonged to a target when the call began.
    if call.is_none() && !targets::is_target(tgid) {
        return None;
    }
    let fd = u32::try_from(kernel::return_value(ctx)?).ok()?;
    let file = OpenFile::of(fd)?;
    let Some(call) = call else {
        // Only stream sockets are tracked. An accept on any other socket is no loss.
        file.socket()?;
        count_loss(Loss::AcceptUnattributed);
        return None;
    };
    let listener = listeners::listener_with(call.inode)?;
    // SAFETY: a live map value.
    unsafe { count_accept(listener, file.socket_unchecked(), call.depth, tgid) };
    requests::record_accept(tgid, tid, fd, file);
    Some(())
}
