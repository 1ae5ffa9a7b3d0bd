//! Splits a fuzzer's bytes into parameters and content.

use std::{fs::File, io::Write as _};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Splits off the first byte, which selects what to do with the rest; 0 if there is none.
pub(super) fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

/// Splits off a little-endian number of 8 bytes; 0 if there are fewer.
pub(super) fn number(data: &[u8]) -> (u64, &[u8]) {
    data.split_first_chunk().map_or((0, data), |(first, rest)| (u64::from_le_bytes(*first), rest))
}

/// Creates an anonymous file in memory.
pub(super) fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("create a file in memory"));
    file.write_all(content).expect("write to a file in memory");
    file
}
