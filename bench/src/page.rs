//! A page of results: its text and tables, the values of goals, and the ratios that are compared with earlier runs.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::goals::Goal;
use crate::statistics::Spread;

#[derive(Default)]
pub(crate) struct Page {
    pub(crate) text: String,
    /// Measured values of goals, by the goal's key.
    pub(crate) goals: BTreeMap<&'static str, Spread>,
    /// Results relative to those of another tool or server in the same rounds, by name. Other than the results, they
    /// can be compared with runs of other days.
    pub(crate) ratios: BTreeMap<String, Spread>,
}

impl Page {
    pub(crate) fn text(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    pub(crate) fn table(&mut self, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
        let mut row = |cells: &str| writeln!(self.text, "| {cells} |").expect("memory can be written to");
        row(&head.join(" | "));
        row(&vec!["---"; head.len()].join(" | "));
        rows.into_iter().for_each(|cells| row(&cells.join(" | ")));
        self.text.push('\n');
    }

    /// Records the value of a goal, unless it is NaN.
    pub(crate) fn goal(&mut self, goal: &Goal, value: Spread) {
        if !value.median.is_nan() {
            self.goals.insert(goal.key, value);
        }
    }

    /// Records a ratio, unless it is NaN.
    pub(crate) fn ratio(&mut self, name: String, ratio: Spread) {
        if !ratio.median.is_nan() {
            self.ratios.insert(name, ratio);
        }
    }

    /// The text with a single newline at its end.
    pub(crate) fn finished(&self) -> String {
        self.text.trim_end().to_owned() + "\n"
    }
}

pub(crate) fn spread(values: impl Iterator<Item = f64>, digits: usize, unit: &str) -> String {
    Spread::of(values).show(digits, unit)
}
