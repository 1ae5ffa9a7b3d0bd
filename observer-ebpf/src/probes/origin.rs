//! *origin*: the requests that threads of a target work for, which arrive on the connections it has accepted.
//! For processes whose deferred tasks are not followed, this costs no more than a map lookup.

use aya_ebpf::{macros::tracepoint, programs::TracePointContext};
use observer_common::origin::{Descriptor, HEAD};

use crate::{
    kernel,
    state::requests::{CONNECTIONS, ReadCall, is_followed, record_answer},
};

/// The current thread returns from `read` or `recvfrom`, whose second argument is the buffer.
#[tracepoint]
fn received_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = ReadCall::of(&ctx)
        && let Some(buffer) = read.call.second()
    {
        read.handle(buffer, HEAD as u64);
    }
    0
}

/// The current thread returns from `readv`, whose second argument is an array of `struct iovec`.
#[tracepoint]
fn received_parts_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = ReadCall::of(&ctx)
        && let Some(parts) = read.call.second()
    {
        read.handle_first_part(parts);
    }
    0
}

/// The current thread returns from `recvmsg`, whose second argument is a `struct msghdr`: its third word points to an
/// array of `struct iovec`.
#[tracepoint]
fn received_message_exit(ctx: TracePointContext) -> u32 {
    if let Some(read) = ReadCall::of(&ctx)
        && let Some(message) = read.call.second()
        && let Some(parts) = kernel::read_user::<u64>(message.wrapping_add(16))
    {
        read.handle_first_part(parts);
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
        unsafe { record_answer(connection, fd) };
    }
    0
}
