//! The macro that every type shared with the programs is passed to.

/// Asserts the size of a shared type and lets the loader copy the type as plain bytes.
macro_rules! shared {
    ($type:ty, $size:expr) => {
        const _: () = assert!(size_of::<$type>() == $size, concat!(stringify!($type), " has padding"));
        // SAFETY: `repr(C)`, integers only, and without padding, as the assertion on the size proves.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use shared;
