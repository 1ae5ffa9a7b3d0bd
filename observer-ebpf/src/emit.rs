//! Output to user space: histograms, which are aggregated in place, and counters of losses.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use observer_common::{
    histogram::{BUCKETS, Bucket, Histogram, bucket_of},
    loss::{LOSSES as CAUSES, Loss},
};

#[map]
static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(CAUSES, 0);

/// Counts something that could not be recorded.
#[inline(always)]
pub(crate) fn count_loss(cause: Loss) {
    if let Some(count) = LOSSES.get_ptr_mut(cause as u32) {
        // SAFETY: a live map value. It is this CPU's, but another program may preempt the program of a uprobe, so the
        // counter is changed atomically.
        unsafe { add(count, 1) };
    }
}

/// Atomically adds to a counter that several CPUs may write.
///
/// # Safety
/// `counter` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn add(counter: *mut u64, n: u64) {
    // `AtomicU64::fetch_add` is missing on this target, because BPF before 5.12 has no atomic instruction that returns
    // the old value. The instruction that returns nothing is as old as BPF maps.
    // SAFETY: by contract; map values are aligned to 8 bytes.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("lock *(u64 *)({} + 0) += {}", in(reg) counter, in(reg) n, options(nostack));
    }
    // This variant is only linted, never run.
    // SAFETY: by contract.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        *counter += n;
    }
}

/// Atomically adds to a 32-bit counter that several CPUs may write.
///
/// # Safety
/// `counter` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn add_u32(counter: *mut u32, n: u32) {
    // SAFETY: by contract; counters are aligned to their size.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("lock *(u32 *)({} + 0) += {}", in(reg) counter, in(reg) u64::from(n), options(nostack));
    }
    // This variant is only linted, never run.
    // SAFETY: by contract.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        *counter = (*counter).wrapping_add(n);
    }
}

/// Adds a duration to a histogram that several CPUs may write. Counts and sums are atomic. If two CPUs set a new
/// minimum or maximum within the same few nanoseconds, the less extreme one may remain.
///
/// # Safety
/// `histogram` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn record(histogram: *mut Histogram, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        if let Some(bucket) = bucket(histogram, ns) {
            add(&raw mut (*bucket).count, 1);
            add(&raw mut (*bucket).sum_ns, ns);
            update_min_max(histogram, ns);
        }
    }
}

/// Adds a duration to a histogram that has no other writer at present, at less than half the cost of [`record`].
///
/// # Safety
/// `histogram` points into a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn record_unshared(histogram: *mut Histogram, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        if let Some(bucket) = bucket(histogram, ns) {
            (*bucket).count += 1;
            (*bucket).sum_ns += ns;
            update_min_max(histogram, ns);
        }
    }
}

/// The bucket that a duration falls into. There always is one.
///
/// # Safety
/// `histogram` points into a live map value.
#[inline(always)]
unsafe fn bucket(histogram: *mut Histogram, ns: u64) -> Option<*mut Bucket> {
    let bucket = bucket_of(ns);
    // SAFETY: reads a local. The read is volatile so that the compiler, which can prove the bound, keeps the check that
    // the verifier, which cannot prove it, requires.
    let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
    if bucket >= BUCKETS {
        return None;
    }
    // SAFETY: by contract; `bucket` is in range.
    Some(unsafe { (&raw mut (*histogram).buckets).cast::<Bucket>().add(bucket) })
}

/// Updates the shortest and the longest duration of a histogram.
///
/// # Safety
/// `histogram` points into a live map value.
#[inline(always)]
unsafe fn update_min_max(histogram: *mut Histogram, ns: u64) {
    let ns = ns.max(1);
    // SAFETY: by contract.
    unsafe {
        if ns > (*histogram).max_ns {
            (*histogram).max_ns = ns;
        }
        let min = (*histogram).min_ns;
        if min == 0 || ns < min {
            (*histogram).min_ns = ns;
        }
    }
}
