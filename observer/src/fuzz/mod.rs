//! What a fuzzer runs: one function for each parser of bytes that come from elsewhere. Each asserts what must hold whatever
//! the bytes are. The bytes that were worth keeping are in `fuzz/corpus`, and are tried by the unit tests as well.

mod files;
mod interpreters;
mod kernel;
mod network;
mod proc;
mod settings;

#[cfg(test)]
mod tests;

use std::{fs::File, io::Write as _};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// A function that takes whatever bytes there are.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("answer", network::answer),
    ("btf", kernel::btf),
    ("code", files::code),
    ("config", settings::config),
    ("elf", files::elf),
    ("environment", settings::environment),
    ("perf-map", files::perf_map),
    ("proc", proc::proc),
    ("profile", settings::profile),
    ("python", interpreters::python),
    ("record", kernel::record),
    ("request", network::request),
    ("ruby", interpreters::ruby),
    ("scrape", network::scrape),
    ("symbols", files::symbols),
    ("unwind", files::unwind),
];

/// Takes a byte that tells what to do with the others.
fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

/// Takes a number likewise.
fn number(data: &[u8]) -> (u64, &[u8]) {
    data.split_first_chunk().map_or((0, data), |(first, rest)| (u64::from_le_bytes(*first), rest))
}

/// A file without a name.
fn file(content: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.write_all(content).expect("room in memory");
    file
}
