//! How programs hand figures to the user side: histograms aggregated in place, and losses counted.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use observer_common::{
    histogram::{BUCKETS, Histogram, bucket_of},
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

/// Adds one duration to a histogram that several CPUs may write. Counts and sums are atomic; two CPUs that
/// set a new extreme within the same few nanoseconds may leave the lesser one.
///
/// # Safety
/// `histogram` points into a live map value.
#[inline(always)]
pub(crate) unsafe fn record(histogram: *mut Histogram, ns: u64) {
    let bucket = bucket_of(ns);
    // SAFETY: reads a local. Volatile, so that the compiler, which can prove the bound, keeps the check that
    // the verifier, which cannot, asks for.
    let bucket = unsafe { core::ptr::read_volatile(&raw const bucket) };
    if bucket >= BUCKETS {
        return;
    }
    // SAFETY: by contract, and `bucket` is inside.
    unsafe {
        let slot = (&raw mut (*histogram).buckets).cast::<observer_common::histogram::Bucket>().add(bucket);
        add(&raw mut (*slot).count, 1);
        add(&raw mut (*slot).sum_ns, ns);
        let ns = ns.max(1);
        if ns > (*histogram).max_ns {
            (*histogram).max_ns = ns;
        }
        let min = (*histogram).min_ns;
        if min == 0 || ns < min {
            (*histogram).min_ns = ns;
        }
    }
}
