//! One thing that was looked at before anything is observed: whether it is as it should be, and if not, why and what helps.

use std::io::{self, Write};

use crate::sanitize::Lines;

/// Column in which purposes begin.
const PURPOSE: usize = 30;

/// A yes or a no.
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) name: String,
    /// What it is for, or what goes unseen without it.
    pub(crate) purpose: String,
    /// Whether nothing goes without it.
    pub(crate) required: bool,
    /// An error says why not.
    pub(crate) outcome: Result<(), String>,
    /// What to do if it is not.
    pub(crate) cure: String,
}

impl Finding {
    /// Whether that means that observer cannot do its main job.
    pub(crate) fn prevents(&self) -> bool {
        self.required && self.outcome.is_err()
    }

    /// Writes it for people: a line, and two more for a no.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let verdict = match (&self.outcome, self.required) {
            (Ok(()), _) => "yes",
            (Err(_), false) => "no",
            (Err(_), true) => "NO",
        };
        let mut out = Lines(out);
        writeln!(out, "{verdict:<4} {:<PURPOSE$} {}", self.name, self.purpose)?;
        if let Err(reason) = &self.outcome {
            writeln!(out, "{:<4} {:<PURPOSE$} reason: {reason}", "", "")?;
            writeln!(out, "{:<4} {:<PURPOSE$} cure: {}", "", "", self.cure)?;
        }
        Ok(())
    }
}
