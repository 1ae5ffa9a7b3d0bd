//! *listener*: finds the listening sockets of targets and reads their accept queues. A listener is found when a target
//! calls `listen`, when a target accepts from it, and by a walk over open files when targets are added.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, raw_tracepoint, tracepoint},
    maps::ProgramArray,
    programs::{RawTracePointContext, TracePointContext},
};
use observer_common::listener::Queue;

use crate::{
    kernel::{self, AF_UNIX, OpenFile, QueueEntry, Socket},
    state::{
        accept_queue,
        listeners::{inherit, listener_of, listener_with},
        reactors, targets,
    },
};

/// Target of the tail call that continues a walk: the only entry is [`walk_queue`].
#[map]
static TAIL_CALLS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Connections that one step of a walk visits. At most 33 steps can follow each other. The verifier analyses every
/// iteration of a loop: for a loop of 1024 iterations it took a quarter of a second.
const CONNECTIONS_PER_STEP: u32 = 32;

/// A thread of a target calls `listen`. Whether the call succeeds shows when the queue is read next.
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

/// Visits one open file of one process. User space runs the iterator when targets are added.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
fn visit_files(ctx: *mut c_void) -> i32 {
    if let Some((tgid, fd, file)) = kernel::iterated(ctx)
        && targets::is_target(tgid)
    {
        reactors::note_file(tgid, fd, file);
        if file.socket().is_some_and(Socket::is_listening) {
            inherit(file, tgid);
        }
    }
    0
}

/// Reads an accept queue. Never attached: user space runs it with the listener's key as its argument.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn look(ctx: RawTracePointContext) -> i32 {
    let inode: u64 = ctx.arg(0);
    if let Some(listener) = listener_with(inode) {
        // SAFETY: a live map value; only this program and `walk_queue` write `queue`, and the loader reads one queue at
        // a time.
        unsafe {
            match Socket::still_at((*listener).file_sk, inode) {
                Some(socket) if socket.is_listening() => {
                    if read_queue(&raw mut (*listener).queue, socket, (*listener).family) {
                        TAIL_CALLS.tail_call(&ctx, 0);
                    }
                }
                _ => (*listener).queue.closed = 1,
            }
        }
    }
    0
}

/// Continues the walk where [`look`] or this program has stopped, with the same argument, as often as the kernel
/// allows.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn walk_queue(ctx: RawTracePointContext) -> i32 {
    if let Some(listener) = listener_with(ctx.arg(0)) {
        // SAFETY: as in `look`, which this program continues.
        unsafe {
            if walk_step(&raw mut (*listener).queue) {
                TAIL_CALLS.tail_call(&ctx, 0);
            }
        }
    }
    0
}

/// Reads the queue of a listener, except for what a walk over the queue finds. Returns whether there is anything to
/// walk over.
///
/// # Safety
/// `queue` points into a live map value that nothing else writes.
#[inline(always)]
unsafe fn read_queue(queue: *mut Queue, socket: Socket, family: u16) -> bool {
    // SAFETY: by contract.
    unsafe {
        (*queue).read_ns = bpf_ktime_get_ns();
        (*queue).depth = socket.queue_depth(family).unwrap_or(0);
        (*queue).limit = socket.limit().unwrap_or(0);
        (*queue).drops = socket.drops().unwrap_or(0);
        if family == AF_UNIX {
            let first = socket.first_unix_waiting().and_then(|first| accept_queue::queued_key(first, family));
            (*queue).oldest_ns = first.and_then(accept_queue::arrival_of).unwrap_or(0);
            return false;
        }
        (*queue).half_open = socket.half_open().unwrap_or(0);
        (*queue).defers |= u32::from(socket.defers_accepts());
        (*queue).aborted = 0;
        (*queue).oldest_sk = 0;
        (*queue).oldest_ns = 0;
        let first = socket.first_waiting();
        (*queue).rest = first.address();
        !first.is_end()
    }
}

/// Walks one step further. Returns whether connections remain. Results are kept in the map and not in registers: the
/// verifier does not track map contents, so it analyses one path instead of ever more.
///
/// # Safety
/// As for [`read_queue`].
#[inline(always)]
unsafe fn walk_step(queue: *mut Queue) -> bool {
    // SAFETY: by contract.
    unsafe {
        let (aborted, longest) = (&raw mut (*queue).aborted, &raw mut (*queue).oldest_sk);
        let mut entry = QueueEntry::at((*queue).rest);
        for _ in 0..CONNECTIONS_PER_STEP {
            let Some((connection, next)) = entry.read() else { break };
            if connection.is_closed() {
                aborted.write_volatile(aborted.read_volatile() + 1);
            } else if longest.read_volatile() == 0 {
                longest.write_volatile(connection.address());
            }
            entry = next;
        }
        (*queue).rest = entry.address();
        (*queue).oldest_ns = accept_queue::arrival_of(longest.read_volatile()).unwrap_or(0);
        !entry.is_end()
    }
}
