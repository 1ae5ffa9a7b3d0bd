//! Fuzz targets: one function for each parser of untrusted bytes. Each takes any bytes and asserts invariants of the
//! result. Inputs worth keeping are in `fuzz/corpus`, which the unit tests run as well.

mod input;
mod files;
mod interpreters;
mod kernel;
mod network;
mod proc;
mod settings;

#[cfg(test)]
mod tests;

/// A function that must not panic whatever bytes it gets.
pub type Target = fn(&[u8]);

/// All targets, by name.
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
