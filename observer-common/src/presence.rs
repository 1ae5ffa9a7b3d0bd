//! Who is known at all: `PRESENCE` counts, for every place that an id may fall into, the entries of a map with such ids.
//! Nearly all events are strangers', and a place where nobody is tells so without a look into the map.

/// Places, of which an id has the one with its lower bits. Ids are given out in turn: they rarely meet in one.
pub const PLACES: usize = 1 << 16;

/// The only value of `PRESENCE`. Whoever adds an entry to a map counts it before, and whoever removes one after, so that
/// there is never an entry that is not counted.
#[repr(C)]
pub struct Presence {
    /// Entries of `REACTORS`, by [`place`] of their thread's id.
    pub threads: [u32; PLACES],
    /// Entries of `TARGETS`, by that of their process's.
    pub processes: [u32; PLACES],
}

/// Where an id is counted; always below [`PLACES`].
#[inline(always)]
pub const fn place(id: u32) -> usize {
    id as usize % PLACES
}
