//! Log-linear histograms of nanoseconds: eight buckets for each power of two, from 1 us to 69 s. A bucket covers
//! `(lower, upper]`, like Prometheus' `le`, and is at most 12.5 % wide. Each bucket keeps its sum as well as its count,
//! so means are exact, and lag can be computed exactly at every bucket bound.

/// Binary logarithm of the number of linear steps for each power of two.
const STEP_BITS: u32 = 3;
/// Durations up to 2^10 ns (1.024 us) fall into the first bucket.
const LOWEST_EXPONENT: u32 = 10;
/// Durations above 2^36 ns (68.7 s) fall into the last bucket.
const HIGHEST_EXPONENT: u32 = 36;

/// Buckets for each power of two.
pub const STEPS: usize = 1 << STEP_BITS;

/// Number of buckets, including the open ones at both ends.
pub const BUCKETS: usize = 2 + (((HIGHEST_EXPONENT - LOWEST_EXPONENT) as usize) << STEP_BITS);

/// The bucket that contains a duration of `ns` nanoseconds; always below [`BUCKETS`].
#[inline(always)]
pub const fn bucket_of(ns: u64) -> usize {
    // Minus one, because the upper bound belongs to the bucket.
    let v = ns.saturating_sub(1);
    if v < 1 << LOWEST_EXPONENT {
        return 0;
    }
    if v >= 1 << HIGHEST_EXPONENT {
        return BUCKETS - 1;
    }
    let exponent = 63 - v.leading_zeros();
    let step = (v >> (exponent - STEP_BITS)) & ((1 << STEP_BITS) - 1);
    1 + (((exponent - LOWEST_EXPONENT) as usize) << STEP_BITS) + step as usize
}

/// Upper bound of a bucket in nanoseconds, inclusive; `None` for the last one, which has no bound.
pub const fn upper_bound(bucket: usize) -> Option<u64> {
    if bucket >= BUCKETS - 1 {
        return None;
    }
    if bucket == 0 {
        return Some(1 << LOWEST_EXPONENT);
    }
    let exponent = LOWEST_EXPONENT as usize + ((bucket - 1) >> STEP_BITS);
    let steps = ((bucket - 1) & ((1 << STEP_BITS) - 1)) as u64 + 1;
    Some((1 << exponent) + (steps << (exponent - STEP_BITS as usize)))
}

/// One bucket: a number of durations and their sum.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Number of durations in this bucket.
    pub count: u64,
    /// Their sum in nanoseconds.
    pub sum_ns: u64,
}

/// Histogram of durations, aggregated in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Shortest duration in nanoseconds; 0 if the histogram is empty (a duration of 0 is recorded as 1).
    pub min_ns: u64,
    /// Longest duration in nanoseconds.
    pub max_ns: u64,
    /// Indexed by [`bucket_of`].
    pub buckets: [Bucket; BUCKETS],
}
crate::shared::shared!(Histogram, 16 * BUCKETS + 16);

impl Histogram {
    /// A histogram without durations.
    pub const EMPTY: Self = Self { buckets: [Bucket { count: 0, sum_ns: 0 }; BUCKETS], min_ns: 0, max_ns: 0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        for bucket in 0..BUCKETS - 1 {
            let bound = upper_bound(bucket).unwrap();
            assert_eq!(bucket_of(bound - 1), bucket, "{bound} - 1");
            assert_eq!(bucket_of(bound), bucket, "{bound}");
            assert_eq!(bucket_of(bound + 1), bucket + 1, "{bound} + 1");
        }
    }

    #[test]
    fn powers_of_two_and_their_neighbours() {
        for exponent in LOWEST_EXPONENT..HIGHEST_EXPONENT {
            let n = 1_u64 << exponent;
            assert_eq!(upper_bound(bucket_of(n)), Some(n), "2^{exponent} is a bound");
            assert_eq!(bucket_of(n - 1), bucket_of(n));
            assert_eq!(bucket_of(n + 1), bucket_of(n) + 1);
        }
    }

    #[test]
    fn the_ends_are_open() {
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(1), 0);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(upper_bound(BUCKETS - 1), None);
        assert_eq!(upper_bound(BUCKETS - 2), Some(1 << HIGHEST_EXPONENT));
    }

    #[test]
    fn no_bucket_is_wider_than_an_eighth_of_its_lower_bound() {
        for bucket in 1..BUCKETS - 1 {
            let (lower, upper) = (upper_bound(bucket - 1).unwrap(), upper_bound(bucket).unwrap());
            assert!((upper - lower) * 8 <= lower, "bucket {bucket}: {lower}..={upper}");
        }
    }
}
