//! The result of one check before the start: whether a requirement is met and, if not, why and how to fix it.

use std::io::{self, Write};

use crate::sanitize::Lines;

/// Width of the column of names.
const NAME_WIDTH: usize = 30;

/// The result of one check.
pub(crate) struct CheckResult {
    /// What was checked.
    pub(crate) name: String,
    /// What it is needed for, or what is not measured without it.
    pub(crate) purpose: String,
    /// Whether observer cannot run without it.
    pub(crate) required: bool,
    /// Whether the requirement is met; the error states why not.
    pub(crate) outcome: Result<(), String>,
    /// How to meet the requirement.
    pub(crate) cure: String,
}

impl CheckResult {
    /// Whether observer cannot run because of this check.
    pub(crate) fn prevents(&self) -> bool {
        self.required && self.outcome.is_err()
    }

    /// Writes the result as text: one line, and two more if the check failed.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let verdict = match (&self.outcome, self.required) {
            (Ok(()), _) => "yes",
            (Err(_), false) => "no",
            (Err(_), true) => "NO",
        };
        let mut out = Lines(out);
        writeln!(out, "{verdict:<4} {:<NAME_WIDTH$} {}", self.name, self.purpose)?;
        if let Err(reason) = &self.outcome {
            writeln!(out, "{:<4} {:<NAME_WIDTH$} reason: {reason}", "", "")?;
            writeln!(out, "{:<4} {:<NAME_WIDTH$} cure: {}", "", "", self.cure)?;
        }
        Ok(())
    }
}
