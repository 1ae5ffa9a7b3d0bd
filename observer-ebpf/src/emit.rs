//! How programs hand figures to the user side: histograms aggregated in place, and losses counted.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use observer_common::{
    histogram::{BUCKETS, Bucket, Histogram, bucket_of},
    loss::{LOSSES as CAUSES, Loss},
};

#[map]
static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(CAUSES, 0);

/// Counts something that could not be kept.
#[inline(always)]
pub(crate) fn lost(cause: Loss) {
    if let Some(count) = LOSSES.get_ptr_mut(cause as u32) {
        // SAFETY: a live map value. This CPU's, but a uprobe's program may be preempted by another's.
        unsafe { add(count, 1) };
    }
}

/// Adds to a counter that several CPUs may write.
///
/// # Safety
/// `counter` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn add(counter: *mut u64, n: u64) {
    // `AtomicU64::fetch_add` is missing on this target, because BPF before 5.12 cannot return the old value;
    // the instruction that returns nothing is as old as BPF maps.
    // SAFETY: by contract; map values are aligned to 8 bytes.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("lock *(u64 *)({} + 0) += {}", in(reg) counter, in(reg) n, options(nostack));
    }
    // Where this is only linted, never run.
    // SAFETY: by contract.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        *counter += n;
    }
}

/// The same of half the size.
///
/// # Safety
/// As above.
#[inline(always)]
pub(crate) unsafe fn add_word(counter: *mut u32, n: u32) {
    // SAFETY: by contract; counters are aligned to their size.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("lock *(u32 *)({} + 0) += {}", in(reg) counter, in(reg) u64::from(n), options(nostack));
    }
    // Where this is only linted, never run.
    // SAFETY: by contract.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        *counter = (*counter).wrapping_add(n);
    }
}

/// Adds one duration to a histogram that several CPUs may write. Counts and sums are atomic; two CPUs that
/// set a new extreme within the same few nanoseconds may leave the lesser one.
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
            stretch(histogram, ns);
        }
    }
}

/// The same for one that nobody else writes now, which costs less than half.
///
/// # Safety
/// `histogram` points into a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn record_alone(histogram: *mut Histogram, ns: u64) {
    // SAFETY: by contract.
    unsafe {
        if let Some(bucket) = bucket(histogram, ns) {
            (*bucket).count += 1;
            (*bucket).sum_ns += ns;
            stretch(histogram, ns);
        }
    }
}

/// The bucket that a duration falls into; there always is one.
///
/// # Safety
/// `histogram` points into a live map value.
#[inline(always)]
unsafe fn bucket(histogram: *mut Histogram, ns: u64) -> Option<*mut Bucket> {
    let bucket = bucket_of(ns);
    // SAFETY: reads a local. Volatile, so that the compiler, which can prove the bound, keeps the check that
    // the verifier, which cannot, asks for.
    let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
    if bucket >= BUCKETS {
        return None;
    }
    // SAFETY: by contract, and `bucket` is inside.
    Some(unsafe { (&raw mut (*histogram).buckets).cast::<Bucket>().add(bucket) })
}

/// # Safety
/// As above.
#[inline(always)]
unsafe fn stretch(histogram: *mut Histogram, ns: u64) {
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
