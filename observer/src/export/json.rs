//! The report for programs: one JSON object, `observer.report/1`, on a line of its own.

use std::io::Write;

use anyhow::Result;

use crate::model::snapshot::Snapshot;

/// Writes the report.
pub(crate) fn write(snapshot: &Snapshot, out: &mut impl Write) -> Result<()> {
    serde_json::to_writer(&mut *out, snapshot)?;
    writeln!(out)?;
    Ok(())
}
