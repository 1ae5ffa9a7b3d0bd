//! *listener*: which sockets of targets listen, and what their accept queues are like now. Listeners are found
//! when they begin to listen, when a target accepts from one, and by a walk over open files when targets are new.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, raw_tracepoint, tracepoint},
    maps::ProgramArray,
    programs::{RawTracePointContext, TracePointContext},
};
use observer_common::listener::Queue;

use crate::{
    kernel::{self, AF_UNIX, OpenFile, Socket, Waiting},
    state::{
        accept_queue,
        listeners::{inherit, listener_of, listener_with},
        targets,
    },
};

/// Where a walk goes on, in the only place: [`walk_queue`].
#[map]
static TAIL_CALLS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Connections that one step of a walk looks at, and 33 steps may follow each other. The verifier follows every turn of a
/// loop on its own: for one of 1024 it took a quarter of a second.
const STEP: u32 = 32;

/// A thread of a target is about to listen. Whether that works, the next look tells.
#[tracepoint]
fn listen_enter(ctx: TracePointContext) -> u32 {
    let (tgid, _) = kernel::current();
    if (targets::is_target(tgid) || targets::renominate_candidate(tgid))
        && let Some(file) = kernel::fd_argument(&ctx).and_then(OpenFile::of)
    {
        let _no_room = listener_of(file, tgid);
    }
    0
}

/// One open file of one process, of all there are: run on demand, when targets are new.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
fn find_listeners(ctx: *mut c_void) -> i32 {
    if let Some((tgid, file)) = kernel::iterated(ctx)
        && targets::is_target(tgid)
        && file.socket().is_some_and(Socket::listens)
    {
        inherit(file, tgid);
    }
    0
}

/// Looks at one accept queue. Never attached, but run on demand with the listener's key as its argument.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn look(ctx: RawTracePointContext) -> i32 {
    let inode: u64 = ctx.arg(0);
    if let Some(listener) = listener_with(inode) {
        // SAFETY: a live map value; only looks write `queue`, and the loader takes one at a time.
        unsafe {
            match Socket::still_at((*listener).sk, inode) {
                Some(socket) if socket.listens() => {
                    if look_at(&raw mut (*listener).queue, socket, (*listener).family) {
                        TAIL_CALLS.tail_call(&ctx, 0);
                    }
                }
                _ => (*listener).queue.closed = 1,
            }
        }
    }
    0
}

/// Goes on where [`look`] or itself has left off, with the same argument, as often as the kernel allows.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn walk_queue(ctx: RawTracePointContext) -> i32 {
    if let Some(listener) = listener_with(ctx.arg(0)) {
        // SAFETY: as in `look`, of which this is a part.
        unsafe {
            if step(&raw mut (*listener).queue) {
                TAIL_CALLS.tail_call(&ctx, 0);
            }
        }
    }
    0
}

/// Fills in the queue of a listener of this family, but for what a walk over it finds. Tells whether there is one to walk over.
///
/// # Safety
/// `queue` points into a live map value that nobody else writes.
#[inline(always)]
unsafe fn look_at(queue: *mut Queue, socket: Socket, family: u16) -> bool {
    // SAFETY: by contract.
    unsafe {
        (*queue).looked_ns = bpf_ktime_get_ns();
        (*queue).depth = socket.queued(family).unwrap_or(0);
        (*queue).limit = socket.limit().unwrap_or(0);
        (*queue).drops = socket.drops().unwrap_or(0);
        if family == AF_UNIX {
            let first = socket.first_unix_waiting().and_then(|first| accept_queue::queued_as(first, family));
            (*queue).oldest_ns = first.and_then(accept_queue::arrival_of).unwrap_or(0);
            return false;
        }
        (*queue).half_open = socket.half_open().unwrap_or(0);
        (*queue).aborted = 0;
        (*queue).longest_sk = 0;
        (*queue).oldest_ns = 0;
        let first = socket.first_waiting();
        (*queue).rest = first.address();
        !first.is_end()
    }
}

/// One step of the walk. Tells whether there is more to walk over. What it finds is kept in the map, not in registers:
/// the verifier does not tell map contents apart, and so sees one way through where it would otherwise see ever more.
///
/// # Safety
/// As for [`look_at`].
#[inline(always)]
unsafe fn step(queue: *mut Queue) -> bool {
    // SAFETY: by contract.
    unsafe {
        let (aborted, longest) = (&raw mut (*queue).aborted, &raw mut (*queue).longest_sk);
        let mut place = Waiting::known((*queue).rest);
        for _ in 0..STEP {
            let Some((connection, behind)) = place.take() else { break };
            if connection.is_closed() {
                aborted.write_volatile(aborted.read_volatile() + 1);
            } else if longest.read_volatile() == 0 {
                longest.write_volatile(connection.address());
            }
            place = behind;
        }
        (*queue).rest = place.address();
        (*queue).oldest_ns = accept_queue::arrival_of(longest.read_volatile()).unwrap_or(0);
        !place.is_end()
    }
}
