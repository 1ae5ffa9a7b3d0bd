//! Copies of larger values, word by word. The compiler would call a function that copies byte by byte, which takes eight
//! instructions for each byte.

/// Copies a value.
///
/// # Safety
/// `from` can be read and `to` written, both aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn copy<T: Copy>(from: *const T, to: *mut T) {
    let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
    for word in 0..const { words::<T>() } {
        // SAFETY: by contract. Volatile, so that the compiler does not put the bytes together again.
        unsafe { to.add(word).write_volatile(from.add(word).read()) };
    }
}

/// Sets all bytes of a value, which consists of integers, to zero.
///
/// # Safety
/// `to` can be written, and is aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn clear<T: Copy>(to: *mut T) {
    let to = to.cast::<u64>();
    for word in 0..const { words::<T>() } {
        // SAFETY: as above.
        unsafe { to.add(word).write_volatile(0) };
    }
}

const fn words<T>() -> usize {
    assert!(size_of::<T>().is_multiple_of(8), "not a whole number of words");
    size_of::<T>() / 8
}
