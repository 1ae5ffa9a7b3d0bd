//! A filter by ID that programs check before they look into a map. `ID_FILTER` counts, for each bucket that an ID may
//! fall into, the map entries with such IDs. Nearly all events come from processes that are not targets: an empty
//! bucket proves that without a map lookup. A bucket with a single reactor identifies that reactor.

/// Number of buckets. The low bits of an ID select its bucket. IDs are assigned sequentially, so collisions are rare.
pub const PLACES: usize = 1 << 16;

/// The only value of `ID_FILTER`. An entry is counted before it is added to a map and uncounted after it is removed, so
/// no map ever contains an entry that is not counted.
#[repr(C)]
pub struct IdFilter {
    /// Entries of `THREADS`, by [`place`] of the thread ID. Each entry adds its [`share`].
    pub threads: [u64; PLACES],
    /// Entries of `TARGETS`, by [`place`] of the process ID.
    pub processes: [u32; PLACES],
}

/// The threads in a bucket, as far as its word shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// No known thread.
    None,
    /// A single thread, in this slot. Its ID may differ from the one looked up.
    One(u32),
    /// Several threads.
    Several,
}

/// What a thread in this slot adds to the word of its bucket: 1 in the upper half, and the slot in the lower half.
/// While the count is 1, the lower half is the slot. It is a sum because kernels before 5.12 offer no other atomic
/// operation on a word that several CPUs change.
#[inline(always)]
pub const fn share(slot: u32) -> u64 {
    1 << 32 | slot as u64
}

/// Decodes the word of a bucket.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a slot has 32 bits")]
pub const fn seen(word: u64) -> Seen {
    match word >> 32 {
        0 => Seen::None,
        1 => Seen::One(word as u32),
        _ => Seen::Several,
    }
}

/// The bucket of an ID; always below [`PLACES`].
#[inline(always)]
pub const fn place(id: u32) -> usize {
    id as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_entry_shows_its_slot_after_others_have_left() {
        let mut word = share(7);
        assert_eq!(seen(word), Seen::One(7));
        word += share(u32::from(u16::MAX));
        assert_eq!(seen(word), Seen::Several);
        word -= share(7);
        assert_eq!(seen(word), Seen::One(u32::from(u16::MAX)));
        word -= share(u32::from(u16::MAX));
        assert_eq!((seen(word), word), (Seen::None, 0));
    }
}
