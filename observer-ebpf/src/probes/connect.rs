//! *connect*: when connections to unix sockets were queued. The kernel has no event for that, but a `connect` that
//! succeeds has just queued its connection. A waiting connection is identified by the client's socket.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::{map, tracepoint},
    maps::HashMap,
    programs::TracePointContext,
};
use observer_common::loss::Loss;

use crate::{
    emit::count_loss,
    kernel::{self, OpenFile, Socket},
    state::accept_queue,
};

/// Client socket of each thread inside a `connect` call, by thread ID.
#[map]
static CONNECTING: HashMap<u32, u64> = HashMap::with_max_entries(8192, 0);

/// A thread of any process calls `connect`. Whether it connects to a target is known only when the call returns, so
/// every call on a unix socket is recorded.
#[tracepoint]
fn connect_enter(ctx: TracePointContext) -> u32 {
    let socket = kernel::fd_argument(&ctx).and_then(OpenFile::of).and_then(OpenFile::unix_socket);
    if let Some(client) = socket {
        let (_, tid) = kernel::current();
        // The server may accept the connection before this call returns.
        let is_noted = CONNECTING.insert(tid, client.address(), u64::from(BPF_ANY)).is_ok()
            && accept_queue::record_arrival(client.address()).is_ok();
        if !is_noted {
            count_loss(Loss::QueuedFull);
        }
    }
    0
}

/// A thread returns from `connect`. If the call has waited for space in the accept queue, its first timestamp is too
/// early and is replaced.
#[tracepoint]
fn connect_exit(ctx: TracePointContext) -> u32 {
    let (_, tid) = kernel::current();
    let Some(client) = CONNECTING.get_ptr(tid) else { return 0 };
    // SAFETY: a live map value that only this thread writes.
    let client = Socket::at(unsafe { *client });
    let _present = CONNECTING.remove(tid);
    let is_connected = kernel::return_value(&ctx) == Some(0);
    let name = client.peer().and_then(Socket::unix_name);
    match name.filter(|&name| is_connected && accept_queue::is_tracked_unix(name)) {
        Some(name) => accept_queue::restamp(client.address(), name),
        None => accept_queue::forget(client.address()),
    }
    0
}
