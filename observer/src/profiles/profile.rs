//! A profile: how a runtime is recognised, how its garbage collector can be watched, and how it defers tasks.

use std::collections::BTreeMap;

use procfs::process::MemoryMap;
use serde::Deserialize;

use super::hook::{Hook, Names};
use crate::stacks::mappings::module_name;

/// A runtime.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    /// What people call it.
    pub(crate) name: String,
    /// What it is good for, in one line.
    pub(crate) about: String,
    /// A symbol that the module with the runtime in it defines, and no other module; by all names it has had.
    pub(crate) marker: Names,
    /// How the name of that module's file begins, where the user says so on the command line.
    #[serde(skip)]
    pub(crate) home: Option<String>,
    /// How the name of another module begins that must be there as well.
    pub(crate) needs: Option<String>,
    /// Where it tells its version.
    pub(crate) version: Option<Version>,
    /// Its garbage collector.
    pub(crate) gc: Option<Collector>,
    /// How it puts work off.
    #[serde(default, rename = "hook")]
    pub(crate) hooks: Vec<Hook>,
}

/// Where a runtime tells its version.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Version {
    /// A symbol of the module.
    pub(crate) symbol: String,
    /// What is there.
    pub(crate) is: VersionKind,
}

/// How a version is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum VersionKind {
    /// Four bytes, the major number in the highest: `0x030b02f0` is 3.11.2.
    Hex,
    /// A C string.
    String,
}

/// How a runtime's collections can be watched.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Collector {
    /// By probes that the runtime itself has in its code.
    Usdt(Usdt),
    /// By functions that are called when one begins and when it ends.
    Functions(Functions),
    /// By the runtime's own totals.
    Totals(Totals),
}

/// Probes in the runtime's code.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Usdt {
    /// Their provider.
    pub(crate) provider: String,
    /// Name of the one where a collection begins.
    pub(crate) start: String,
    /// Name of the one where it ends.
    pub(crate) done: String,
}

/// Functions of the runtime, each by all names it has had.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Functions {
    /// Called when a collection begins.
    pub(crate) start: Vec<String>,
    /// Called when it ends, by the same thread.
    pub(crate) done: Vec<String>,
}

/// Numbers in the runtime's memory that only grow.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Totals {
    /// Symbol of a C string: the runtime's version.
    pub(crate) version: String,
    /// Symbol of a function that returns the number of collections, and does nothing else.
    pub(crate) count: String,
    /// By the beginning of the version: places of the nanoseconds that collections took, in bytes behind that number.
    pub(crate) nanoseconds: BTreeMap<String, Vec<u64>>,
}

impl Profile {
    /// Whether the file behind a mapping may be the one with the runtime in it, by its name.
    pub(crate) fn may_be_in(&self, map: &MemoryMap) -> bool {
        let Some(home) = &self.home else { return true };
        module_name(map).is_some_and(|name| name.starts_with(home))
    }
}

impl Totals {
    /// Where a version keeps its nanoseconds; `None` if nobody knows.
    pub(crate) fn nanoseconds_of(&self, version: &str) -> Option<&[u64]> {
        let (series, _patch) = version.rsplit_once('.')?;
        self.nanoseconds.get(series).map(Vec::as_slice)
    }
}
