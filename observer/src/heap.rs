//! Returns freed memory to the system. Reading the kernel's types, or a scrape of a thousand targets, takes several
//! times the memory that observer keeps.

#[cfg(target_env = "gnu")]
use nix::libc;

/// Size in bytes from which an allocation is mapped separately, and so returned to the system as soon as it is freed.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: libc::c_int = 128 << 10;

/// Fixes the threshold. By default glibc raises it whenever it frees a larger allocation. Further large allocations
/// then come from the heap, where small ones that stay between them keep the heap from shrinking.
pub(crate) fn set_mmap_threshold() {
    // SAFETY: no preconditions.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
    }
}

/// Returns the heap's free pages to the system. Takes a few milliseconds.
pub(crate) fn trim() {
    // SAFETY: no preconditions; only free memory is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
