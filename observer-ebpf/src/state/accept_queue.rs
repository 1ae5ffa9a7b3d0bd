//! Connections that wait to be accepted: since when, at which listener, and, when they are accepted, how long they waited.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_EXIST},
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::HashMap,
};
use observer_common::{
    accept::{AcceptCall, Arrival, MULTIPATH, PortKey, SEVERAL_PROCESSES},
    listener::{DEPTHS, Listener, depth_bucket},
};

use crate::{
    emit::{add, record},
    kernel::{AF_UNIX, Sock, Socket},
};

/// Ports of targets' listeners, each with the key of its listener, or 0 if it has several, and the flag [`MULTIPATH`].
/// Connections to other ports get no timestamp.
#[map]
static PORTS: HashMap<PortKey, u64> = HashMap::with_max_entries(4096, 0);

/// When each waiting connection completed its handshake, by the address of its socket, or of the client's for a unix
/// connection.
#[map]
static QUEUED: HashMap<u64, Arrival> = HashMap::with_max_entries(65_536, 0);

/// Names of targets' unix listeners, by their address in the kernel.
#[map]
static UNIX_NAMES: HashMap<u64, u8> = HashMap::with_max_entries(1024, 0);

/// The accept call that each thread is in, by thread ID. An entry stays until its thread exits: creating and removing
/// it for every call would be a sixth of the cost of an accept.
#[map]
pub(crate) static ACCEPTING: HashMap<u32, AcceptCall> = HashMap::with_max_entries(8192, 0);

/// Removes the call of a thread that has exited inside it.
#[inline(always)]
pub(crate) fn thread_exited(tid: u32) {
    let _absent = ACCEPTING.remove(tid);
}

/// Counts a connection that a target has accepted, and the depth of the queue when it did. `connection` is `None` if
/// its socket cannot be found.
///
/// # Safety
/// `listener` points to a live map value.
#[inline(always)]
pub(crate) unsafe fn count_accept(
    listener: *mut Listener,
    connection: Option<Socket>,
    depth: u32,
    tgid: u32,
) {
    // SAFETY: by contract; counters and the histogram are updated atomically. If two processes write `accepter` at
    // once, the next accept of either corrects it.
    unsafe {
        add(&raw mut (*listener).accepts, 1);
        add(&raw mut (*listener).depths_sum, u64::from(depth));
        count_depth(listener, depth);
        match (*listener).accepter {
            0 => (*listener).accepter = tgid,
            other if other != tgid => (*listener).accepter = SEVERAL_PROCESSES,
            _ => {}
        }
        let family = (*listener).family;
        let connection =
            if (*listener).is_multipath() { connection.map(Socket::first_path) } else { connection };
        if let Some(address) = connection.and_then(|connection| queued_key(connection, family))
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

/// Key in `QUEUED` of a connection of this family that waits or has just been accepted.
#[inline(always)]
pub(crate) fn queued_key(connection: Socket, family: u16) -> Option<u64> {
    if family == AF_UNIX { Some(connection.peer()?.address()) } else { Some(connection.address()) }
}

/// Counts an accept by the depth of the queue.
///
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

/// When the waiting connection with this key completed its handshake, if that was observed.
#[inline(always)]
pub(crate) fn arrival_of(address: u64) -> Option<u64> {
    QUEUED.get_ptr(address).map(|arrival| {
        // SAFETY: a live map value; eight bytes are read atomically.
        unsafe { (*arrival).at_ns }
    })
}

/// Whether a target may accept this connection.
#[inline(always)]
pub(crate) fn is_tracked(sock: &Sock) -> bool {
    let port = PORTS.get_ptr(PortKey { netns: sock.netns(), port: u32::from(sock.port()) });
    // SAFETY: a live map value; eight bytes are read atomically.
    port.is_some_and(|value| unsafe { *value } & MULTIPATH == 0 || !sock.is_further_path())
}

/// Records timestamps of connections to this listener's port from now on.
#[inline(always)]
pub(crate) fn track_port(listener: &Listener, inode: u64) {
    let key = PortKey { netns: listener.netns, port: u32::from(listener.port) };
    let flag = if listener.is_multipath() { MULTIPATH } else { 0 };
    let value = match PORTS.get_ptr(key) {
        // SAFETY: a live map value; eight bytes are read atomically.
        Some(known) => (unsafe { *known } & MULTIPATH) | flag,
        None => inode | flag,
    };
    let _full_means_unknown_waits = PORTS.insert(key, value, u64::from(BPF_ANY));
}

/// Records timestamps of connections to the unix listener of this name from now on.
#[inline(always)]
pub(crate) fn track_unix(name: u64) {
    let _full_means_unknown_waits = UNIX_NAMES.insert(name, 1, u64::from(BPF_ANY));
}

/// Whether a target listens on a unix socket of this name.
#[inline(always)]
pub(crate) fn is_tracked_unix(name: u64) -> bool {
    UNIX_NAMES.get_ptr(name).is_some()
}

/// Key of the listener that a connection was made to, if only one listens on its port; 0 if several do.
#[inline(always)]
pub(crate) fn listener_on_port_of(connection: Socket) -> Option<u64> {
    let key = PortKey { netns: connection.netns()?, port: u32::from(connection.port()?) };
    PORTS.get_ptr(key).map(|inode| {
        // SAFETY: a live map value; eight bytes are read atomically.
        unsafe { *inode & !MULTIPATH }
    })
}

/// Records that a connection begins to wait now.
#[inline(always)]
pub(crate) fn record_arrival(address: u64) -> Result<(), i32> {
    // SAFETY: has no preconditions.
    let arrival = Arrival { at_ns: unsafe { bpf_ktime_get_ns() }, unix_name: 0 };
    QUEUED.insert(address, arrival, u64::from(BPF_ANY))
}

/// Records that a unix connection to the listener of this name begins to wait now, unless it has already been accepted.
#[inline(always)]
pub(crate) fn restamp(address: u64, unix_name: u64) {
    // SAFETY: has no preconditions.
    let arrival = Arrival { at_ns: unsafe { bpf_ktime_get_ns() }, unix_name };
    let _accepted = QUEUED.insert(address, arrival, u64::from(BPF_EXIST));
}

/// Removes a connection that does not wait.
#[inline(always)]
pub(crate) fn forget(address: u64) {
    // A removal takes a lock even if there is no entry.
    if QUEUED.get_ptr(address).is_some() {
        let _accepted = QUEUED.remove(address);
    }
}
