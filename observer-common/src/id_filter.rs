//! Who is known at all: `ID_FILTER` counts, for every place that an id may fall into, the entries of a map with such ids.
//! Nearly all events are strangers', and a place where nobody is tells so without a look into the map; one where a single
//! reactor is tells which.

/// Places, of which an id has the one with its lower bits. Ids are given out in turn: they rarely meet in one.
pub const PLACES: usize = 1 << 16;

/// The only value of `ID_FILTER`. Whoever adds an entry to a map counts it before, and whoever removes one after, so that
/// there is never an entry that is not counted.
#[repr(C)]
pub struct IdFilter {
    /// Entries of `THREADS`, by [`place`] of their thread's id: each adds its [`share`].
    pub threads: [u64; PLACES],
    /// Entries of `TARGETS`, by that of their process's.
    pub processes: [u32; PLACES],
}

/// Who is in a place, as far as its word tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// No thread that is known.
    Nobody,
    /// Perhaps the one in this slot, and no other.
    One(u32),
    /// Any of several.
    Several,
}

/// What a thread in this slot adds to the word of its place: one, and the slot. Sums of those can be taken apart where
/// there is only one, and kernels before 5.12 have no other way to change a word that others change, too.
#[inline(always)]
pub const fn share(slot: u32) -> u64 {
    1 << 32 | slot as u64
}

/// Reads the word of a place.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a slot has 32 bits")]
pub const fn seen(word: u64) -> Seen {
    match word >> 32 {
        0 => Seen::Nobody,
        1 => Seen::One(word as u32),
        _ => Seen::Several,
    }
}

/// Where an id is counted; always below [`PLACES`].
#[inline(always)]
pub const fn place(id: u32) -> usize {
    id as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_alone_tells_its_slot_whoever_was_there_meanwhile() {
        let mut word = share(7);
        assert_eq!(seen(word), Seen::One(7));
        word += share(u32::from(u16::MAX));
        assert_eq!(seen(word), Seen::Several);
        word -= share(7);
        assert_eq!(seen(word), Seen::One(u32::from(u16::MAX)));
        word -= share(u32::from(u16::MAX));
        assert_eq!((seen(word), word), (Seen::Nobody, 0));
    }
}
