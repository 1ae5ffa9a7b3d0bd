//! How a type is shared with the programs.

/// Asserts the size of a shared type and lets the loader copy it as plain bytes.
macro_rules! shared {
    ($type:ty, $size:expr) => {
        const _: () = assert!(size_of::<$type>() == $size, concat!(stringify!($type), " has padding"));
        // SAFETY: `repr(C)`, integers only, and without padding, as the size shows.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use shared;
