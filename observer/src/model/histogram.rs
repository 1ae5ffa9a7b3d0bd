//! Histograms of durations in seconds: counts at bounds, quantiles, exact sums.

use std::{fmt, str::FromStr};

use observer_common::histogram::{self as kernel, BUCKETS};
use serde::{Serialize, Serializer, ser::SerializeStruct as _};

const NANOSECONDS: f64 = 1e9;

/// A histogram of durations.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Histogram {
    /// Number of durations in each bucket. The buckets are those of the kernel's histograms.
    pub(super) counts: Vec<u64>,
    /// Their sum, in nanoseconds.
    pub(super) sum_ns: u64,
    /// The shortest, in nanoseconds; 0 if there is none.
    pub(super) min_ns: u64,
    /// The longest, in nanoseconds; 0 if there is none.
    pub(super) max_ns: u64,
}

impl Histogram {
    /// Number of durations.
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Their sum in seconds.
    pub(crate) fn sum(&self) -> f64 {
        seconds(self.sum_ns)
    }

    /// Mean, in seconds; 0 if there is none.
    pub(crate) fn mean(&self) -> f64 {
        self.sum() / float(self.count().max(1))
    }

    /// The shortest, in seconds; 0 if there is none.
    pub(crate) fn min(&self) -> f64 {
        seconds(self.min_ns)
    }

    /// The longest, in seconds; 0 if there is none.
    pub(crate) fn max(&self) -> f64 {
        seconds(self.max_ns)
    }

    /// The quantile `q` in seconds, exact to its bucket (12.5 %) and interpolated inside; `None` if there is no
    /// duration.
    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        let rank = q * float(self.count());
        let mut below = 0_u64;
        for (index, &count) in self.counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            if float(below) + float(count) >= rank {
                let lower = index.checked_sub(1).and_then(kernel::upper_bound).unwrap_or(0).max(self.min_ns);
                let upper = kernel::upper_bound(index).unwrap_or(self.max_ns).min(self.max_ns).max(lower);
                let inside = ((rank - float(below)) / float(count)).clamp(0.0, 1.0);
                return Some((float(lower) + inside * float(upper - lower)) / NANOSECONDS);
            }
            below = below.saturating_add(count);
        }
        None
    }

    /// Upper bound in seconds, and number of durations up to it, of every bucket but the last, which has no bound.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        self.counts.iter().enumerate().scan(0_u64, |below, (index, count)| {
            *below = below.saturating_add(*count);
            kernel::upper_bound(index).map(|bound| (seconds(bound), *below))
        })
    }

    /// The same at a subset of the bounds. The subset is constant, so that the bounds of stored series do not change.
    pub(crate) fn cumulative_at(&self, resolution: Resolution) -> impl Iterator<Item = (f64, u64)> + '_ {
        // The first bucket's bound is a power of two.
        self.cumulative().step_by(kernel::STEPS / resolution.0)
    }
}

/// Number of histogram bounds for each power of two: a divisor of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resolution(usize);

impl Resolution {
    /// Only powers of two.
    pub(crate) const LOWEST: Self = Self(1);
}

impl fmt::Display for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Resolution {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let divides = |steps: &usize| *steps > 0 && kernel::STEPS.is_multiple_of(*steps);
        text.parse().ok().filter(divides).map(Self).ok_or("1, 2, 4 or 8")
    }
}

/// The difference between two states of a histogram. Only buckets that grew are kept: in a short time those are few.
#[derive(Clone, Debug, Default)]
pub(crate) struct Growth {
    counts: Vec<(usize, u64)>,
    sum_ns: u64,
}

impl Histogram {
    /// The difference from an earlier state.
    pub(crate) fn since(&self, earlier: &Self) -> Growth {
        let pairs = self.counts.iter().zip(&earlier.counts).enumerate();
        let counts = pairs.map(|(bucket, (now, then))| (bucket, now.saturating_sub(*then)));
        Growth {
            counts: counts.filter(|(_, count)| *count > 0).collect(),
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
        }
    }

    /// The sum of differences. The longest duration is known only by its bucket, and is limited to `most` seconds.
    pub(crate) fn grown<'a>(growths: impl Iterator<Item = &'a Growth>, most: f64) -> Self {
        let mut sum = Self::default();
        for growth in growths {
            for (bucket, count) in &growth.counts {
                sum.counts[*bucket] = sum.counts[*bucket].saturating_add(*count);
            }
            sum.sum_ns = sum.sum_ns.saturating_add(growth.sum_ns);
        }
        let most_ns = nanoseconds(most);
        let top = sum.counts.iter().rposition(|count| *count > 0);
        sum.max_ns = top.map_or(0, |bucket| kernel::upper_bound(bucket).unwrap_or(most_ns).min(most_ns));
        sum
    }
}

impl Histogram {
    /// Adds another's durations.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.min_ns = match (self.count(), other.count()) {
            (_, 0) => self.min_ns,
            (0, _) => other.min_ns,
            _ => self.min_ns.min(other.min_ns),
        };
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count = count.saturating_add(*more);
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }
}

impl From<&kernel::Histogram> for Histogram {
    fn from(raw: &kernel::Histogram) -> Self {
        Self {
            counts: raw.buckets.iter().map(|bucket| bucket.count).collect(),
            sum_ns: raw.buckets.iter().fold(0, |sum, bucket| sum.saturating_add(bucket.sum_ns)),
            min_ns: raw.min_ns,
            max_ns: raw.max_ns,
        }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], sum_ns: 0, min_ns: 0, max_ns: 0 }
    }
}

/// The report's `H`. Empty buckets are left out.
impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut below = 0;
        let held: Vec<_> =
            self.cumulative().filter(|&(_, count)| std::mem::replace(&mut below, count) != count).collect();
        let mut h = serializer.serialize_struct("H", 9)?;
        h.serialize_field("count", &self.count())?;
        h.serialize_field("sum", &self.sum())?;
        h.serialize_field("min", &self.min())?;
        h.serialize_field("max", &self.max())?;
        for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)] {
            h.serialize_field(name, &self.quantile(q))?;
        }
        h.serialize_field("buckets", &held)?;
        h.end()
    }
}

/// A distribution of durations. Without values, the minimum, the maximum and the quantiles are null.
#[cfg(test)]
#[derive(schemars::JsonSchema)]
#[schemars(rename = "Histogram")]
#[expect(dead_code, reason = "describes the fields that `Serialize` writes")]
struct HistogramSchema {
    /// Number of durations.
    count: u64,
    /// Their sum, in seconds.
    sum: f64,
    /// The shortest, in seconds.
    min: Option<f64>,
    /// The longest, in seconds.
    max: Option<f64>,
    /// Median, in seconds.
    p50: Option<f64>,
    /// 90th percentile, in seconds.
    p90: Option<f64>,
    /// 99th percentile, in seconds.
    p99: Option<f64>,
    /// 99.9th percentile, in seconds.
    p999: Option<f64>,
    /// Upper bounds in seconds, each with the number of durations that do not exceed it. Empty buckets are left out; the
    /// last bound is null if it is infinite.
    buckets: Vec<(Option<f64>, u64)>,
}

#[cfg(test)]
impl schemars::JsonSchema for Histogram {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        HistogramSchema::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        HistogramSchema::json_schema(generator)
    }
}

/// Nanoseconds as seconds.
pub(crate) fn seconds(ns: u64) -> f64 {
    float(ns) / NANOSECONDS
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "durations are not negative; casts saturate"
)]
fn nanoseconds(seconds: f64) -> u64 {
    (seconds * NANOSECONDS).round() as u64
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 ns, which is 104 days")]
fn float(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn of(durations: &[u64]) -> Histogram {
        let mut raw = kernel::Histogram::EMPTY;
        for &ns in durations {
            let bucket = &mut raw.buckets[kernel::bucket_of(ns)];
            bucket.count += 1;
            bucket.sum_ns += ns;
            raw.max_ns = raw.max_ns.max(ns);
            raw.min_ns = if raw.min_ns == 0 { ns } else { raw.min_ns.min(ns) };
        }
        Histogram::from(&raw)
    }

    /// Full counters do not wrap: a value that only grows must never seem to fall.
    #[test]
    fn sums_saturate() {
        let mut raw = kernel::Histogram::EMPTY;
        for bucket in [3, 9] {
            raw.buckets[bucket].count = u64::MAX - 1;
            raw.buckets[bucket].sum_ns = u64::MAX - 1;
        }
        raw.max_ns = 1_000_000;
        let h = Histogram::from(&raw);
        assert_eq!(h.count(), u64::MAX);
        assert_eq!(h.cumulative().last().unwrap().1, u64::MAX);
        assert!(h.quantile(0.99).is_some() && h.sum() > 1.8e10);
        let growth = h.since(&Histogram::default());
        let both = Histogram::grown([growth.clone(), growth].iter(), 1.0);
        assert_eq!((both.counts[3], both.sum_ns), (u64::MAX, u64::MAX));
    }

    #[test]
    fn sums_are_exact_and_quantiles_within_a_bucket() {
        let durations: Vec<u64> = (1..=1000).map(|n| n * MILLISECOND).collect();
        let h = of(&durations);
        assert_eq!(h.count(), 1000);
        assert!((h.sum() - 500.5).abs() < 1e-9);
        for (q, exact) in [(0.5, 0.5), (0.9, 0.9), (0.99, 0.99), (1.0, 1.0)] {
            let estimate = h.quantile(q).unwrap();
            assert!((estimate / exact - 1.0).abs() <= 0.125, "p{q}: {estimate} for {exact}");
        }
    }

    #[test]
    fn a_single_duration_is_every_quantile() {
        let h = of(&[100 * MILLISECOND]);
        for q in [0.0, 0.5, 0.99, 1.0] {
            assert!((h.quantile(q).unwrap() - 0.1).abs() < 1e-12);
        }
    }

    #[test]
    fn an_empty_histogram_has_no_quantiles() {
        let h = of(&[]);
        assert_eq!(h.quantile(0.5), None);
        assert_eq!(serde_json::to_value(&h).unwrap()["p50"], serde_json::Value::Null);
    }

    #[test]
    fn the_last_bucket_counts_only_towards_the_total() {
        let h = of(&[MILLISECOND, 100_000 * MILLISECOND]);
        assert_eq!(h.cumulative().last().unwrap().1, 1);
        assert_eq!(h.count(), 2);
        assert!((h.quantile(1.0).unwrap() - 100.0).abs() < 1e-9);
    }

    #[test]
    fn powers_of_two_are_among_all_sets_of_bounds() {
        let h = of(&[3_000, 5_000, 80 * MILLISECOND]);
        let octaves: Vec<_> = h.cumulative_at(Resolution::LOWEST).collect();
        assert_eq!((octaves.len(), octaves.last().unwrap().1), (27, 3));
        assert!(octaves.windows(2).all(|pair| (pair[1].0 / pair[0].0 - 2.0).abs() < 1e-9));
        for (text, bounds) in [("1", 27), ("2", 53), ("4", 105), ("8", BUCKETS - 1)] {
            let finer: Vec<_> = h.cumulative_at(text.parse().unwrap()).collect();
            assert_eq!(finer.len(), bounds);
            assert!(octaves.iter().all(|bound| finer.contains(bound)));
        }
        for text in ["0", "3", "16", "-1", "many"] {
            assert!(text.parse::<Resolution>().is_err(), "{text}");
        }
    }

    #[test]
    fn growth_is_the_difference() {
        let before = of(&[MILLISECOND, 300 * MILLISECOND]);
        let now = of(&[MILLISECOND, 300 * MILLISECOND, 2 * MILLISECOND, 100 * MILLISECOND]);
        let recent = Histogram::grown([now.since(&before)].iter(), now.max());
        assert_eq!(recent.count(), 2);
        assert!((recent.sum() - 0.102).abs() < 1e-9);
        assert!((0.1..0.1125).contains(&recent.max()), "{}", recent.max());
        let nothing = Histogram::grown([now.since(&now)].iter(), now.max());
        assert_eq!((nothing.count(), nothing.quantile(0.99)), (0, None));
    }
}
