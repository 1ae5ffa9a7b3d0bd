//! Whether a map may contain an ID. Programs check this before a map lookup: it costs a tenth of a lookup, and nothing
//! else is spent on the events of processes that are not targets.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use observer_common::id_filter::{IdFilter, Seen, place, seen, share};

use crate::emit::{add, add_u32};

#[map]
static ID_FILTER: Array<IdFilter> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The threads in `THREADS` that this ID may belong to.
#[inline(always)]
pub(crate) fn lookup_thread(tid: u32) -> Seen {
    // SAFETY: a live map value; the index is in range.
    ID_FILTER.get_ptr(0).map_or(Seen::None, |filter| unsafe {
        seen((&raw const (*filter).threads).cast::<u64>().add(place(tid)).read_volatile())
    })
}

/// Whether `TARGETS` may have an entry for this process.
#[inline(always)]
pub(crate) fn may_contain_process(tgid: u32) -> bool {
    // SAFETY: a live map value; the index is in range.
    ID_FILTER.get_ptr(0).is_some_and(|filter| unsafe {
        (&raw const (*filter).processes).cast::<u32>().add(place(tgid)).read_volatile() != 0
    })
}

/// Counts an entry of `THREADS` that is about to be added.
#[inline(always)]
pub(crate) fn add_thread(tid: u32, slot: u32) {
    add_to_thread_word(tid, share(slot));
}

/// Uncounts an entry of `THREADS` that has been removed.
#[inline(always)]
pub(crate) fn remove_thread(tid: u32, slot: u32) {
    add_to_thread_word(tid, share(slot).wrapping_neg());
}

#[inline(always)]
fn add_to_thread_word(tid: u32, by: u64) {
    if let Some(filter) = ID_FILTER.get_ptr_mut(0) {
        // SAFETY: a live map value; the index is in range.
        unsafe { add((&raw mut (*filter).threads).cast::<u64>().add(place(tid)), by) };
    }
}

/// Counts entries of `TARGETS` that are about to be added, or have been removed.
#[inline(always)]
pub(crate) fn count_processes(tgid: u32, change: i32) {
    if let Some(filter) = ID_FILTER.get_ptr_mut(0) {
        // SAFETY: a live map value; the index is in range.
        unsafe {
            add_u32((&raw mut (*filter).processes).cast::<u32>().add(place(tgid)), change.cast_unsigned());
        }
    }
}
