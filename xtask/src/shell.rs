//! Runs commands: silently unless they fail, or with output that is shown live and captured.
//! Error messages state the problem and, in a second line that begins with `by hand:`, what the user can do about it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use duct::{Expression, cmd};

use crate::workspace::root;

/// Output of a command that was shown live, and its exit code unless a signal ended it.
pub(crate) struct Shown {
    pub(crate) output: String,
    pub(crate) code: Option<i32>,
}

/// Runs a command and shows its output only if it fails.
pub(crate) fn run_quietly(what: &str, command: &Expression) -> Result<()> {
    let output = command
        .stdin_null()
        .stderr_to_stdout()
        .stdout_capture()
        .unchecked()
        .run()
        .with_context(|| format!("cannot start {what}"))?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        bail!("{what} failed ({})", output.status);
    }
    Ok(())
}

/// Returns the output of a command; `None` if it is missing or fails. Its standard error is discarded.
pub(crate) fn ask(command: &Expression) -> Option<String> {
    Some(command.stdin_null().stderr_null().read().ok()?.trim().to_owned())
}

/// Runs a command, shows its output line by line with the prefix, and captures it.
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

/// A command that is killed after a time limit. It stays in the foreground, so that Ctrl-C still reaches it.
pub(crate) fn limited<I>(limit: Duration, program: impl Into<OsString>, args: I) -> Expression
where
    I: IntoIterator<Item: Into<OsString>>,
{
    let seconds = limit.as_secs().to_string();
    let timeout: [OsString; 4] =
        ["--foreground".into(), "--kill-after=5".into(), seconds.into(), program.into()];
    cmd("timeout", timeout.into_iter().chain(args.into_iter().map(Into::into)))
}

/// Finds a program on PATH or in root's folders, which PATH may lack.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    which::which_in(program, Some(search_path()), root()).ok()
}

/// `PATH` with root's own folders.
pub(crate) fn search_path() -> String {
    std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin"
}

/// Whether this process may install packages and load eBPF programs.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
