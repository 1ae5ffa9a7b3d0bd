//! Checks reports against their published schema.

use std::sync::LazyLock;

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::Value;

/// The schema of a report. Here it must describe every field, which it does not demand of those who use it: fields may be added.
static SCHEMA: LazyLock<(Schemas, SchemaIndex)> = LazyLock::new(|| {
    let mut schema: Value = serde_json::from_str(include_str!("../../../docs/report.schema.json")).unwrap();
    close(&mut schema);
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.add_resource("report.schema.json", schema).unwrap();
    let index = compiler.compile("report.schema.json", &mut schemas).unwrap();
    (schemas, index)
});

/// Forbids fields that are not described.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            if object.contains_key("properties") {
                object.insert("additionalProperties".into(), false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

#[track_caller]
pub(crate) fn assert_valid(report: &Value) {
    let (schemas, index) = &*SCHEMA;
    if let Err(error) = schemas.validate(report, *index) {
        panic!("the report does not fit docs/report.schema.json: {error:#}");
    }
}
