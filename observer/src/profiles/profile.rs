//! The profile of a runtime: how to recognise it, how to watch its garbage collector, and how it defers tasks.

use std::collections::BTreeMap;

use procfs::process::MemoryMap;
use serde::Deserialize;

use super::hook::{Hook, Names};
use crate::binary::mappings::module_name;

/// The profile of a runtime, as written in a TOML file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    /// Name of the runtime.
    pub(crate) name: String,
    /// Description in one line.
    pub(crate) about: String,
    /// A symbol that only the runtime's module defines, by all names it has had.
    pub(crate) marker: Names,
    /// Prefix of the module's file name, if the user has named the library on the command line.
    #[serde(skip)]
    pub(crate) library: Option<String>,
    /// Prefix of the file name of another module that must be loaded as well.
    pub(crate) needs: Option<String>,
    /// Where the runtime's version is found.
    pub(crate) version: Option<Version>,
    /// How its garbage collector is watched.
    pub(crate) gc: Option<Collector>,
    /// Functions that enqueue, run and drop tasks.
    #[serde(default, rename = "hook")]
    pub(crate) hooks: Vec<Hook>,
}

/// Where the version of a runtime is found.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Version {
    /// A data symbol of the module.
    pub(crate) symbol: String,
    /// Format of the data.
    pub(crate) is: VersionKind,
}

/// Format of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum VersionKind {
    /// Four bytes, the major number in the highest: `0x030b02f0` is 3.11.2.
    Hex,
    /// A C string.
    String,
}

/// How garbage collections of a runtime are watched.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Collector {
    /// By USDT probes of the runtime.
    Usdt(Usdt),
    /// By functions that are called at the start and at the end of a collection.
    Functions(Functions),
    /// By totals that the runtime counts.
    Totals(Totals),
}

/// USDT probes of a garbage collector.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Usdt {
    /// Provider of both probes.
    pub(crate) provider: String,
    /// Name of the probe at the start of a collection.
    pub(crate) start: String,
    /// Name of the probe at its end.
    pub(crate) done: String,
}

/// Functions of a garbage collector, each by all names it has had.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Functions {
    /// Called at the start of a collection.
    pub(crate) start: Vec<String>,
    /// Called at its end, by the same thread.
    pub(crate) done: Vec<String>,
}

/// Totals in the runtime's memory, which only grow.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Totals {
    /// Symbol of a C string with the runtime's version.
    pub(crate) version: String,
    /// Symbol of a function that does nothing but return the number of collections.
    pub(crate) count: String,
    /// By version series (`3.3`): offsets in bytes, from that number, of the nanoseconds that collections took.
    pub(crate) nanoseconds: BTreeMap<String, Vec<u64>>,
}

impl Profile {
    /// Whether the file behind a mapping can contain the runtime, judging by its name.
    pub(crate) fn may_be_in(&self, map: &MemoryMap) -> bool {
        let Some(library) = &self.library else { return true };
        module_name(map).is_some_and(|name| name.starts_with(library))
    }
}

impl Totals {
    /// Offsets of the nanoseconds in a version; `None` if the profile does not know them.
    pub(crate) fn nanoseconds_of(&self, version: &str) -> Option<&[u64]> {
        let (series, _patch) = version.rsplit_once('.')?;
        self.nanoseconds.get(series).map(Vec::as_slice)
    }
}
