//! Stack frames in any language, and stack samples of a thread.

use std::fmt;

use serde::Serialize;

/// A function on a stack: running, or the caller of the next one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Frame {
    /// Name as in the source code; the address in hexadecimal if the name is unknown.
    pub(crate) function: String,
    /// Base name of the ELF file it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) module: Option<String>,
    /// Source file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// Line in that file, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) line: Option<u32>,
}

impl Frame {
    /// Code without a known name. The address is relative to the file, so that it is the same in all processes;
    /// outside of any file it is that in the process.
    pub(crate) fn unknown(address: u64, module: Option<String>) -> Self {
        Self { function: format!("{address:#x}"), module, file: None, line: None }
    }

    /// A method of an interpreted language that is written in C.
    pub(crate) fn in_c(name: impl Into<String>) -> Self {
        Self { function: name.into(), module: None, file: None, line: None }
    }

    /// Whether it is code outside of any file, without a known name.
    pub(crate) fn is_unnamed_jit(&self) -> bool {
        self.module.is_none() && self.file.is_none() && self.function.starts_with("0x")
    }
}

/// `function (folder/file:line)`, or `function [module]` where the source is unknown.
impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.function)?;
        match (&self.file, self.line, &self.module) {
            (Some(file), Some(line), _) => write!(f, " ({}:{line})", short(file)),
            (Some(file), None, _) => write!(f, " ({})", short(file)),
            (None, _, Some(module)) => write!(f, " [{module}]"),
            (None, _, None) => Ok(()),
        }
    }
}

/// The last two components of a path, because the same file name occurs in many projects.
fn short(path: &str) -> &str {
    let cut = path.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    &path[cut..]
}

/// The lock with which a runtime lets one thread at a time run its code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct RuntimeLock {
    /// Name of the lock: `GIL`.
    pub(crate) name: &'static str,
    /// The function that the thread with the lock was in, innermost of the user's own code; `None` if it is unknown.
    pub(crate) holder: Option<Frame>,
}

/// A sample of a thread's stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct StackSample {
    /// Functions of user space, innermost first.
    pub(crate) frames: Vec<Frame>,
    /// Functions of the kernel that they called, innermost first; empty if unknown.
    pub(crate) kernel: Vec<String>,
    /// Why some or all frames are missing; `None` if none is.
    pub(crate) missing: Option<String>,
    /// The lock of its runtime that the thread waited for; left out if it did not wait for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lock: Option<RuntimeLock>,
    /// Whether the thread was on a CPU.
    #[serde(skip)]
    pub(crate) is_on_cpu: bool,
}

impl StackSample {
    /// A sample without frames, and why.
    pub(crate) fn missing(why: impl Into<String>) -> Self {
        Self { missing: Some(why.into()), ..Self::default() }
    }

    /// The sample as evidence for a stall that was blocked most of the time. One taken on a CPU is marked as
    /// incomplete, because it shows nothing of the blocked time.
    pub(crate) fn for_blocked_stall(mut self) -> Self {
        if self.is_on_cpu && self.missing.is_none() {
            self.missing = Some("seen only on a CPU, and it was blocked most of the time".into());
        }
        self
    }

    /// Name of the lock of its runtime that the thread waited for.
    pub(super) fn lock_name(&self) -> Option<&'static str> {
        self.lock.as_ref().map(|lock| lock.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_shown_with_their_source_or_else_their_module() {
        let known = Frame {
            function: "handle".into(),
            module: Some("app".into()),
            file: Some("/srv/app/views/user.py".into()),
            line: Some(7),
        };
        assert_eq!(known.to_string(), "handle (views/user.py:7)");
        let no_line = Frame { line: None, file: Some("<string>".into()), ..known.clone() };
        assert_eq!(no_line.to_string(), "handle (<string>)");
        let no_file = Frame { file: None, ..known };
        assert_eq!(no_file.to_string(), "handle [app]");
        assert_eq!(Frame::unknown(0x1f0, Some("libc.so.6".into())).to_string(), "0x1f0 [libc.so.6]");
        assert_eq!(Frame::unknown(0x1f0, None).to_string(), "0x1f0");
    }
}
