//! What the kernel side and the user side must agree on: the layout of every map key and value,
//! the bucket bounds of histograms, and the offsets injected before loading.
#![no_std]

pub mod accept;
pub mod block;
pub mod deferred;
pub mod gc;
pub mod histogram;
pub mod layout;
pub mod listener;
pub mod loss;
pub mod origin;
pub mod presence;
pub mod process;
pub mod reactor;
pub mod ring;

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
