//! Memory that was needed for a moment goes back to the system: reading the kernel's types, or a scrape of a thousand
//! targets, takes several times what observer keeps.

#[cfg(target_env = "gnu")]
use nix::libc;

/// What is given back as soon as it is not needed, from this size on, in bytes.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Keeps it so: with the first large piece the library would begin to keep ever larger ones, between which small ones
/// settle for good.
pub(crate) fn set_mmap_threshold() {
    // SAFETY: no preconditions.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives back what many small pieces took. Takes some milliseconds.
pub(crate) fn trim() {
    // SAFETY: no preconditions; only free memory is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
