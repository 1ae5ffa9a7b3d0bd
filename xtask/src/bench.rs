//! `xtask bench`: builds and installs what the benchmark needs, and runs it. The benchmark is the package `bench`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Error, Result, bail};

use crate::shell::{is_root, search_path};
use crate::workspace::{build, root, target_path};
use crate::{observer, packages};

/// The parts that can be measured, which are those of `bench/src/part.rs`.
pub(crate) const PARTS: [&str; 5] = ["programs", "bcc", "servers", "growth", "start"];

/// Replaces this process with the benchmark, which handles the signals of the terminal. Returns only on failure.
pub(crate) fn run(parts: &[String], quick: bool) -> Error {
    match command(parts, quick) {
        Ok(mut command) => Error::new(command.exec()).context("the benchmark cannot be run"),
        Err(error) => error,
    }
}

fn command(parts: &[String], quick: bool) -> Result<Command> {
    if !is_root() {
        bail!("eBPF programs can only be measured as root\nby hand: run this command as root");
    }
    let observer = observer::build()?;
    let examples = ["--package", "observer", "--example", "crowd", "--example", "ring_acceptor"];
    let [crowd, ring_acceptor] = built(&examples, ["crowd", "ring_acceptor"])?;
    let [bench] = built(&["--package", "bench"], ["bench"])?;
    packages::install(&packages::for_bench())?;

    let mut command = Command::new(bench);
    command.args(parts).args(quick.then_some("--quick"));
    command.arg("--observer").arg(observer).arg("--crowd").arg(crowd);
    command.arg("--ring-acceptor").arg(ring_acceptor);
    // Servers keep their files in TMPDIR. What a killed benchmark leaves behind is then in `target`, not in /tmp.
    command.current_dir(root()).env("PATH", search_path()).env("TMPDIR", target_path(""));
    Ok(command)
}

/// Builds, and returns the paths of the executables with these names.
fn built<const N: usize>(args: &[&str], names: [&str; N]) -> Result<[PathBuf; N]> {
    let executables = build("build", args)?;
    let path = |name: &str| {
        let found = executables.iter().find(|executable| executable.name == name);
        Some(found?.path.clone())
    };
    let paths: Option<Vec<_>> = names.iter().map(|name| path(name)).collect();
    paths
        .and_then(|paths| paths.try_into().ok())
        .with_context(|| format!("cargo built no {}", names.join(" or ")))
}
