//! The libFuzzer binary for all of observer's fuzz targets. The environment variable `FUZZ_TARGET` selects the target.
#![no_main]

use std::{env, sync::LazyLock};

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = env::var("FUZZ_TARGET").expect("FUZZ_TARGET must be the name of a target");
    let found = observer::fuzz::TARGETS.iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("FUZZ_TARGET: there is no target {name}")).1
});

fuzz_target!(|data: &[u8]| TARGET(data));
