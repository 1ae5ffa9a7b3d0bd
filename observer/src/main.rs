//! The binary `observer`. Everything is in the library, which the fuzz targets link as well.

use std::process::ExitCode;

fn main() -> ExitCode {
    observer::main()
}
