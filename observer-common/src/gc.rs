//! Shared types of the *gc* probe: garbage collections of targets' runtimes.

/// Maximum number of processes whose collections are observed at a time.
pub const PROCESSES: u32 = 256;

/// Maximum number of counters that add up to the collection time reported by a runtime.
pub const PARTS: usize = 2;

/// Value of `GC_BEGUN`: a collection in progress. The key is the thread ID.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcInProgress {
    /// When it began, in monotonic nanoseconds.
    pub since_ns: u64,
    /// Number of nested collections in progress, including this one.
    pub depth: u64,
}
crate::shared::shared!(GcInProgress, 16);

/// Value of `GC_TOTALS`: where a runtime keeps its own totals, and their last values. The key is the process ID.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Address of the number of collections, in the process; 0 once the process has exited.
    pub count_address: u64,
    /// Addresses of the collection times, in nanoseconds, which are added up; 0 if unused.
    pub ns_addresses: [u64; PARTS],
    /// Number of collections when last read.
    pub count: u64,
    /// Sum of the collection times when last read, in nanoseconds.
    pub ns: u64,
}
crate::shared::shared!(Totals, 8 + 8 * PARTS + 16);
