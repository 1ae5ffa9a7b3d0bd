//! *ring*: accepts through io_uring, which no system call shows. A submission shows the listener. So does a wake-up, in
//! case the submission came before observer attached. A completion shows the connection.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    macros::{btf_tracepoint, map},
    maps::HashMap,
    programs::BtfTracePointContext,
};
use observer_common::{
    loss::Loss,
    ring::{RingAccept, RingKey},
};

use crate::{
    emit::{add, count_loss},
    kernel::{self, OpenFile, RingAcceptRequest, RingCompletion, RingWakeup, Socket},
    state::{accept_queue, listeners, targets},
};

/// Accepts in flight.
#[map]
static RING_ACCEPTS: HashMap<RingKey, RingAccept> = HashMap::with_max_entries(8192, 0);

/// A request is about to be executed for the first time.
#[btf_tracepoint(function = "io_uring_submit_req")]
fn ring_submit(ctx: BtfTracePointContext) -> u32 {
    if let Some(request) = RingAcceptRequest::submitted(&ctx) {
        let (tgid, _) = kernel::current();
        if targets::is_target(tgid) {
            let _no_key = submit(&request, tgid);
        }
    }
    0
}

/// An event that a request in flight waits for has occurred. The current thread is the one that caused it, not the
/// target's.
#[btf_tracepoint(function = "io_uring_task_add")]
fn ring_wakeup(ctx: BtfTracePointContext) -> u32 {
    if let Some(wakeup) = RingWakeup::of(&ctx) {
        // If the file is unknown, the completion shows whether the process is a target.
        let inode = match wakeup.file {
            Some(file) => file.inode().filter(|&inode| listeners::listener_with(inode).is_some()),
            None => Some(0),
        };
        if let Some(inode) = inode {
            let direct = u32::from(wakeup.is_direct);
            let new = RingAccept { inode, request: 0, pending: 1, direct, reserved: 0 };
            let _known_already = RING_ACCEPTS.insert(wakeup.key, new, u64::from(BPF_NOEXIST));
        }
    }
    0
}

/// A request has completed. The result of an accept is the new descriptor.
#[btf_tracepoint(function = "io_uring_complete")]
fn ring_complete(ctx: BtfTracePointContext) -> u32 {
    let completion = RingCompletion::of(&ctx);
    let Some(entry) = RING_ACCEPTS.get_ptr_mut(completion.key) else { return 0 };
    // SAFETY: a live map value; the kernel lets one thread at a time work on a ring.
    let accept = unsafe { *entry };
    if completion.is_last {
        if accept.pending > 1 {
            // SAFETY: as above.
            unsafe { add(&raw mut (*entry).pending, u64::MAX) };
        } else {
            let _present = RING_ACCEPTS.remove(completion.key);
        }
    }
    let (tgid, _) = kernel::current();
    if let Ok(fd) = u32::try_from(completion.result)
        && targets::is_target(tgid)
    {
        let connection = if accept.direct == 0 { OpenFile::of(fd).and_then(OpenFile::socket) } else { None };
        if count(&accept, connection, tgid).is_none() {
            count_loss(Loss::AcceptUnattributed);
        }
    }
    0
}

#[inline(always)]
fn submit(request: &RingAcceptRequest, tgid: u32) -> Option<()> {
    let key = request.key()?;
    let file = request.file_at_submission();
    let inode = file.and_then(|file| listeners::listener_of(file, tgid)).map_or(0, |(inode, _)| inode);
    if let Some(entry) = RING_ACCEPTS.get_ptr_mut(key) {
        // SAFETY: a live map value; the kernel lets one thread at a time work on a ring.
        unsafe {
            if (*entry).inode != inode {
                (*entry).inode = 0;
            }
            (*entry).request = 0;
            add(&raw mut (*entry).pending, 1);
        }
        return Some(());
    }
    let direct = u32::from(request.is_direct());
    let address = if inode == 0 { request.address() } else { 0 };
    let new = RingAccept { inode, request: address, pending: 1, direct, reserved: 0 };
    if RING_ACCEPTS.insert(key, new, u64::from(BPF_ANY)).is_err() {
        count_loss(Loss::AcceptingFull);
    }
    Some(())
}

/// Counts an accepted connection; `None` if its listener cannot be identified.
#[inline(always)]
fn count(accept: &RingAccept, connection: Option<Socket>, tgid: u32) -> Option<()> {
    let listener = if accept.inode != 0 {
        listeners::listener_with(accept.inode)?
    } else if accept.request != 0 {
        listeners::listener_of(RingAcceptRequest::at(accept.request).file()?, tgid)?.1
    } else {
        listeners::listener_with(accept_queue::listener_on_port_of(connection?)?)?
    };
    // SAFETY: a live map value; if two accepts race, the lower of the two peaks may remain.
    unsafe {
        let depth = Socket::at((*listener).sk).queue_depth((*listener).family)? + 1;
        if depth > (*listener).peak {
            (*listener).peak = depth;
        }
        accept_queue::count_accept(listener, connection, depth, tgid);
    }
    Some(())
}
