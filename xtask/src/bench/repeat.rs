//! What a run of another day has told of the same: figures of machines differ by the day, but ratios to what ran beside
//! them in the same rounds are to be the same.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::page::Page;
use super::statistics::Spread;

const TEXT: &str = "Ratios of this page in both runs. They are *the same* where the middle halves of their rounds meet, or their medians
differ by no more than a tenth: rounds of one run are closer to each other than days are. Where observer has changed in
between, so may its ratios; those of what nobody changed tell how far such runs can be trusted.
";

/// How far medians of two days may differ, as a part of the first.
const NEAR: f64 = 0.1;

const HEAD: [&str; 4] = ["ratio", "then", "now", "the same"];

/// The ratios of a run, with whose they are and when they were taken.
pub(super) struct Run {
    pub(super) date: String,
    pub(super) observer: String,
    pub(super) ratios: BTreeMap<String, Spread>,
}

impl Run {
    /// The last run of another day that a part's record knows, itself included, if it has ratios.
    pub(super) fn before(record: &Value, date: &str) -> Option<Self> {
        let day = |date: &str| date.split(' ').next().map(str::to_owned);
        let run = Self::from(record)?;
        let run = if day(&run.date) == day(date) { Self::from(&record["before"])? } else { run };
        (!run.ratios.is_empty()).then_some(run)
    }

    pub(super) fn from(record: &Value) -> Option<Self> {
        let ratios = record["ratios"].as_object()?;
        let ratios = ratios.iter().filter_map(|(name, kept)| Some((name.clone(), Spread::kept(kept)?)));
        let text = |key: &str| record[key].as_str().map(str::to_owned);
        Some(Self { date: text("date")?, observer: text("observer")?, ratios: ratios.collect() })
    }

    pub(super) fn record(&self) -> Value {
        let ratios: BTreeMap<_, _> = self.ratios.iter().map(|(name, ratio)| (name, ratio.record())).collect();
        json!({ "date": self.date, "observer": self.observer, "ratios": ratios })
    }

    /// Of the ratios that both runs have: how many are the same, and how many there are.
    pub(super) fn agreement(&self, now: &Self) -> (usize, usize) {
        let both = || self.both(now);
        (both().filter(|(_, then, now)| are_same(*then, *now)).count(), both().count())
    }

    fn both<'a>(&'a self, now: &'a Self) -> impl Iterator<Item = (&'a String, Spread, Spread)> {
        self.ratios.iter().filter_map(|(name, then)| Some((name, *then, *now.ratios.get(name)?)))
    }

    pub(super) fn table(&self, now: &Self, page: &mut Page) {
        page.text(&format!("## Beside the run of {}, of {}\n\n{TEXT}", self.date, self.observer));
        let rows = self.both(now).map(|(name, then, now)| {
            let same = if are_same(then, now) { "yes" } else { "no" };
            vec![name.clone(), then.show(2, ""), now.show(2, ""), same.to_owned()]
        });
        page.table(&HEAD, rows);
    }
}

fn are_same(then: Spread, now: Spread) -> bool {
    let meet = then.low <= now.high && now.low <= then.high;
    meet || (now.median - then.median).abs() <= then.median.abs() * NEAR
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
        let mut record = run("2026-11-24 10:00 UTC", 1.0, 1.25).record();
        let before = Run::before(&record, "2026-11-26 08:00 UTC").unwrap();
        assert_eq!(before.agreement(&run("", 1.2, 1.5)), (1, 1));
        assert_eq!(before.agreement(&run("", 1.26, 1.28)), (0, 1));
        assert!(Run::before(&record, "2026-11-24 23:00 UTC").is_none());
        // One more run of the same day is compared with what the first was.
        record["before"] = run("2026-11-20 10:00 UTC", 1.0, 1.25).record();
        assert_eq!(Run::before(&record, "2026-11-24 23:00 UTC").unwrap().date, "2026-11-20 10:00 UTC");
        record["before"]["ratios"] = serde_json::json!({});
        assert!(Run::before(&record, "2026-11-24 23:00 UTC").is_none());
    }
}
