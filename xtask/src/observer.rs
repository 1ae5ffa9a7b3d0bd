//! Builds the static observer binary, and runs it as root for the demo.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Error, Result, anyhow};

use crate::shell::{find, is_root};
use crate::{toolchain, workspace};

/// Builds observer, after setting up the toolchain.
pub(crate) fn build() -> Result<PathBuf> {
    toolchain::setup()?;
    let built = workspace::build("build", &["--package", "observer"])?;
    let binary = built.into_iter().find(|executable| executable.name == "observer");
    Ok(binary.context("package observer has no binary `observer`")?.path)
}

pub(crate) fn build_and_print() -> Result<()> {
    let binary = build()?;
    let mebibytes = fs::metadata(&binary)?.len() >> 20;
    println!("{} ({mebibytes} MiB)", binary.display());
    Ok(())
}

/// Replaces this process with the demo, so that the demo owns the terminal and its signals. Returns only on failure.
pub(crate) fn demo(args: &[String]) -> Error {
    let binary = match build() {
        Ok(binary) => binary,
        Err(error) => return error,
    };
    let mut command = if is_root() {
        Command::new(&binary)
    } else if let Some(sudo) = find("sudo") {
        let mut command = Command::new(sudo);
        command.arg(&binary);
        command
    } else {
        return anyhow!(
            "the demo loads eBPF programs, which requires root\nby hand: run this command as root"
        );
    };
    let error = command.arg("demo").args(args).exec();
    anyhow!("cannot run {}: {error}", binary.display())
}
