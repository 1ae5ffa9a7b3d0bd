//! The JSON report: a snapshot as one line, with the schema `observer.report/1`.

use std::io::Write;

use anyhow::Result;

use crate::model::snapshot::Snapshot;

/// Writes the report.
pub(crate) fn write(snapshot: &Snapshot, out: &mut impl Write) -> Result<()> {
    serde_json::to_writer(&mut *out, snapshot)?;
    writeln!(out)?;
    Ok(())
}
