//! Memory of an observed process, as it is now.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use anyhow::{Context as _, Result, ensure};

/// Longest string without a terminator that is taken for one, in bytes.
const STRING_MAX: usize = 4096;

/// Something that knows what a process has at an address.
pub(crate) trait Memory {
    /// Fills all of `into` from an address on, or fails.
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()>;

    /// A word, which may be a pointer.
    fn word(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    }
}

/// The whole address space of a process, at this moment. Stays with the program it was opened for: after an exec
/// or exit nothing can be read, even if another process gets the same id.
pub(crate) struct Live(File);

impl Live {
    /// Opens a process's memory, which takes the right to trace it.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/mem")).map(Self)
    }

    /// Bytes that must be there; `what` names them in the error.
    pub(super) fn bytes(&self, address: u64, length: usize, what: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read(address, &mut bytes).with_context(|| format!("no {what} at {address:#x}"))?;
        Ok(bytes)
    }

    /// A word that must be there.
    pub(super) fn field(&self, object: u64, offset: u64, what: &str) -> Result<u64> {
        let word = object.checked_add(offset).and_then(|address| self.word(address));
        word.with_context(|| format!("no {what} at {object:#x}+{offset:#x}"))
    }

    /// A C string that must be there and be one.
    pub(crate) fn c_string(&self, address: u64, what: &str) -> Result<String> {
        let mut bytes = Vec::new();
        while bytes.len() < STRING_MAX {
            // To the end of a cache line, so that no read crosses into a page that may be missing.
            let start = address.wrapping_add(bytes.len() as u64);
            let chunk = 64 - usize::try_from(start % 64)?;
            let more = self.bytes(start, chunk, what)?;
            let end = more.iter().position(|&byte| byte == 0);
            bytes.extend_from_slice(&more[..end.unwrap_or(chunk)]);
            if end.is_some() {
                return text(bytes, what);
            }
        }
        anyhow::bail!("{what} at {address:#x} has no end")
    }
}

#[cfg(any(test, feature = "fuzz"))]
impl Live {
    /// A process that has a file's content in its memory from address 0 on, and nothing else.
    pub(crate) const fn of_file(file: File) -> Self {
        Self(file)
    }
}

impl Memory for Live {
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        self.0.read_exact_at(into, address).ok()
    }
}

/// Part of a stack, copied at one moment.
pub(crate) struct Copied<'a> {
    /// Where the copy begins in the process: its stack pointer.
    pub(crate) start: u64,
    /// What was there.
    pub(crate) bytes: &'a [u8],
}

impl Memory for Copied<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        into.copy_from_slice(self.bytes.get(offset..offset.checked_add(into.len())?)?);
        Some(())
    }
}

/// A string of known length, if it can be text at all.
pub(super) fn text(bytes: Vec<u8>, what: &str) -> Result<String> {
    let text = String::from_utf8(bytes).with_context(|| format!("{what} is no text"))?;
    ensure!(!text.chars().any(char::is_control), "{what} is no text: {text:?}");
    Ok(text)
}

/// Whether a string can be this long, in characters.
pub(super) fn length(length: u64, what: &str) -> Result<usize> {
    let length = usize::try_from(length).ok().filter(|&length| length <= STRING_MAX);
    length.with_context(|| format!("{what} is too long to be true"))
}

/// A word of a structure that has been read as a whole.
pub(super) fn word_in(bytes: &[u8], offset: u64) -> Option<u64> {
    let start = usize::try_from(offset).ok()?;
    Some(u64::from_le_bytes(bytes.get(start..start.checked_add(8)?)?.try_into().ok()?))
}

/// A half word of a structure that has been read as a whole.
pub(super) fn half_in(bytes: &[u8], offset: u64) -> Option<u32> {
    let start = usize::try_from(offset).ok()?;
    Some(u32::from_le_bytes(bytes.get(start..start.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_reads_itself() {
        let memory = Live::of(std::process::id()).unwrap();
        let (number, string) = (0x1234_5678_9abc_def0_u64, c"a string with an end");
        assert_eq!(memory.word(&raw const number as u64), Some(number));
        let read = memory.c_string(string.as_ptr() as u64, "a string").unwrap();
        assert_eq!(read, "a string with an end");
        assert_eq!(memory.word(0), None);
        assert_eq!(memory.word(u64::MAX), None);
        assert!(memory.c_string(8, "a name").unwrap_err().to_string().contains("no a name at 0x8"));
    }

    #[test]
    fn what_cannot_be_text_is_not() {
        assert!(text(vec![b'a', 0xff], "a name").is_err());
        assert!(text(vec![b'a', 7], "a name").is_err());
        assert_eq!(text("über".into(), "a name").unwrap(), "über");
        assert!(length(1 << 40, "a name").is_err());
    }
}
