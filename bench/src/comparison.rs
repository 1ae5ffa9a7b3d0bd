//! Compares the ratios of a part with those of its last run on another day. Absolute results differ from day to day
//! with the machine; ratios between results of the same rounds should not.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::page::Page;
use crate::statistics::Spread;

const TEXT: &str = "\
This table compares the ratios of both runs. Two ratios *agree* if their interquartile ranges overlap, or if their
medians differ by at most 10 %: the rounds of one run differ less than two days do. Ratios may also change because
observer has changed in between. Ratios of unchanged code show how reproducible the results are.
";

/// The largest difference between medians that agree, relative to the first.
const TOLERANCE: f64 = 0.1;

const HEAD: [&str; 4] = ["ratio", "earlier run", "this run", "agree"];

/// The ratios of a run.
pub(crate) struct Run {
    pub(crate) date: String,
    pub(crate) observer: String,
    pub(crate) ratios: BTreeMap<String, Spread>,
}

impl Run {
    /// The last run before the day of `date` in a part's record, which may be the recorded run or the one before it.
    /// None if it has no ratios.
    pub(crate) fn before(record: &Value, date: &str) -> Option<Self> {
        let day = |date: &str| date.split(' ').next().map(str::to_owned);
        let run = Self::from_json(record)?;
        let run = if day(&run.date) == day(date) { Self::from_json(&record["before"])? } else { run };
        (!run.ratios.is_empty()).then_some(run)
    }

    pub(crate) fn from_json(record: &Value) -> Option<Self> {
        let ratios = record["ratios"].as_object()?;
        let ratios =
            ratios.iter().filter_map(|(name, ratio)| Some((name.clone(), Spread::from_json(ratio)?)));
        let text = |key: &str| record[key].as_str().map(str::to_owned);
        Some(Self { date: text("date")?, observer: text("observer")?, ratios: ratios.collect() })
    }

    pub(crate) fn to_json(&self) -> Value {
        let ratios: BTreeMap<_, _> =
            self.ratios.iter().map(|(name, ratio)| (name, ratio.to_json())).collect();
        json!({ "date": self.date, "observer": self.observer, "ratios": ratios })
    }

    /// How many ratios of both runs agree, and how many ratios both runs have.
    pub(crate) fn agreement(&self, now: &Self) -> (usize, usize) {
        let both = || self.both(now);
        (both().filter(|(_, then, now)| agree(*then, *now)).count(), both().count())
    }

    fn both<'a>(&'a self, now: &'a Self) -> impl Iterator<Item = (&'a String, Spread, Spread)> {
        self.ratios.iter().filter_map(|(name, then)| Some((name, *then, *now.ratios.get(name)?)))
    }

    pub(crate) fn table(&self, now: &Self, page: &mut Page) {
        page.text(&format!("## Compared with the run of {}, {}\n\n{TEXT}", self.date, self.observer));
        let rows = self.both(now).map(|(name, then, now)| {
            let agreement = if agree(then, now) { "yes" } else { "no" };
            vec![name.clone(), then.show(2, ""), now.show(2, ""), agreement.to_owned()]
        });
        page.table(&HEAD, rows);
    }
}

fn agree(then: Spread, now: Spread) -> bool {
    let overlap = then.low <= now.high && now.low <= then.high;
    overlap || (now.median - then.median).abs() <= then.median.abs() * TOLERANCE
}

#[cfg(test)]
mod tests {
    use super::{Run, Spread};

    fn run(date: &str, low: f64, high: f64) -> Run {
        let spread = Spread { low, median: f64::midpoint(low, high), high };
        Run { date: date.into(), observer: "o".into(), ratios: [("a".to_owned(), spread)].into() }
    }

    #[test]
    fn runs_are_compared_with_those_of_other_days() {
        let mut record = run("2026-11-24 10:00 UTC", 1.0, 1.25).to_json();
        let before = Run::before(&record, "2026-11-26 08:00 UTC").unwrap();
        assert_eq!(before.agreement(&run("", 1.2, 1.5)), (1, 1));
        assert_eq!(before.agreement(&run("", 1.26, 1.28)), (0, 1));
        assert!(Run::before(&record, "2026-11-24 23:00 UTC").is_none());
        // A second run of the same day is compared with the same run as the first.
        record["before"] = run("2026-11-20 10:00 UTC", 1.0, 1.25).to_json();
        assert_eq!(Run::before(&record, "2026-11-24 23:00 UTC").unwrap().date, "2026-11-20 10:00 UTC");
        record["before"]["ratios"] = serde_json::json!({});
        assert!(Run::before(&record, "2026-11-24 23:00 UTC").is_none());
    }
}
