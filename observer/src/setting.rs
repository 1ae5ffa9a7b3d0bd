//! Settings: arguments of the command line that the file of `--config` may have as well. Each is declared once, as an argument
//! under [`HEADING`]; the file, its errors and what a reload compares follow from that.

/// The heading in `--help`.
pub(crate) const HEADING: &str = "Settings (also in the file of --config)";
