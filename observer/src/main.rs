//! The program `observer`: nothing but the start of the library, which fuzz targets are made of as well.

use std::process::ExitCode;

fn main() -> ExitCode {
    observer::main()
}
