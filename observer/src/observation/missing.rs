//! Sources of metrics that are unavailable, each with its reason.

use crate::model::snapshot::Missing;

/// Maximum number of entries; a longer list would not help.
const LIMIT: usize = 1024;

/// Unavailable sources of metrics, each once.
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
