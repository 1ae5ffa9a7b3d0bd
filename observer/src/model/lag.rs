//! Lag: the delay that an event arriving at a uniformly random moment would see, as an exact virtual prober would
//! measure it. It is computed for every moment, from histograms that the kernel keeps anyway, not from samples.

use observer_common::histogram::{self as kernel, BUCKETS, bucket_of, upper_bound};

use super::histogram::Histogram;

/// Interval between two virtual probes, in nanoseconds of wall time.
const PROBE_NS: u64 = 1_000_000;

/// The same in seconds: the time that each count of a histogram of lag stands for.
pub(crate) const PROBE_SECONDS: f64 = 0.001;

/// Counters of an event loop from which its lag is computed. They only grow.
#[derive(Clone, Copy)]
pub(crate) struct Observed<'a> {
    /// Lengths of finished slices.
    pub(crate) slices: &'a kernel::Histogram,
    /// Return delays of finished waits, for those that blocked: the time until the thread ran again, since the end of
    /// the timeout that ended the wait, or else since the thread was made runnable.
    pub(crate) replies: &'a kernel::Histogram,
    /// Age of the slice in progress or of the return delay in progress, in nanoseconds; 0 if there is neither.
    pub(crate) in_progress_ns: u64,
    /// Time in waits, including return delays and the wait in progress, in nanoseconds.
    pub(crate) wait_ns: u64,
}

/// The virtual prober of one event loop. It must be asked regularly, because waiting time is attributed in increments.
///
/// - **Slices and return delays** are intervals in which the loop does not look for new events. In an interval of
///   length B, every event waits for the end: for every x < B, x of those B nanoseconds see a delay of at most x. So
///   at a bucket's bound x, the time that sees at most x is sum(min(B, x)), which counts and sums of buckets give
///   exactly. The interval in progress counts with its present age, as if it ended now.
/// - **The rest of the waiting time** sees the return delays of waits. The waiting time between two calls of `ask` is
///   distributed over the return delays that fell into it, or over all so far if there was none. Before the first
///   return delay it sees no delay. A return delay includes the wake-up and, where a timeout ended the wait, the slack
///   of the timer. Each wait that blocked has one return delay, so that neither counts twice. What ends its waits is
///   what a loop waits for: a loop that runs on timers sees their slack, one that runs on requests does not.
///
/// The sum is the integral of the delay over time. For an interval of length B that is B^2 / 2. For a bucket from l to
/// u, the chord (B (l + u) - l u) / 2 is an upper bound, and the chord less (u - l)^2 / 8 a lower one. The value used
/// is the chord less a 512th of it. So the sum is exact to 0.2 %, and to a quarter of a microsecond for each moment of
/// intervals below 1.024 us. Only intervals of more than 68.7 s may be overestimated, if there are several. The chord
/// is continuous and linear: an interval in progress ends without a jump, and nothing ever decreases.
#[derive(Clone, Debug)]
pub(crate) struct Prober {
    /// Waiting time by the bucket of the delay that it sees, in nanoseconds.
    waiting_ns: Vec<u64>,
    /// Integral of the delay over that time, in square nanoseconds.
    waiting_sum: u128,
    /// Waiting time attributed so far, in nanoseconds.
    attributed_ns: u64,
    /// Return delays as of the last call.
    replies: kernel::Histogram,
    /// The last result: probes that saw at most each bucket's bound, and the sum of all delays in nanoseconds.
    last: (Vec<u64>, u64),
}

impl Default for Prober {
    fn default() -> Self {
        Self {
            waiting_ns: vec![0; BUCKETS],
            waiting_sum: 0,
            attributed_ns: 0,
            replies: kernel::Histogram::EMPTY,
            last: (vec![0; BUCKETS], 0),
        }
    }
}

impl Prober {
    /// The lag up to now: a count for each millisecond observed, and the sum of the delays that these probes saw.
    pub(crate) fn ask(&mut self, observed: Observed<'_>) -> Histogram {
        let intervals = busy_intervals(&observed);
        let replied_ns = total(observed.replies.buckets.iter().map(|bucket| bucket.sum_ns));
        self.attribute(observed.wait_ns.saturating_sub(replied_ns), observed.replies);

        let (cumulative, sum_ns) = &mut self.last;
        let mut longer = total(intervals.buckets.iter().map(|bucket| bucket.count));
        let (mut shorter_ns, mut waiting_ns, mut least) = (0_u64, 0_u64, 0);
        for (bucket, probes) in cumulative.iter_mut().enumerate() {
            longer = longer.saturating_sub(intervals.buckets[bucket].count);
            shorter_ns = shorter_ns.saturating_add(intervals.buckets[bucket].sum_ns);
            waiting_ns = waiting_ns.saturating_add(self.waiting_ns[bucket]);
            // The last bucket has no bound, and no interval is longer.
            let of_longer = upper_bound(bucket).map_or(0, |bound| longer.saturating_mul(bound));
            // An entry that was read while it changed may be ahead once, or one bucket of it behind the bucket before.
            // Counts must not decrease.
            let delayed_ns = total([shorter_ns, of_longer, waiting_ns].into_iter());
            *probes = (*probes).max(delayed_ns / PROBE_NS).max(least);
            least = *probes;
        }
        let sum = integral(&intervals).saturating_add(self.waiting_sum) / u128::from(PROBE_NS);
        *sum_ns = (*sum_ns).max(u64::try_from(sum).unwrap_or(u64::MAX));

        let below = std::iter::once(&0).chain(cumulative.iter());
        Histogram {
            counts: cumulative.iter().zip(below).map(|(up_to, below)| up_to - below).collect(),
            sum_ns: *sum_ns,
            min_ns: 0,
            max_ns: intervals.max_ns,
        }
    }

    /// Distributes new waiting time over the new return delays.
    fn attribute(&mut self, wait_ns: u64, replies: &kernel::Histogram) {
        // A return delay whose beginning was not noticed may have counted as waiting time until it ended. That part is
        // attributed already.
        let new_ns = wait_ns.saturating_sub(self.attributed_ns);
        self.attributed_ns = self.attributed_ns.saturating_add(new_ns);
        let before = std::mem::replace(&mut self.replies, *replies);
        let since = |now: u64, then: u64| now.saturating_sub(then);
        let fresh = replies.buckets.iter().zip(&before.buckets);
        let mut fresh: Vec<(u64, u64)> =
            fresh.map(|(now, then)| (since(now.count, then.count), since(now.sum_ns, then.sum_ns))).collect();
        if fresh.iter().all(|(count, _)| *count == 0) {
            fresh = replies.buckets.iter().map(|bucket| (bucket.count, bucket.sum_ns)).collect();
        }
        let count = total(fresh.iter().map(|(count, _)| *count));
        let sum_ns = total(fresh.iter().map(|(_, sum_ns)| *sum_ns));
        let share = |of: u64| u128::from(new_ns) * u128::from(of) / u128::from(count.max(1));
        let mut rest_ns = new_ns;
        for (waiting_ns, (count, _)) in self.waiting_ns.iter_mut().zip(&fresh) {
            let part = u64::try_from(share(*count)).unwrap_or(rest_ns).min(rest_ns);
            *waiting_ns = waiting_ns.saturating_add(part);
            rest_ns -= part;
        }
        // The remainder of the division; before the first return delay, all of it.
        self.waiting_ns[0] = self.waiting_ns[0].saturating_add(rest_ns);
        self.waiting_sum = self.waiting_sum.saturating_add(share(sum_ns));
    }
}

/// The sum, saturating.
fn total(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

/// All intervals in which the loop did not look for events, including the one in progress.
fn busy_intervals(observed: &Observed<'_>) -> kernel::Histogram {
    let mut all = *observed.slices;
    for (bucket, reply) in all.buckets.iter_mut().zip(&observed.replies.buckets) {
        bucket.count = bucket.count.saturating_add(reply.count);
        bucket.sum_ns = bucket.sum_ns.saturating_add(reply.sum_ns);
    }
    all.max_ns = all.max_ns.max(observed.replies.max_ns).max(observed.in_progress_ns);
    if observed.in_progress_ns > 0 {
        let bucket = &mut all.buckets[bucket_of(observed.in_progress_ns)];
        bucket.count = bucket.count.saturating_add(1);
        bucket.sum_ns = bucket.sum_ns.saturating_add(observed.in_progress_ns);
    }
    all
}

/// The integral of the delay over all intervals, in square nanoseconds: see [`Prober`].
fn integral(intervals: &kernel::Histogram) -> u128 {
    let twice: u128 = (0..BUCKETS)
        .map(|index| {
            let bucket = &intervals.buckets[index];
            let lower = u128::from(index.checked_sub(1).and_then(upper_bound).unwrap_or(0));
            let upper = u128::from(upper_bound(index).unwrap_or(intervals.max_ns));
            // Both are read from an entry that may change meanwhile, so their difference could be negative.
            let chords = u128::from(bucket.sum_ns).saturating_mul(lower + upper);
            chords.saturating_sub(u128::from(bucket.count).saturating_mul(lower * upper))
        })
        .fold(0, u128::saturating_add);
    twice.saturating_mul(511) / 1024
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "compared with a tolerance")]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;
    const SECOND: u64 = 1_000_000_000;

    /// The result of a brute-force prober for these intervals: the time that sees at most each bound, and the
    /// integral.
    fn brute_force(lengths: &[u64]) -> (Vec<u64>, f64) {
        let within = |bound: Option<u64>| lengths.iter().map(|&b| b.min(bound.unwrap_or(u64::MAX))).sum();
        let integral = lengths.iter().map(|&b| (b as f64) * (b as f64) / 2.0).sum();
        ((0..BUCKETS).map(|bucket| within(upper_bound(bucket))).collect(), integral)
    }

    fn histogram(lengths: impl IntoIterator<Item = u64>) -> kernel::Histogram {
        let mut raw = kernel::Histogram::EMPTY;
        for ns in lengths {
            add(&mut raw, ns);
        }
        raw
    }

    fn add(raw: &mut kernel::Histogram, ns: u64) {
        let bucket = &mut raw.buckets[bucket_of(ns)];
        bucket.count += 1;
        bucket.sum_ns += ns;
        raw.max_ns = raw.max_ns.max(ns);
    }

    fn length(random: &mut fastrand::Rng, bits: u32) -> u64 {
        let bits = random.u32(1..=bits);
        random.u64(1..1 << bits)
    }

    fn ask(slices: &kernel::Histogram, in_progress_ns: u64) -> Histogram {
        let replies = &kernel::Histogram::EMPTY;
        Prober::default().ask(Observed { slices, replies, in_progress_ns, wait_ns: 0 })
    }

    /// Reproducible lengths, spread evenly over the orders of magnitude up to a bound in bits.
    fn lengths(seed: u64, count: usize, bits: u32) -> Vec<u64> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| length(&mut random, bits)).collect()
    }

    #[test]
    fn counts_are_exact_at_every_bound() {
        for seed in 0..200 {
            let slices = lengths(seed, 50, 36);
            let (within, _) = brute_force(&slices);
            let lag = ask(&histogram(slices.iter().copied()), 0);
            let mut cumulative = 0;
            for (bucket, (count, within)) in lag.counts.iter().zip(within).enumerate() {
                cumulative += count;
                assert_eq!(cumulative, within / PROBE_NS, "seed {seed}, bucket {bucket}");
            }
            assert_eq!(cumulative, slices.iter().sum::<u64>() / PROBE_NS, "one probe a millisecond");
        }
    }

    #[test]
    fn sums_are_exact_to_a_five_hundredth() {
        for seed in 0..200 {
            // From few buckets to many orders of magnitude: above the first bucket, below the last.
            for bits in [18, 25, 36] {
                let slices: Vec<u64> = lengths(seed, 40, bits).into_iter().map(|ns| ns.max(1025)).collect();
                let (_, exact) = brute_force(&slices);
                let computed = integral(&histogram(slices)) as f64;
                assert!((computed / exact - 1.0).abs() <= 0.002, "seed {seed}: {computed} for {exact}");
            }
        }
    }

    #[test]
    fn sums_of_short_slices_are_exact_to_a_quarter_of_a_microsecond() {
        for seed in 0..50 {
            let slices = lengths(seed, 40, 10);
            let total: u64 = slices.iter().sum();
            let (_, exact) = brute_force(&slices);
            let computed = integral(&histogram(slices)) as f64;
            assert!((computed - exact).abs() <= 512.0 * total as f64, "seed {seed}: {computed} for {exact}");
        }
    }

    #[test]
    fn quantiles_are_those_of_random_moments() {
        // Half of all moments are in slices of 100 ms and see up to 100 ms, the others next to nothing.
        let slices: Vec<u64> =
            (0..10).map(|_| 100 * MILLISECOND).chain((0..10_000).map(|_| 100_000)).collect();
        let lag = ask(&histogram(slices), 0);
        assert_eq!(lag.count(), 2000);
        for (q, exact) in [(0.75, 0.050), (0.9, 0.080), (0.99, 0.098), (0.999, 0.0998)] {
            let quantile = lag.quantile(q).unwrap();
            assert!((quantile / exact - 1.0).abs() < 0.01, "p{q}: {quantile} for {exact}");
        }
        assert!((lag.sum() / (10.0 * 0.005 / 0.001 + 10_000.0 * 5e-9 / 0.001) - 1.0).abs() < 0.003);
        assert!((lag.max() - 0.1).abs() < 1e-12);
    }

    #[track_caller]
    fn assert_grown(before: &Histogram, after: &Histogram, when: &str) {
        let (mut low, mut high) = (0, 0);
        for (bucket, (then, now)) in before.counts.iter().zip(&after.counts).enumerate() {
            low += then;
            high += now;
            assert!(high >= low, "{when}: bucket {bucket} shrank from {low} to {high}");
        }
        assert!(after.sum_ns >= before.sum_ns, "{when}: {} to {}", before.sum_ns, after.sum_ns);
        assert!(after.max_ns >= before.max_ns);
    }

    /// Tests the formula, not what a `Prober` remembers: each call uses a new one.
    #[test]
    fn nothing_decreases_while_a_slice_goes_on_and_ends() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut finished = histogram(lengths(seed, 30, 38));
            for _ in 0..20 {
                let length = length(&mut random, 40);
                let mut before = ask(&finished, 0);
                for step in 1..=16 {
                    let after = ask(&finished, length / 16 * step);
                    assert_grown(&before, &after, &format!("seed {seed}, {step}/16 of {length}"));
                    before = after;
                }
                add(&mut finished, length);
                assert_grown(&before, &ask(&finished, 0), &format!("seed {seed}, end of {length}"));
            }
        }
    }

    #[test]
    fn waiting_time_sees_the_return_delays_of_its_interval() {
        let slices = kernel::Histogram::EMPTY;
        let mut prober = Prober::default();
        let mut replies = kernel::Histogram::EMPTY;
        let mut at = |replies: &kernel::Histogram, wait_ns| {
            prober.ask(Observed { slices: &slices, replies, in_progress_ns: 0, wait_ns })
        };
        // No return delay is known yet: no delay.
        let idle = at(&replies, SECOND);
        assert_eq!((idle.count(), idle.sum_ns), (1000, 0));
        // One return delay of 2 ms: all of the second that ended with it, except those 2 ms, sees 2 ms.
        add(&mut replies, 2 * MILLISECOND);
        let first = at(&replies, 2 * SECOND);
        assert_eq!(first.count(), 2000);
        assert_grown(&idle, &first, "first reply");
        assert!((first.sum() - 0.998 * 2.0).abs() < 0.01, "{}", first.sum());
        // A hundred return delays of 10 us in the next second. Then none, so that the mixture is used.
        (0..100).for_each(|_| add(&mut replies, 10_000));
        let second = at(&replies, 3 * SECOND);
        assert!((second.sum() - first.sum() - 0.01).abs() < 0.001, "{}", second.sum());
        let third = at(&replies, 103 * SECOND);
        assert!((third.sum() - second.sum() - 100.0 * (2.0 + 1.0) / 101.0).abs() < 0.1, "{}", third.sum());
        assert_grown(&second, &third, "mixture");
        assert_eq!(third.count(), 103_000);
    }

    #[test]
    fn nothing_decreases_after_a_return_delay_that_began_unnoticed() {
        let (slices, mut replies) = (kernel::Histogram::EMPTY, kernel::Histogram::EMPTY);
        let mut prober = Prober::default();
        let observed =
            Observed { slices: &slices, replies: &replies, in_progress_ns: 0, wait_ns: 10 * SECOND };
        let before = prober.ask(observed);
        // The timeout had ended half a second before.
        add(&mut replies, SECOND / 2 + MILLISECOND);
        let wait_ns = 10 * SECOND + MILLISECOND;
        let after = prober.ask(Observed { slices: &slices, replies: &replies, in_progress_ns: 0, wait_ns });
        assert_grown(&before, &after, "late reply");
    }
}
