//! An error that the user can act on: what went wrong, and how to fix it.

use std::{fmt, io};

use nix::libc;
use serde::de::DeserializeOwned;

use crate::sanitize::clean;

/// One line for what went wrong, one for how to fix it. observer then exits with code 1.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What went wrong.
    pub(crate) what: String,
    /// How to fix it.
    pub(crate) cure: String,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.into(), cure: cure.into() }
    }

    /// Adds how to fix it to an error whose OS error code has a known fix. Other errors are returned unchanged.
    pub(crate) fn explained(error: anyhow::Error) -> anyhow::Error {
        let mut answers = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
        let cure = match answers.next() {
            Some(libc::EMFILE) => {
                "raise the limit of file descriptors, of which about 200 are needed, for example with `ulimit -n 1024`"
            }
            Some(libc::ENFILE) => {
                "the system-wide limit of open files is reached: raise /proc/sys/fs/file-max"
            }
            Some(libc::ENOMEM | libc::E2BIG) => "give observer more memory, or lower --capacity",
            Some(libc::EPERM | libc::EACCES) => {
                "the kernel denies it in spite of this user's rights; possible causes: the seccomp profile of a container or \
                 unit, kernel lockdown or, before Linux 5.11, the locked-memory limit (`ulimit -l unlimited`)"
            }
            _ => return error,
        };
        Self::new(format!("{error:#}"), cure).into()
    }
}

/// Parses TOML. An error reads `LINE:COLUMN: MESSAGE`.
pub(crate) fn parse_toml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("{line}:{column}: {}", error.message().replace('\n', ", "))
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  {}", clean(&self.what), clean(&self.cure))
    }
}

impl std::error::Error for Failure {}
