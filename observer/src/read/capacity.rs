//! Sizes of the programs' maps, all derived from one number: the event loops that can be tracked. Maps are allocated
//! when observer starts, so that its kernel memory never grows.

use std::str::FromStr;

use aya::EbpfLoader;

/// Maximum number of event loops tracked at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacity(u32);

/// Size of a map: `entries` for every `loops` event loops, and `more` entries in any case.
struct MapSize {
    map: &'static str,
    entries: u32,
    loops: u32,
    more: u32,
}

const fn size(map: &'static str, entries: u32, loops: u32) -> MapSize {
    MapSize { map, entries, loops, more: 0 }
}

/// Sizes of all maps, in the proportions of the eBPF object, whose sizes are those of the default capacity.
const MAP_SIZES: &[MapSize] = &[
    size("THREADS", 1, 1),
    // Slot 0 is never used.
    MapSize { map: "WAITERS", entries: 1, loops: 1, more: 1 },
    MapSize { map: "FREE_WAITERS", entries: 1, loops: 1, more: 1 },
    MapSize { map: "REACTORS", entries: 1, loops: 1, more: 1 },
    MapSize { map: "DURATIONS", entries: 1, loops: 1, more: 1 },
    MapSize { map: "FREE_REACTORS", entries: 1, loops: 1, more: 1 },
    size("SETS", 1, 1),
    size("GAPS", 1, 1),
    size("SET_FILES", 1, 1),
    size("TARGETS", 4, 1),
    size("REJECTED_PIDS", 16, 1),
    size("LISTENERS", 1, 1),
    size("UNIX_NAMES", 1, 1),
    size("PORTS", 4, 1),
    size("QUEUED", 64, 1),
    size("ACCEPTING", 8, 1),
    size("CONNECTING", 8, 1),
    size("RING_ACCEPTS", 8, 1),
    size("GC_PAUSES", 1, 4),
    size("GC_TOTALS", 1, 4),
    size("GC_BEGUN", 1, 1),
    size("FOLLOWED", 1, 1),
    size("CONNECTIONS", 32, 1),
    size("WORK", 10, 1),
    size("TASKS", 32, 1),
    size("CLASSES", 1, 2),
    size("HOOKS", 4, 1),
    size("EXTRACTORS", 1, 1),
];

impl MapSize {
    const fn at(&self, capacity: Capacity) -> u32 {
        capacity.0 * self.entries / self.loops + self.more
    }
}

impl Capacity {
    /// Sufficient for a machine with a hundred servers.
    pub(crate) const DEFAULT: Self = Self(1024);

    /// The minimum is enough for one server, the maximum for any machine.
    const LIMITS: std::ops::RangeInclusive<u32> = 16..=65_536;

    /// Sets the sizes of all maps.
    pub(crate) fn apply(self, loader: &mut EbpfLoader<'_>) {
        for size in MAP_SIZES {
            loader.map_max_entries(size.map, size.at(self));
        }
    }

    /// Number of slots for event loops, slot 0 included.
    pub(crate) const fn slots(self) -> u32 {
        self.0 + 1
    }

    /// Number of processes whose collections can be watched, by probes and by totals each.
    pub(crate) const fn collectors(self) -> usize {
        self.0 as usize / 4
    }

    /// Number of extractors, for the hooks of all processes.
    pub(crate) const fn extractors(self) -> u32 {
        self.0
    }

    /// Display text of the capacity.
    pub(crate) fn described(self) -> String {
        format!("{} event loops, {} listeners and {} processes", self.0, self.0, self.0 * 4)
    }
}

impl FromStr for Capacity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = (Self::LIMITS.start(), Self::LIMITS.end());
        text.parse()
            .ok()
            .filter(|loops| Self::LIMITS.contains(loops))
            .map(Self)
            .ok_or_else(|| format!("expected {least} to {most} event loops"))
    }
}

impl std::fmt::Display for Capacity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

    use super::*;
    use crate::observation::PROGRAMS;

    /// `MAP_SIZES` must be changed together with the sizes in the eBPF object.
    #[test]
    fn default_sizes_match_the_ebpf_object() {
        let object = object::File::parse(PROGRAMS).unwrap();
        let maps = object.section_by_name("maps").unwrap();
        for size in MAP_SIZES {
            let symbol = object.symbols().find(|symbol| symbol.name() == Ok(size.map)).expect(size.map);
            // `bpf_map_def`: type, key size, value size, number of entries.
            let definition = maps.data_range(symbol.address(), 16).unwrap().unwrap();
            let entries = u32::from_le_bytes(definition[12..].try_into().unwrap());
            assert_eq!(size.at(Capacity::DEFAULT), entries, "{}", size.map);
        }
    }

    #[test]
    fn a_capacity_has_limits() {
        assert_eq!("4096".parse(), Ok(Capacity(4096)));
        for wrong in ["0", "15", "65537", "many"] {
            assert!(wrong.parse::<Capacity>().is_err(), "{wrong}");
        }
        // With the maximum capacity, no map size overflows.
        let largest = Capacity(*Capacity::LIMITS.end());
        assert!(MAP_SIZES.iter().all(|size| size.at(largest) >= largest.0 / 4));
    }
}
