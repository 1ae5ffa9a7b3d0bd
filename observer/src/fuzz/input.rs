//! Takes a fuzzer's bytes apart.

use std::{fs::File, io::Write as _};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Takes a byte that tells what to do with the others.
pub(super) fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

/// Takes a number likewise.
pub(super) fn number(data: &[u8]) -> (u64, &[u8]) {
    data.split_first_chunk().map_or((0, data), |(first, rest)| (u64::from_le_bytes(*first), rest))
}

/// A file without a name.
pub(super) fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.write_all(content).expect("room in memory");
    file
}
