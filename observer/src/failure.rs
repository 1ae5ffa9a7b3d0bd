//! A failure that a person can act on: what happened, and what to do about it.

use std::fmt;

/// One line why, one line what to do; ends observer with exit code 1.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What happened.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) cure: String,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.into(), cure: cure.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  {}", self.what, self.cure)
    }
}

impl std::error::Error for Failure {}
