//! How fields are read, and the offsets that the loader fills in.

use core::ptr::read_volatile;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use observer_common::layout::KernelLayout;

/// Filled in by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
pub(super) static LAYOUT: KernelLayout = KernelLayout::ZERO;

/// The injected offset of a field; volatile, because the compiler believes in the zero it was built with.
#[inline(always)]
pub(super) fn offset(field: &'static u32) -> usize {
    // SAFETY: a reference; only the loader ever writes there, before any program runs.
    unsafe { read_volatile(field) as usize }
}

/// Loads a field through a pointer whose BTF type the verifier knows.
///
/// # Safety
/// `base` is such a pointer and `offset` that of a `T` in it. A stale pointer reads as zero.
#[inline(always)]
pub(super) unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: by contract.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// Reads a field through any kernel pointer; `None` if it does not point to memory.
#[inline(always)]
pub(super) fn probe<T>(base: *const u8, offset: usize) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset).cast()) }.ok()
}
