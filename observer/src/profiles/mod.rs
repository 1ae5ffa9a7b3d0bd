//! What differs between runtimes, as data: one file for each in `observer/profiles`, all of which are embedded. How a
//! runtime is recognised, and where its garbage collector can be watched.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;

/// Names and contents of all files, as the build script finds them.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/profiles.rs"));

/// All profiles.
pub(crate) static PROFILES: LazyLock<Vec<Profile>> = LazyLock::new(|| {
    let parsed =
        FILES.iter().map(|(name, text)| toml::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}")));
    parsed.collect()
});

/// A runtime.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    /// What people call it.
    pub(crate) name: String,
    /// A symbol that the module with the runtime in it defines, and no other module.
    pub(crate) marker: String,
    /// Its garbage collector.
    pub(crate) gc: Collector,
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
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Totals {
    /// Symbol of a C string: the runtime's version.
    pub(crate) version: String,
    /// Symbol of a function that returns the number of collections, and does nothing else.
    pub(crate) count: String,
    /// By the beginning of the version: places of the nanoseconds that collections took, in bytes behind that number.
    pub(crate) nanoseconds: BTreeMap<String, Vec<u64>>,
}

impl Totals {
    /// Where a version keeps its nanoseconds; `None` if nobody knows.
    pub(crate) fn nanoseconds_of(&self, version: &str) -> Option<&[u64]> {
        let (series, _patch) = version.rsplit_once('.')?;
        self.nanoseconds.get(series).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use observer_common::gc::PARTS;

    use super::*;

    /// Forcing the list parses every file.
    #[test]
    fn every_file_is_understood() {
        assert!(FILES.iter().all(|(name, _)| name.ends_with(".toml")));
        let markers: BTreeSet<_> = PROFILES.iter().map(|profile| &profile.marker).collect();
        assert_eq!(markers.len(), FILES.len(), "a marker tells one runtime from all others");
    }

    #[test]
    fn totals_are_known_by_the_beginning_of_the_version() {
        let totals = PROFILES.iter().find_map(|profile| match &profile.gc {
            Collector::Totals(totals) => Some(totals),
            _ => None,
        });
        let totals = totals.unwrap();
        assert_eq!(totals.nanoseconds_of("3.1.2"), Some(&[0x20][..]));
        assert_eq!(totals.nanoseconds_of("3.10.0"), None);
        assert_eq!(totals.nanoseconds_of("3"), None);
        assert!(totals.nanoseconds.values().all(|parts| (1..=PARTS).contains(&parts.len())));
    }

    #[test]
    fn a_malformed_profile_is_told_by_its_fault() {
        let fault = |text: &str| toml::from_str::<Profile>(text).unwrap_err().to_string();
        let head = "name = 'X'\nmarker = 'x'\n";
        assert!(fault(head).contains("gc"));
        assert!(fault(&format!("{head}[gc.usdt]\nprovider = 'x'\nstart = 'a'\n")).contains("done"));
        assert!(fault(&format!("{head}[gc.kprobes]\nstart = 'a'\n")).contains("kprobes"));
        assert!(fault(&format!("{head}colour = 'red'\n")).contains("colour"));
    }
}
