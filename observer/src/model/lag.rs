//! Lag: the delay that something due at a uniformly random instant meets, as an exact virtual prober would measure
//! it. Computed from what the kernel keeps anyway, for every instant, not from samples.

use observer_common::histogram::{self as kernel, BUCKETS, bucket_of, upper_bound};

use super::histogram::Histogram;

/// One virtual probe falls due in so many nanoseconds of wall time.
const PROBE_NS: u64 = 1_000_000;

/// The same in seconds: what each count of a lag's histogram stands for.
pub(crate) const PROBE_SECONDS: f64 = 0.001;

/// Lag from here on is noticed by people: the design's default threshold of a stall, in seconds.
pub(crate) const LATE: f64 = 0.050;

/// A reactor's figures that its lag follows from, each only growing.
#[derive(Clone, Copy)]
pub(crate) struct Observed<'a> {
    /// Lengths of finished slices.
    pub(crate) slices: &'a kernel::Histogram,
    /// How late finished waits returned, for those that blocked: after the timeout that ended them was over, or else
    /// after the thread was made runnable.
    pub(crate) replies: &'a kernel::Histogram,
    /// Age of the slice in progress, or of the reply that is due, in nanoseconds; 0 if there is neither.
    pub(crate) in_progress_ns: u64,
    /// Time in waits, replies and the wait in progress included, in nanoseconds.
    pub(crate) wait_ns: u64,
}

/// The virtual prober of one reactor. It is asked again and again, because waits are attributed bit by bit.
///
/// - **Slices and replies** are stretches during which nothing new is looked at. In one of length B, whatever falls due
///   waits for the end: for every x < B, x of those B nanoseconds meet a delay of at most x. So at a bucket's bound the
///   time that meets at most x is sum(min(B, x)), which counts and sums of buckets give exactly. What is in progress
///   counts with its present age, as if it ended now.
/// - **The rest of the waiting time** meets what waits' ends have met: each stretch between two questions is spread
///   over the replies that fell into it, or over all so far if none did. Before the first reply it meets no delay. A
///   reply has the wake-up in it and, where a timeout ended the wait, the timer's slack as well; each wait that blocked
///   has one delay, so that neither counts twice. What ends a wait tells what its loop waits for: a loop that runs on
///   timers meets their slack, one that runs on requests does not.
///
/// The sum is the integral of the delay over time. For a stretch of length B that is B^2 / 2, of which a bucket from l to
/// u knows the chord: between (B (l + u) - l u) / 2, the value used, less a 512th, and that less (u - l)^2 / 8. So the
/// sum is true to 0.2 %, and to a quarter of a microsecond for each instant of stretches below 1.024 us; only what is
/// longer than 68.7 s may be overrated, where there are several of it. The chord is continuous and linear: what is in
/// progress ends without a jump, and nothing ever decreases.
#[derive(Clone, Debug)]
pub(crate) struct Prober {
    /// Waiting time by the bucket of the delay it meets, in nanoseconds.
    waiting_ns: Vec<u64>,
    /// Integral of the delay over that time, in square nanoseconds.
    waiting_sum: u128,
    /// Waiting time attributed so far, in nanoseconds.
    attributed_ns: u64,
    /// Replies up to the last question.
    replies: kernel::Histogram,
    /// The last answer: probes that met at most each bucket's bound, and the sum of all delays in nanoseconds.
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
    /// The lag up to now: a count for each millisecond observed, and the sum of what those probes met.
    pub(crate) fn ask(&mut self, observed: Observed<'_>) -> Histogram {
        let stretches = stretches(&observed);
        let replied_ns = total(observed.replies.buckets.iter().map(|bucket| bucket.sum_ns));
        self.attribute(observed.wait_ns.saturating_sub(replied_ns), observed.replies);

        let (cumulative, sum_ns) = &mut self.last;
        let mut longer = total(stretches.buckets.iter().map(|bucket| bucket.count));
        let (mut shorter_ns, mut waiting_ns, mut least) = (0_u64, 0_u64, 0);
        for (bucket, probes) in cumulative.iter_mut().enumerate() {
            longer = longer.saturating_sub(stretches.buckets[bucket].count);
            shorter_ns = shorter_ns.saturating_add(stretches.buckets[bucket].sum_ns);
            waiting_ns = waiting_ns.saturating_add(self.waiting_ns[bucket]);
            // Nothing is longer than the last bucket's bound, so it needs none.
            let of_longer = upper_bound(bucket).map_or(0, |bound| longer.saturating_mul(bound));
            // An entry that was read while it changed may be ahead for once, or a bucket of it behind the one before, but a
            // count cannot be taken back.
            let delayed_ns = total([shorter_ns, of_longer, waiting_ns].into_iter());
            *probes = (*probes).max(delayed_ns / PROBE_NS).max(least);
            least = *probes;
        }
        let sum = integral(&stretches).saturating_add(self.waiting_sum) / u128::from(PROBE_NS);
        *sum_ns = (*sum_ns).max(u64::try_from(sum).unwrap_or(u64::MAX));

        let below = std::iter::once(&0).chain(cumulative.iter());
        Histogram {
            counts: cumulative.iter().zip(below).map(|(up_to, below)| up_to - below).collect(),
            sum_ns: *sum_ns,
            min_ns: 0,
            max_ns: stretches.max_ns,
        }
    }

    /// Spreads waiting time that is new over the replies that are new.
    fn attribute(&mut self, wait_ns: u64, replies: &kernel::Histogram) {
        // A reply that began unnoticed may have been taken for waiting until it ended: that much is there already.
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
        // What does not divide, or all of it before the first reply.
        self.waiting_ns[0] = self.waiting_ns[0].saturating_add(rest_ns);
        self.waiting_sum = self.waiting_sum.saturating_add(share(sum_ns));
    }
}

/// All together; what is too large stays so.
fn total(figures: impl Iterator<Item = u64>) -> u64 {
    figures.fold(0, u64::saturating_add)
}

/// Everything that kept the loop from looking, what is in progress included.
fn stretches(observed: &Observed<'_>) -> kernel::Histogram {
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

/// The integral of the delay over all stretches, in square nanoseconds: see [`Prober`].
fn integral(stretches: &kernel::Histogram) -> u128 {
    let twice: u128 = (0..BUCKETS)
        .map(|index| {
            let bucket = &stretches.buckets[index];
            let lower = u128::from(index.checked_sub(1).and_then(upper_bound).unwrap_or(0));
            let upper = u128::from(upper_bound(index).unwrap_or(stretches.max_ns));
            // Both are read from a value that may change meanwhile.
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

    /// What a brute-force prober says of these stretches: for each bound how much time meets no more, and the integral.
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

    /// Lengths spread evenly over the orders of magnitude up to a bound in bits, reproducible.
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
    fn sums_are_true_to_a_five_hundredth() {
        for seed in 0..200 {
            // All of one bucket, some, and many orders of magnitude: above the first bucket, below the last.
            for bits in [18, 25, 36] {
                let slices: Vec<u64> = lengths(seed, 40, bits).into_iter().map(|ns| ns.max(1025)).collect();
                let (_, exact) = brute_force(&slices);
                let computed = integral(&histogram(slices)) as f64;
                assert!((computed / exact - 1.0).abs() <= 0.002, "seed {seed}: {computed} for {exact}");
            }
        }
    }

    #[test]
    fn sums_of_the_shortest_are_true_to_a_quarter_of_a_microsecond() {
        for seed in 0..50 {
            let slices = lengths(seed, 40, 10);
            let total: u64 = slices.iter().sum();
            let (_, exact) = brute_force(&slices);
            let computed = integral(&histogram(slices)) as f64;
            assert!((computed - exact).abs() <= 512.0 * total as f64, "seed {seed}: {computed} for {exact}");
        }
    }

    #[test]
    fn quantiles_are_those_of_the_instants() {
        // Half of all instants lie in 100 ms slices and meet up to 100 ms, the others next to nothing.
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

    /// By the formula itself, not by what `Prober` remembers: each question goes to a new one.
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
    fn waiting_meets_the_replies_of_its_time() {
        let slices = kernel::Histogram::EMPTY;
        let mut prober = Prober::default();
        let mut replies = kernel::Histogram::EMPTY;
        let mut at = |replies: &kernel::Histogram, wait_ns| {
            prober.ask(Observed { slices: &slices, replies, in_progress_ns: 0, wait_ns })
        };
        // Nothing is known yet: no delay.
        let idle = at(&replies, SECOND);
        assert_eq!((idle.count(), idle.sum_ns), (1000, 0));
        // One reply of 2 ms: of the second that ended with it all but those 2 ms met 2 ms.
        add(&mut replies, 2 * MILLISECOND);
        let first = at(&replies, 2 * SECOND);
        assert_eq!(first.count(), 2000);
        assert_grown(&idle, &first, "first reply");
        assert!((first.sum() - 0.998 * 2.0).abs() < 0.01, "{}", first.sum());
        // A hundred replies of 10 us in the next; then none, which meets the mixture.
        (0..100).for_each(|_| add(&mut replies, 10_000));
        let second = at(&replies, 3 * SECOND);
        assert!((second.sum() - first.sum() - 0.01).abs() < 0.001, "{}", second.sum());
        let third = at(&replies, 103 * SECOND);
        assert!((third.sum() - second.sum() - 100.0 * (2.0 + 1.0) / 101.0).abs() < 0.1, "{}", third.sum());
        assert_grown(&second, &third, "mixture");
        assert_eq!(third.count(), 103_000);
    }

    #[test]
    fn a_reply_that_began_unnoticed_is_not_taken_back() {
        let (slices, mut replies) = (kernel::Histogram::EMPTY, kernel::Histogram::EMPTY);
        let mut prober = Prober::default();
        let observed =
            Observed { slices: &slices, replies: &replies, in_progress_ns: 0, wait_ns: 10 * SECOND };
        let before = prober.ask(observed);
        // The timeout had been over for half a second then.
        add(&mut replies, SECOND / 2 + MILLISECOND);
        let wait_ns = 10 * SECOND + MILLISECOND;
        let after = prober.ask(Observed { slices: &slices, replies: &replies, in_progress_ns: 0, wait_ns });
        assert_grown(&before, &after, "late reply");
    }
}
