//! A page of figures: text that says how they came about, tables, and those of them that there are goals for.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::goals::Goal;
use super::statistics::Spread;

#[derive(Default)]
pub(super) struct Page {
    pub(super) text: String,
    /// By the goal's key.
    pub(super) figures: BTreeMap<&'static str, Spread>,
    /// What can be compared with runs of other days, by name: figures as a part of what ran beside them.
    pub(super) ratios: BTreeMap<String, Spread>,
}

impl Page {
    pub(super) fn text(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    pub(super) fn table(&mut self, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
        let mut row = |cells: &str| writeln!(self.text, "| {cells} |").expect("memory can be written to");
        row(&head.join(" | "));
        row(&vec!["---"; head.len()].join(" | "));
        rows.into_iter().for_each(|cells| row(&cells.join(" | ")));
        self.text.push('\n');
    }

    /// Notes a figure that there is a goal for, unless there is none.
    pub(super) fn figure(&mut self, goal: &Goal, figure: Spread) {
        if !figure.median.is_nan() {
            self.figures.insert(goal.key, figure);
        }
    }

    /// Notes a ratio, unless there is none.
    pub(super) fn ratio(&mut self, name: String, ratio: Spread) {
        if !ratio.median.is_nan() {
            self.ratios.insert(name, ratio);
        }
    }

    /// The text as a file's: it ends with one line end.
    pub(super) fn finished(&self) -> String {
        self.text.trim_end().to_owned() + "\n"
    }
}

pub(super) fn spread(figures: impl Iterator<Item = f64>, digits: usize, unit: &str) -> String {
    Spread::of(figures).show(digits, unit)
}
