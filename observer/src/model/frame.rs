//! Stacks: functions, whatever they were written in, and what was seen of a thread at one moment.

use std::fmt;

use serde::Serialize;

/// A function that was running, or had called another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(crate) struct Frame {
    /// Its name as programmers write it; an address in hexadecimal if nobody knows the name.
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
    /// Code without a name. The address is the one inside its file, so that it is the same in all processes;
    /// outside of any file it is the process's own.
    pub(crate) fn unknown(address: u64, module: Option<String>) -> Self {
        Self { function: format!("{address:#x}"), module, file: None, line: None }
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

/// The last two parts of a path: file names alone are alike in many projects.
fn short(path: &str) -> &str {
    let cut = path.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    &path[cut..]
}

/// What a thread was doing at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Look {
    /// Its functions, innermost first.
    pub(crate) frames: Vec<Frame>,
    /// The kernel's functions that they had called, innermost first, where those are known.
    pub(crate) kernel: Vec<String>,
    /// Why some or all are missing; `None` if none is.
    pub(crate) missing: Option<String>,
    /// Whether the thread ran at that moment.
    #[serde(skip)]
    pub(crate) is_on_cpu: bool,
}

impl Look {
    /// Nothing was seen, and why.
    pub(crate) fn missing(why: impl Into<String>) -> Self {
        Self { frames: Vec::new(), kernel: Vec::new(), missing: Some(why.into()), is_on_cpu: false }
    }

    /// What it says of a stall that was blocked most of the time: a look at the rest says nothing of that.
    pub(crate) fn of_blocked(mut self) -> Self {
        if self.is_on_cpu && self.missing.is_none() {
            self.missing = Some("seen only on a CPU, and it was blocked most of the time".into());
        }
        self
    }

    /// Whether another look saw the same functions, on whatever lines.
    pub(crate) fn is_alike(&self, other: &Self) -> bool {
        are_alike(&self.frames, &other.frames) && self.missing == other.missing
    }
}

/// Whether two stacks are the same functions; a loop is met in many of its lines.
fn are_alike(one: &[Frame], other: &[Frame]) -> bool {
    let parts = |frame: &Frame| (frame.function.clone(), frame.module.clone(), frame.file.clone());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| parts(a) == parts(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_the_source_else_the_module() {
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
