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

#[cfg(test)]
mod tests {
    use schemars::generate::SchemaSettings;

    use super::*;
    use crate::{generated::assert_current, model::snapshot::SCHEMA};

    #[test]
    fn generated_schema_describes_the_report() {
        let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
        let mut schema = generator.into_root_schema_for::<Snapshot>();
        schema.insert("title".into(), SCHEMA.into());
        assert_current("report.schema.json", &(serde_json::to_string_pretty(&schema).unwrap() + "\n"));
    }
}
