//! A failure that a person can act on: what happened, and what to do about it.

use std::{fmt, io};

use nix::libc;
use serde::de::DeserializeOwned;

use crate::sanitize::clean;

/// One line why, one line what to do; ends observer with exit code 1.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What happened.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) cure: String,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.into(), cure: cure.into() }
    }

    /// The same error with what to do about it, where the kernel's answer tells.
    pub(crate) fn explained(error: anyhow::Error) -> anyhow::Error {
        let mut answers = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
        let cure = match answers.next() {
            Some(libc::EMFILE) => {
                "let it have more file descriptors, some 200, for example with `ulimit -n 1024`"
            }
            Some(libc::ENFILE) => "the machine has no file descriptors left: see /proc/sys/fs/file-max",
            Some(libc::ENOMEM | libc::E2BIG) => "give it more memory, or choose a smaller --capacity",
            Some(libc::EPERM | libc::EACCES) => {
                "something keeps even this user from it: the seccomp profile of a container or a unit, kernel lockdown, or, \
                 before Linux 5.11, the limit of locked memory (`ulimit -l unlimited`)"
            }
            _ => return error,
        };
        Self::new(format!("{error:#}"), cure).into()
    }
}

/// Understands a file's text. An error says `LINE:COLUMN: what is wrong`.
pub(crate) fn understand<T: DeserializeOwned>(text: &str) -> Result<T, String> {
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
