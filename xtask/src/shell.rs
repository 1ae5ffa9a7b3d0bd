//! How commands are run: silently unless they fail, or shown live while a copy is kept.
//! Errors say what happened and, in a second line that begins `by hand:`, what a person can do about it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use duct::{Expression, cmd};

use crate::workspace::root;

/// What a command that was shown live printed, and its exit code unless a signal ended it.
pub(crate) struct Shown {
    pub(crate) output: String,
    pub(crate) code: Option<i32>,
}

/// Runs a command whose output only matters when it fails.
pub(crate) fn quietly(what: &str, command: &Expression) -> Result<()> {
    let output = command
        .stdin_null()
        .stderr_to_stdout()
        .stdout_capture()
        .unchecked()
        .run()
        .with_context(|| format!("{what} could not be started"))?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        bail!("{what} failed ({})", output.status);
    }
    Ok(())
}

/// Reads what a command prints; `None` if it is missing or fails, whatever it complains about.
pub(crate) fn ask(command: &Expression) -> Option<String> {
    Some(command.stdin_null().stderr_null().read().ok()?.trim().to_owned())
}

/// Runs a command with its output shown as it comes, line by line behind a prefix if there is one, and kept as well.
pub(crate) fn show(command: &Expression, prefix: &str) -> Result<Shown> {
    let mut reader = BufReader::new(command.stdin_null().stderr_to_stdout().unchecked().reader()?);
    let mut output = Vec::new();
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(prefix.as_bytes())?;
        stdout.write_all(&line)?;
        output.append(&mut line);
    }
    let code = reader.get_ref().try_wait()?.and_then(|finished| finished.status.code());
    Ok(Shown { output: String::from_utf8_lossy(&output).into_owned(), code })
}

/// A command that is killed when it takes too long. In the foreground, so that Ctrl-C still reaches it.
pub(crate) fn limited<I>(limit: Duration, program: impl Into<OsString>, args: I) -> Expression
where
    I: IntoIterator<Item: Into<OsString>>,
{
    let seconds = limit.as_secs().to_string();
    let timeout: [OsString; 4] =
        ["--foreground".into(), "--kill-after=5".into(), seconds.into(), program.into()];
    cmd("timeout", timeout.into_iter().chain(args.into_iter().map(Into::into)))
}

/// Where a program is, if it is anywhere; root's own folders count even when PATH lacks them.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    which::which_in(program, Some(path), root()).ok()
}

/// Whether this process may install packages and load eBPF programs.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
