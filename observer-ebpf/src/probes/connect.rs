//! *connect*: when connections to unix sockets began to wait. The kernel has no event for that, but a connect that
//! succeeds has just queued its connection; what waits is known by the client's socket.

use aya_ebpf::{
    bindings::BPF_ANY,
    macros::{map, tracepoint},
    maps::HashMap,
    programs::TracePointContext,
};
use observer_common::loss::Loss;

use crate::{
    emit::lost,
    kernel::{self, OpenFile, Socket},
    state::accept_queue,
};

/// The client's socket of each thread inside a connect call, by thread id.
#[map]
static CONNECTING: HashMap<u32, u64> = HashMap::with_max_entries(8192, 0);

/// Some thread calls connect. Whether that leads to a target is known when it is done; until then it might.
#[tracepoint]
fn connect_enter(ctx: TracePointContext) -> u32 {
    let socket = kernel::fd_argument(&ctx).and_then(OpenFile::of).and_then(OpenFile::unix_socket);
    if let Some(client) = socket {
        let (_, tid) = kernel::current();
        // The acceptor may be faster than the rest of this call.
        let is_noted = CONNECTING.insert(tid, client.address(), u64::from(BPF_ANY)).is_ok()
            && accept_queue::queue(client.address()).is_ok();
        if !is_noted {
            lost(Loss::QueuedFull);
        }
    }
    0
}

/// Some thread returns from connect. If that has waited for room in the queue, the time stamp was too early.
#[tracepoint]
fn connect_exit(ctx: TracePointContext) -> u32 {
    let (_, tid) = kernel::current();
    let Some(client) = CONNECTING.get_ptr(tid) else { return 0 };
    // SAFETY: a live map value that only this thread writes.
    let client = Socket::known(unsafe { *client });
    let _present = CONNECTING.remove(tid);
    let is_connected = kernel::returned(&ctx) == Some(0);
    let name = client.peer().and_then(Socket::unix_name);
    match name.filter(|&name| is_connected && accept_queue::is_tracked_unix(name)) {
        Some(name) => accept_queue::restamp(client.address(), name),
        None => accept_queue::forget(client.address()),
    }
    0
}
