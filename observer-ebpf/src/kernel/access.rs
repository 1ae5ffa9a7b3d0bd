//! How fields of kernel structures are read, and the offsets that the loader fills in.

use core::ptr::read_volatile;

use aya_ebpf::helpers::bpf_probe_read_kernel;
use observer_common::layout::KernelLayout;

/// Offsets of fields; filled in by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
pub(super) static LAYOUT: KernelLayout = KernelLayout::ZERO;

/// The injected offset of a field. The read is volatile, because the compiler would otherwise use the zero of the
/// initialiser.
#[inline(always)]
pub(super) fn offset(field: &'static u32) -> usize {
    // SAFETY: a reference; only the loader writes there, before any program runs.
    unsafe { read_volatile(field) as usize }
}

/// Loads a field through a pointer whose BTF type the verifier knows.
///
/// # Safety
/// `base` is such a pointer, and `offset` is that of a `T` in the structure. A stale pointer reads as zero.
#[inline(always)]
pub(super) unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: by contract.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// Reads a field through any kernel pointer; `None` if the address cannot be read.
#[inline(always)]
pub(super) fn probe<T>(base: *const u8, offset: usize) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset).cast()) }.ok()
}
