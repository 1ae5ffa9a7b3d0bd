//! *origin*: what the threads of a target work for: requests that arrive on the connections it has accepted. Only
//! processes whose deferred work is followed pay for more than a look into a map.

use aya_ebpf::{macros::tracepoint, programs::TracePointContext};
use observer_common::origin::{Descriptor, HEAD};

use crate::{
    kernel,
    state::requests::{CONNECTIONS, Read, answer, is_followed},
};

/// The current thread returns from `read` or `recvfrom`, whose second argument is where to.
#[tracepoint]
fn received_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = Read::of(&ctx)
        && let Some(buffer) = read.call.second()
    {
        read.arrived(buffer, HEAD as u64);
    }
    0
}

/// The current thread returns from `readv`, whose second argument is a list of places and lengths.
#[tracepoint]
fn received_parts_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = Read::of(&ctx)
        && let Some(parts) = read.call.second()
    {
        read.arrived_in_parts(parts);
    }
    0
}

/// The current thread returns from `recvmsg`, whose second argument has a pointer to such a list as its third word.
#[tracepoint]
fn received_message_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = Read::of(&ctx)
        && let Some(message) = read.call.second()
        && let Some(parts) = kernel::read_user::<u64>(message.wrapping_add(16))
    {
        read.arrived_in_parts(parts);
    }
    0
}

/// The current thread is about to write to a descriptor.
#[tracepoint]
fn answer_enter(ctx: TracePointContext) -> u32 {
    let (tgid, _) = kernel::current();
    if is_followed(tgid)
        && let Some(fd) = kernel::fd_argument(&ctx)
        && let Some(connection) = CONNECTIONS.get_ptr_mut(Descriptor { tgid, fd })
    {
        // SAFETY: a live map value.
        unsafe { answer(connection, fd) };
    }
    0
}
