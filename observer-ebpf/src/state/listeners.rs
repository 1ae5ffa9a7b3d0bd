//! Listening sockets of targets. The loader adds them; probes of accepts and of the sockets themselves update them.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_ktime_get_ns, macros::map, maps::HashMap};
use observer_common::{listener::Listener, loss::Loss};

use super::{accept_queue, targets};
use crate::{emit::count_loss, kernel::OpenFile};

/// Listeners of targets, by inode number of the socket.
#[map]
static LISTENERS: HashMap<u64, Listener> = HashMap::with_max_entries(1024, 0);

/// Initial value of an entry, which is too large for the stack.
static NEW: Listener = Listener::EMPTY;

/// The listener with this key.
#[inline(always)]
pub(crate) fn listener_with(inode: u64) -> Option<*mut Listener> {
    LISTENERS.get_ptr_mut(inode)
}

/// The entry of the listener behind a file, which is created if there is none.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn listener_of(file: OpenFile, tgid: u32) -> Option<(u64, *mut Listener)> {
    let inode = file.inode()?;
    if let Some(listener) = LISTENERS.get_ptr_mut(inode) {
        return Some((inode, listener));
    }
    let socket = file.socket()?;
    // This also fails if another thread has created it in the meantime, which is harmless.
    let _full = LISTENERS.insert(inode, &NEW, u64::from(BPF_NOEXIST));
    let Some(listener) = LISTENERS.get_ptr_mut(inode) else {
        count_loss(Loss::ListenersFull);
        return None;
    };
    // SAFETY: a live map value; another thread that creates it at the same time writes the same.
    unsafe {
        (*listener).family = socket.family()?;
        (*listener).sk = socket.address();
        (*listener).file_sk = file.socket_unchecked()?.address();
        (*listener).owner = tgid;
        (*listener).since_ns = bpf_ktime_get_ns();
        (*listener).netns = socket.netns()?;
        let length = socket.name(&mut (*listener).name)?;
        if socket.is_unix() {
            (*listener).port = length;
            (*listener).unix_name = socket.unix_name()?;
            accept_queue::track_unix((*listener).unix_name);
        } else {
            (*listener).port = socket.port()?;
            accept_queue::track_port(&*listener, inode);
        }
    }
    Some((inode, listener))
}

/// Creates the entry of a listener, or assigns it to this process if its owner is no longer a target.
#[inline(always)]
pub(crate) fn inherit(file: OpenFile, tgid: u32) {
    if let Some((_, listener)) = listener_of(file, tgid) {
        // SAFETY: a live map value; the loader walks over files one at a time.
        unsafe {
            if !targets::is_target((*listener).owner) {
                (*listener).owner = tgid;
                (*listener).since_ns = bpf_ktime_get_ns();
            }
        }
    }
}
