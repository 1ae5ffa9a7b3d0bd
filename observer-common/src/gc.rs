//! Shared types of the *gc* probe: garbage collections of targets' runtimes.

/// Most processes whose collections are watched at a time.
pub const PROCESSES: u32 = 256;

/// Most numbers that add up to the time a runtime says its collections took.
pub const PARTS: usize = 2;

/// Value of `GC_BEGUN`, whose key is the thread id: a collection in progress.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begun {
    /// When it began, monotonic nanoseconds.
    pub since_ns: u64,
    /// How many have begun in it that are not done, itself included.
    pub depth: u64,
}
crate::shared::shared!(Begun, 16);

/// Value of `GC_TOTALS`, whose key is the process id: where a runtime keeps totals of its own, and what they were.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Address of the number of collections in the process; 0 once the process is gone.
    pub count_address: u64,
    /// Addresses of nanoseconds they took, to be added up; 0 for none.
    pub ns_addresses: [u64; PARTS],
    /// The number of collections, as last read.
    pub count: u64,
    /// The nanoseconds, as last read.
    pub ns: u64,
}
crate::shared::shared!(Totals, 8 + 8 * PARTS + 16);
