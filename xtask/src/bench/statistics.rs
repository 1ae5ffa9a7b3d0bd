//! Medians and quartiles: a few rounds on a busy machine have outliers, which means would follow.

use serde_json::Value;

/// Where the middle half of some figures lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) low: f64,
    pub(super) median: f64,
    pub(super) high: f64,
}

impl Spread {
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        Self { low: at(&figures, 1), median: at(&figures, 2), high: at(&figures, 3) }
    }

    /// Of a single figure.
    pub(super) fn at(figure: f64) -> Self {
        Self { low: figure, median: figure, high: figure }
    }

    /// Each as a part of this.
    pub(super) fn part_of(self, whole: f64) -> Self {
        let Self { low, median, high } = self;
        Self { low: low / whole, median: median / whole, high: high / whole }
    }

    /// Each without this much.
    pub(super) fn beyond(self, base: f64) -> Self {
        let Self { low, median, high } = self;
        Self { low: low - base, median: median - base, high: high - base }
    }

    /// One after the other, as far from each other as both may be.
    pub(super) fn and(self, other: Self) -> Self {
        let Self { low, median, high } = self;
        Self { low: low + other.low, median: median + other.median, high: high + other.high }
    }

    /// As it is kept in a file.
    pub(super) fn record(self) -> Value {
        let round = |figure: f64| (figure * 1000.0).round() / 1000.0;
        [self.low, self.median, self.high].map(round).into_iter().collect()
    }

    pub(super) fn kept(record: &Value) -> Option<Self> {
        let figure = |n: usize| record[n].as_f64();
        Some(Self { low: figure(0)?, median: figure(1)?, high: figure(2)? })
    }

    /// The median, with the quartiles in brackets unless they are the same.
    pub(super) fn show(self, digits: usize, unit: &str) -> String {
        let Self { low, median, high } = self;
        let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
        if low.to_bits() == high.to_bits() {
            return format!("{median:.digits$}{unit}");
        }
        format!("{median:.digits$}{unit} ({low:.digits$} to {high:.digits$})")
    }
}

pub(super) fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(figures).median
}

/// The least of sorted figures that so much of them is no more than.
pub(super) fn quantile<T: Copy>(sorted: &[T], part: f64) -> Option<T> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a length")]
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// A quartile of sorted figures, between two of them where it falls there.
fn at(sorted: &[f64], quartile: usize) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let (index, rest) = (last * quartile / 4, last * quartile % 4);
    let below = sorted[index];
    let above = sorted[(index + 1).min(last)];
    below + (above - below) * rest as f64 / 4.0
}

#[cfg(test)]
mod tests {
    use super::{Spread, quantile};

    #[test]
    fn a_quantile_is_one_of_the_figures() {
        let figures = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|part| quantile(&figures, part)), [1, 5, 10, 10].map(Some));
        assert_eq!(quantile::<u32>(&[], 0.5), None);
    }

    #[test]
    fn quartiles_lie_between_figures() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]), Spread { low: 1.75, median: 2.5, high: 3.25 });
        assert_eq!(Spread::of([7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
        assert!(Spread::of([]).median.is_nan());
        assert_eq!(Spread::of([1.0, 2.0, 3.0]).show(1, "ms"), "2.0 ms (1.5 to 2.5)");
        assert_eq!(Spread::at(2.0).show(0, ""), "2");
    }
}
