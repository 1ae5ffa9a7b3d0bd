//! What goes unseen here, each with its reason.

use crate::model::snapshot::Missing;

/// Reasons that are kept; more are no help to anybody.
const LIMIT: usize = 1024;

/// Sources of metrics that are not available here, each once.
#[derive(Default)]
pub(super) struct MissingSources(Vec<Missing>);

impl MissingSources {
    /// Adds a source, and logs it the first time.
    pub(super) fn add(&mut self, source: impl Into<String>, reason: impl Into<String>) {
        self.extend([Missing { source: source.into(), reason: reason.into() }]);
    }

    /// Adds several.
    pub(super) fn extend(&mut self, missing: impl IntoIterator<Item = Missing>) {
        for missing in missing {
            if self.0.len() < LIMIT && !self.0.contains(&missing) {
                log::warn!("not seen here: {} ({})", missing.source, missing.reason);
                self.0.push(missing);
            }
        }
    }

    /// All of them.
    pub(super) fn all(&self) -> &[Missing] {
        &self.0
    }
}
