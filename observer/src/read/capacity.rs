//! How much the programs have room for: one number, from which the size of every map that fills with what is observed
//! follows. Maps are allocated when observer starts, so that what it takes of the kernel's memory never grows.

use std::str::FromStr;

use aya::EbpfLoader;

/// Event loops at a time that there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacity(u32);

/// How many entries a map has for so many event loops.
struct Room {
    map: &'static str,
    entries: u32,
    loops: u32,
    /// Entries besides.
    more: u32,
}

const fn room(map: &'static str, entries: u32, loops: u32) -> Room {
    Room { map, entries, loops, more: 0 }
}

/// In the proportions of the object's own sizes, which are those of the default.
const ROOMS: &[Room] = &[
    room("THREADS", 1, 1),
    // The first slot is nobody's.
    Room { map: "REACTORS", entries: 1, loops: 1, more: 1 },
    Room { map: "DURATIONS", entries: 1, loops: 1, more: 1 },
    Room { map: "FREE_SLOTS", entries: 1, loops: 1, more: 1 },
    room("POOLS", 1, 1),
    room("TARGETS", 4, 1),
    room("REJECTED_PIDS", 16, 1),
    room("LISTENERS", 1, 1),
    room("UNIX_NAMES", 1, 1),
    room("PORTS", 4, 1),
    room("QUEUED", 64, 1),
    room("ACCEPTING", 8, 1),
    room("CONNECTING", 8, 1),
    room("RING_ACCEPTS", 8, 1),
    room("GC_PAUSES", 1, 4),
    room("GC_TOTALS", 1, 4),
    room("GC_BEGUN", 1, 1),
    room("FOLLOWED", 1, 1),
    room("CONNECTIONS", 32, 1),
    room("WORK", 10, 1),
    room("TASKS", 32, 1),
    room("CLASSES", 1, 2),
    room("HOOKS", 4, 1),
    room("EXTRACTORS", 1, 1),
];

impl Room {
    const fn at(&self, capacity: Capacity) -> u32 {
        capacity.0 * self.entries / self.loops + self.more
    }
}

impl Capacity {
    /// Enough for a machine with a hundred servers.
    pub(crate) const DEFAULT: Self = Self(1024);

    /// The least is what a single server may need, the most what no machine does.
    const LIMITS: std::ops::RangeInclusive<u32> = 16..=65_536;

    /// Gives all maps their sizes.
    pub(crate) fn apply(self, loader: &mut EbpfLoader<'_>) {
        for room in ROOMS {
            loader.map_max_entries(room.map, room.at(self));
        }
    }

    /// Slots for reactors, nobody's included.
    pub(crate) const fn slots(self) -> u32 {
        self.0 + 1
    }

    /// Processes whose collections can be watched by either way.
    pub(crate) const fn collectors(self) -> usize {
        self.0 as usize / 4
    }

    /// Ways to read places in runtimes, of which each process has its own.
    pub(crate) const fn extractors(self) -> u32 {
        self.0
    }

    /// What people are told that there is room for.
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
            .ok_or_else(|| format!("from {least} to {most} event loops"))
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

    /// Whoever changes a size there has to change it here.
    #[test]
    fn the_default_is_what_the_object_says() {
        let object = object::File::parse(PROGRAMS).unwrap();
        let maps = object.section_by_name("maps").unwrap();
        for room in ROOMS {
            let symbol = object.symbols().find(|symbol| symbol.name() == Ok(room.map)).expect(room.map);
            // A `bpf_map_def`: type, size of keys, size of values, entries.
            let definition = maps.data_range(symbol.address(), 16).unwrap().unwrap();
            let entries = u32::from_le_bytes(definition[12..].try_into().unwrap());
            assert_eq!(room.at(Capacity::DEFAULT), entries, "{}", room.map);
        }
    }

    #[test]
    fn sizes_have_limits() {
        assert_eq!("4096".parse(), Ok(Capacity(4096)));
        for wrong in ["0", "15", "65537", "many"] {
            assert!(wrong.parse::<Capacity>().is_err(), "{wrong}");
        }
        // The largest map of the largest capacity still has a number of entries.
        let largest = Capacity(*Capacity::LIMITS.end());
        assert!(ROOMS.iter().all(|room| room.at(largest) >= largest.0 / 4));
    }
}
