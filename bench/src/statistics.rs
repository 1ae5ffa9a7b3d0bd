//! Medians and quartiles. A few rounds on a busy machine have outliers, which would shift a mean.

use serde_json::Value;

/// The median and the quartiles of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Spread {
    /// NaN without values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self { low: at(&values, 1), median: at(&values, 2), high: at(&values, 3) }
    }

    /// Of a single value.
    pub(crate) fn at(value: f64) -> Self {
        Self { low: value, median: value, high: value }
    }

    pub(crate) fn divided_by(self, whole: f64) -> Self {
        let Self { low, median, high } = self;
        Self { low: low / whole, median: median / whole, high: high / whole }
    }

    pub(crate) fn minus(self, base: f64) -> Self {
        let Self { low, median, high } = self;
        Self { low: low - base, median: median - base, high: high - base }
    }

    /// The sum, with the largest spread that both can add up to.
    pub(crate) fn plus(self, other: Self) -> Self {
        let Self { low, median, high } = self;
        Self { low: low + other.low, median: median + other.median, high: high + other.high }
    }

    /// As JSON, rounded to three digits.
    pub(crate) fn to_json(self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        [self.low, self.median, self.high].map(round).into_iter().collect()
    }

    pub(crate) fn from_json(json: &Value) -> Option<Self> {
        let value = |n: usize| json[n].as_f64();
        Some(Self { low: value(0)?, median: value(1)?, high: value(2)? })
    }

    /// The median, with the quartiles in brackets unless they are equal.
    pub(crate) fn show(self, digits: usize, unit: &str) -> String {
        let Self { low, median, high } = self;
        let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
        if low.to_bits() == high.to_bits() {
            return format!("{median:.digits$}{unit}");
        }
        format!("{median:.digits$}{unit} ({low:.digits$} to {high:.digits$})")
    }
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).median
}

/// The smallest of sorted values that is not exceeded by a `part` of them, from 0 to 1.
pub(crate) fn quantile<T: Copy>(sorted: &[T], part: f64) -> Option<T> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a length")]
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// A quartile of sorted values, interpolated between two of them where necessary.
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
    fn a_quantile_is_one_of_the_values() {
        let values = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|part| quantile(&values, part)), [1, 5, 10, 10].map(Some));
        assert_eq!(quantile::<u32>(&[], 0.5), None);
    }

    #[test]
    fn quartiles_are_interpolated() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]), Spread { low: 1.75, median: 2.5, high: 3.25 });
        assert_eq!(Spread::of([7.0]), Spread { low: 7.0, median: 7.0, high: 7.0 });
        assert!(Spread::of([]).median.is_nan());
        assert_eq!(Spread::of([1.0, 2.0, 3.0]).show(1, "ms"), "2.0 ms (1.5 to 2.5)");
        assert_eq!(Spread::at(2.0).show(0, ""), "2");
    }
}
