//! Settings: command-line arguments that the file of `--config` may have as well. Each is declared once, as an
//! argument under [`HEADING`]; the fields of the file, its errors and the comparison at a reload derive from that.

/// Heading of the settings in `--help`.
pub(crate) const HEADING: &str = "Settings (also in the file of --config)";
