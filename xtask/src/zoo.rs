//! `xtask test --zoo`: installs servers of many kinds, runs the tests of `observer/tests/zoo.rs`, and writes what they saw to
//! `docs/servers.md`.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;

use crate::packages;
use crate::suite::{self, Machine, Options};
use crate::workspace::root;

/// Folder that the tests write the row of each server to, if it exists.
const ROWS: &str = "target/zoo";

const HEAD: &str = "# Servers

What observer shows of servers as Debian packages them, without any option. Each was tested by `cargo xtask test --zoo`, which writes
this page: with 40 connections and nothing planted, each connection was counted and nothing was reported as late or dropped. Then it
was blocked 20 times for 150 ms, by a handler that blocks or by a signal that stops all of its processes.

Servers whose handlers block no event loop (threads, processes, green threads) show lateness in the accept queue only. How a server waits can depend on its
configuration.

| server | processes | lag | planted stalls seen |
| --- | --- | --- | --- |
";

pub(crate) fn run() -> Result<ExitCode> {
    packages::install(&packages::for_zoo())?;
    let folder = root().join(ROWS);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let code = suite::run(&Options {
        full: false,
        soak: None,
        machines: vec![Machine::Host],
        names: vec!["zoo::".to_owned()],
    });
    let mut rows = Vec::new();
    for row in fs::read_dir(&folder)? {
        rows.push(fs::read_to_string(row?.path())?);
    }
    fs::remove_dir_all(&folder)?;
    rows.sort();
    let all = fs::read_to_string(root().join("observer/tests/servers/zoo/zoo.toml"))?;
    let is_whole = rows.len() == all.matches("[[server]]").count();
    if is_whole {
        fs::write(root().join("docs/servers.md"), HEAD.to_owned() + &rows.concat())?;
    } else {
        eprintln!("docs/servers.md is left as it is, because not every server was tested to the end");
    }
    Ok(code)
}
