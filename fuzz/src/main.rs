//! A fuzzer of one of observer's parsers, the one that the variable `FUZZ_TARGET` names.
#![no_main]

use std::{env, sync::LazyLock};

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = env::var("FUZZ_TARGET").expect("FUZZ_TARGET names the target");
    let found = observer::fuzz::TARGETS.iter().find(|(target, _)| *target == name);
    found.expect("a target that there is").1
});

fuzz_target!(|data: &[u8]| TARGET(data));
