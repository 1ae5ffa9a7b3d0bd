//! Whether anybody with an id can be in a map: what programs ask before they look there, because it costs a tenth of a
//! look and is all that a stranger pays.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use observer_common::presence::{PLACES, Presence, place};

use crate::emit::add_word;

#[map]
static PRESENCE: Array<Presence> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Whether `REACTORS` may have an entry for this thread.
#[inline(always)]
pub(crate) fn of_thread(tid: u32) -> bool {
    // SAFETY: a live map value.
    PRESENCE.get_ptr(0).is_some_and(|all| unsafe { is_any(&raw const (*all).threads, tid) })
}

/// Whether `TARGETS` may have an entry for this process.
#[inline(always)]
pub(crate) fn of_process(tgid: u32) -> bool {
    // SAFETY: a live map value.
    PRESENCE.get_ptr(0).is_some_and(|all| unsafe { is_any(&raw const (*all).processes, tgid) })
}

/// Counts entries of `REACTORS` that are about to be added, or have been removed.
#[inline(always)]
pub(crate) fn count_threads(tid: u32, change: i32) {
    if let Some(all) = PRESENCE.get_ptr_mut(0) {
        // SAFETY: a live map value.
        unsafe { count(&raw mut (*all).threads, tid, change) };
    }
}

/// Counts entries of `TARGETS`, likewise.
#[inline(always)]
pub(crate) fn count_processes(tgid: u32, change: i32) {
    if let Some(all) = PRESENCE.get_ptr_mut(0) {
        // SAFETY: a live map value.
        unsafe { count(&raw mut (*all).processes, tgid, change) };
    }
}

/// # Safety
/// `places` points into a live map value.
#[inline(always)]
unsafe fn is_any(places: *const [u32; PLACES], id: u32) -> bool {
    // SAFETY: by contract, and a place is inside.
    unsafe { places.cast::<u32>().add(place(id)).read_volatile() != 0 }
}

/// # Safety
/// As above.
#[inline(always)]
unsafe fn count(places: *mut [u32; PLACES], id: u32, change: i32) {
    // SAFETY: by contract, and a place is inside.
    unsafe { add_word(places.cast::<u32>().add(place(id)), change.cast_unsigned()) };
}
