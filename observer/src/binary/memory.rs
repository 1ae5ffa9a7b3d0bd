//! Reads the memory of an observed process.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use anyhow::{Context as _, Result, ensure};

/// Maximum length of a string, in bytes for a C string and in characters for a string of an interpreter.
const STRING_MAX: usize = 4096;

/// Readable memory of a process.
pub(crate) trait Memory {
    /// Fills `into` with the bytes from an address on; `None` if not all of them can be read.
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()>;

    /// Reads 8 bytes in little-endian order.
    fn word(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    }
}

/// The live address space of a process. It stays with the program that it was opened for: after an `exec` or exit every
/// read fails, even if another process gets the same id.
pub(crate) struct ProcessMemory(File);

impl ProcessMemory {
    /// Opens a process's memory. This takes the right to trace the process.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/mem")).map(Self)
    }

    /// Reads bytes. `what` names them in the error.
    pub(crate) fn bytes(&self, address: u64, length: usize, what: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read(address, &mut bytes).with_context(|| format!("cannot read {what} at {address:#x}"))?;
        Ok(bytes)
    }

    /// Reads the word at an offset in an object. `what` names it in the error.
    pub(crate) fn field(&self, object: u64, offset: u64, what: &str) -> Result<u64> {
        let word = object.checked_add(offset).and_then(|address| self.word(address));
        word.with_context(|| format!("cannot read {what} at {object:#x}+{offset:#x}"))
    }

    /// Reads a C string. Fails if it is too long or no printable UTF-8 text.
    pub(crate) fn c_string(&self, address: u64, what: &str) -> Result<String> {
        let mut bytes = Vec::new();
        while bytes.len() < STRING_MAX {
            // Reads to the end of a cache line, so that no read crosses into a page that may not be mapped.
            let start = address.wrapping_add(bytes.len() as u64);
            let chunk = 64 - usize::try_from(start % 64)?;
            let more = self.bytes(start, chunk, what)?;
            let end = more.iter().position(|&byte| byte == 0);
            bytes.extend_from_slice(&more[..end.unwrap_or(chunk)]);
            if end.is_some() {
                return text(bytes, what);
            }
        }
        anyhow::bail!("{what} at {address:#x} is longer than {STRING_MAX} bytes")
    }
}

#[cfg(any(test, feature = "fuzz"))]
impl ProcessMemory {
    /// An address space that has only a file's content, from address 0 on.
    pub(crate) const fn of_file(file: File) -> Self {
        Self(file)
    }
}

impl Memory for ProcessMemory {
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        self.0.read_exact_at(into, address).ok()
    }
}

/// A copy of the innermost part of a stack.
pub(crate) struct StackCopy<'a> {
    /// Address of the first byte in the process: the stack pointer.
    pub(crate) start: u64,
    /// The copied bytes.
    pub(crate) bytes: &'a [u8],
}

impl Memory for StackCopy<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        into.copy_from_slice(self.bytes.get(offset..offset.checked_add(into.len())?)?);
        Some(())
    }
}

/// Decodes text. Fails if it is not UTF-8 or has control characters.
pub(crate) fn text(bytes: Vec<u8>, what: &str) -> Result<String> {
    let text = String::from_utf8(bytes).with_context(|| format!("{what} is not UTF-8"))?;
    ensure!(!text.chars().any(char::is_control), "{what} has control characters: {text:?}");
    Ok(text)
}

/// Checks the length of a string, in characters, as it was read from a process.
pub(crate) fn checked_length(length: u64, what: &str) -> Result<usize> {
    let checked = usize::try_from(length).ok().filter(|&length| length <= STRING_MAX);
    checked.with_context(|| format!("implausible length of {what}: {length}"))
}

/// Decodes the 8 bytes at an offset of a structure that has been read as a whole.
pub(crate) fn word_in(bytes: &[u8], offset: u64) -> Option<u64> {
    let start = usize::try_from(offset).ok()?;
    Some(u64::from_le_bytes(bytes.get(start..start.checked_add(8)?)?.try_into().ok()?))
}

/// Decodes the 4 bytes at an offset of a structure that has been read as a whole.
pub(crate) fn u32_in(bytes: &[u8], offset: u64) -> Option<u32> {
    let start = usize::try_from(offset).ok()?;
    Some(u32::from_le_bytes(bytes.get(start..start.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_reads_itself() {
        let memory = ProcessMemory::of(std::process::id()).unwrap();
        let (number, string) = (0x1234_5678_9abc_def0_u64, c"a string with an end");
        assert_eq!(memory.word(&raw const number as u64), Some(number));
        let read = memory.c_string(string.as_ptr() as u64, "a string").unwrap();
        assert_eq!(read, "a string with an end");
        assert_eq!(memory.word(0), None);
        assert_eq!(memory.word(u64::MAX), None);
        assert!(memory.c_string(8, "a name").unwrap_err().to_string().contains("cannot read a name at 0x8"));
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        assert!(text(vec![b'a', 0xff], "a name").is_err());
        assert!(text(vec![b'a', 7], "a name").is_err());
        assert_eq!(text("über".into(), "a name").unwrap(), "über");
        assert!(checked_length(1 << 40, "a name").is_err());
    }
}
