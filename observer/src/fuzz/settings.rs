//! Targets for settings: profiles, configuration files, and the environment variables of OpenTelemetry, which are also
//! read from observed processes.

use std::collections::HashMap;

use crate::{
    config::Config,
    export::otlp::settings as otlp,
    failure::parse_toml,
    profiles::{Profile, Steps, Test, generic::OwnHook},
};

/// Maximum number of pointers that an expression may follow.
const POINTERS: usize = 8;

/// A profile, or a single expression of one.
pub(super) fn profile(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(path) = text.parse::<Steps>() {
        check(&path);
    }
    if let Ok(test) = text.parse::<Test>() {
        check(&test.path);
    }
    let _ = text.parse::<OwnHook>();
    let Ok(profile) = toml::from_str::<Profile>(text) else { return };
    for hook in &profile.hooks {
        assert!(hook.registers().iter().all(|&register| register < 16));
        let _ = (hook.place(), hook.versions(), hook.tells_later());
        assert!(!hook.is_in(None) || hook.is_in(Some("1.2.3")));
        hook.key.iter().for_each(check);
    }
}

/// A configuration file.
pub(super) fn config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match parse_toml::<Config>(text) {
        Ok(config) => assert!(config.settings_changed_from(&config).is_empty()),
        Err(why) => {
            let mut position = why.splitn(3, ':');
            let line: usize = position.next().unwrap().parse().expect("a line number");
            let column: usize = position.next().unwrap().parse().expect("a column number");
            assert!(line >= 1 && line <= text.split('\n').count().max(1));
            assert!(column >= 1 && column <= text.chars().count() + 1);
            assert!(!why.contains('\n'));
        }
    }
}

/// Asserts that an expression reads a valid register and does not have too many steps.
fn check(path: &Steps) {
    assert!(path.register < 16 && path.hops.len() <= 2 * POINTERS + 1);
}

/// Environment variables, one per line.
pub(super) fn environment(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let variables: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    otlp::parse(&|name| variables.get(name).map(|value| (*value).to_owned()));
}
