//! What a fuzzer runs: one function for each parser of bytes that come from elsewhere. Each asserts what must hold whatever
//! the bytes are. The bytes that were worth keeping are in `fuzz/corpus`, and are tried by the unit tests as well.

mod input;
mod files;
mod interpreters;
mod kernel;
mod network;
mod proc;
mod settings;

#[cfg(test)]
mod tests;

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
