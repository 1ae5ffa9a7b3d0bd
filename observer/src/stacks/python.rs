//! Reads the Python frames of a thread from CPython's data in the process's memory, whether the thread runs or is
//! blocked.

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    raw_frames::{self, RawFrame},
    unwind::DEPTH_MAX,
};
use crate::{
    binary::memory::{ProcessMemory, checked_length, text, u32_in, word_in},
    model::frame::{Frame, RuntimeLock, StackSample},
};

/// Maximum number of interpreters, and of threads of all interpreters together, that are searched.
const LIST_MAX: usize = 4096;

/// Maximum number of frames that are followed. CPython's recursion limit is 1000 by default.
const CHAIN_MAX: usize = 8192;

/// Maximum size of a function's location table, in bytes.
const TABLE_MAX: u64 = 1 << 20;

/// `owner` of a frame that stands for a part of the C stack and has no code.
const OWNED_BY_C_STACK: u8 = 3;

/// Where the GIL is: in `_PyRuntime`, or behind a pointer in each interpreter.
#[derive(Clone, Copy, Debug)]
enum Gil {
    Runtime(u64),
    Interpreter(u64),
}

/// Offsets in `struct _gil_runtime_state`, and its size; 3.11 to 3.13 do not differ. A thread that waits for the GIL waits
/// for a condition variable in it.
const GIL_HOLDER: u64 = 0x8;
const GIL_LOCKED: u64 = 0x10;
const GIL_SIZE: u64 = 0xd0;

/// Offsets into CPython's structures, in bytes.
///
/// Those of 3.11 and 3.12 were printed by gdb from the debug information of x86-64 release builds (3.11.7, 3.12.1);
/// patch releases keep them. From 3.13 on the interpreter has a table of them (`_Py_DebugOffsets`). Those of the GIL were
/// printed by programs compiled with CPython's internal headers (3.11.2, 3.11.7, 3.12.1, 3.13.0).
#[derive(Clone, Copy, Debug)]
struct Offsets {
    gil: Gil,
    thread_interpreter: u64,
    runtime_interpreters: u64,
    interpreter_next: u64,
    interpreter_threads: u64,
    thread_next: u64,
    thread_native_id: u64,
    /// Pointer to the current frame, or to the `_PyCFrame`.
    thread_frame: u64,
    /// Pointer to the current frame in `_PyCFrame`; `None` for versions without it.
    cframe_frame: Option<u64>,
    frame_code: u64,
    frame_previous: u64,
    frame_instruction: u64,
    frame_owner: u64,
    code_filename: u64,
    code_qualname: u64,
    code_linetable: u64,
    code_first_line: u64,
    code_instructions: u64,
    object_type: u64,
    type_name: u64,
    bytes_size: u64,
    bytes_data: u64,
    string_length: u64,
    string_state: u64,
    /// Size of a string's header: of an ASCII string, and of any other compact string.
    string_ascii: u64,
    string_compact: u64,
}

const V3_11: Offsets = Offsets {
    gil: Gil::Runtime(0x168),
    thread_interpreter: 0x10,
    runtime_interpreters: 0x28,
    interpreter_next: 0,
    interpreter_threads: 0x10,
    thread_next: 0x8,
    thread_native_id: 0xa0,
    thread_frame: 0x38,
    cframe_frame: Some(0x8),
    frame_code: 0x20,
    frame_previous: 0x30,
    frame_instruction: 0x38,
    frame_owner: 0x45,
    code_filename: 0x70,
    code_qualname: 0x80,
    code_linetable: 0x88,
    code_first_line: 0x48,
    code_instructions: 0xb8,
    object_type: 0x8,
    type_name: 0x18,
    bytes_size: 0x10,
    bytes_data: 0x20,
    string_length: 0x10,
    string_state: 0x20,
    string_ascii: 0x30,
    string_compact: 0x48,
};

const V3_12: Offsets = Offsets {
    gil: Gil::Interpreter(0x180),
    interpreter_threads: 0x48,
    thread_native_id: 0x90,
    cframe_frame: Some(0),
    frame_code: 0,
    frame_previous: 0x8,
    frame_owner: 0x46,
    code_first_line: 0x44,
    code_instructions: 0xc0,
    string_ascii: 0x28,
    string_compact: 0x38,
    ..V3_11
};

/// First bytes of `_Py_DebugOffsets`, with which `_PyRuntime` begins.
const COOKIE: &[u8] = b"xdebugpy";

/// Size of 3.13's `_Py_DebugOffsets`, in bytes.
const DEBUG_OFFSETS_SIZE: usize = 584;

/// A CPython runtime in a process.
pub(crate) struct Python {
    /// Address of `_PyRuntime`.
    runtime: u64,
    offsets: Offsets,
}

/// Reads the version from the address of `Py_Version`: as `(major, minor)`, and as text.
pub(crate) fn version(memory: &ProcessMemory, address: u64) -> Result<((u8, u8), String)> {
    let bytes = memory.bytes(address, 4, "version")?;
    let [level, micro, minor, major] = bytes[..] else { bail!("the version is not 4 bytes long") };
    let suffix = match level >> 4 {
        0xa => "a",
        0xb => "b",
        0xc => "rc",
        _ => "",
    };
    Ok(((major, minor), format!("{major}.{minor}.{micro}{suffix}")))
}

impl Python {
    /// Prepares to read a runtime. Fails if its version or build is not supported.
    pub(crate) fn new(memory: &ProcessMemory, runtime: u64, version: (u8, u8)) -> Result<Self> {
        let offsets = match version {
            (3, 11) => V3_11,
            (3, 12) => V3_12,
            (3, 13) => debug_offsets(memory, runtime)?,
            _ => bail!("only versions 3.11, 3.12 and 3.13 are supported"),
        };
        Ok(Self { runtime, offsets })
    }

    /// Reads the frames of a thread, innermost first. `tid` is its id in the process's own PID namespace.
    pub(crate) fn frames(&self, memory: &ProcessMemory, tid: u32) -> Result<Vec<Frame>> {
        self.frames_of(memory, self.find_thread(memory, tid)?)
    }

    /// Reads the frames of the thread with this `PyThreadState`.
    fn frames_of(&self, memory: &ProcessMemory, thread: u64) -> Result<Vec<Frame>> {
        let raw = raw_frames::read_consistent(|| self.raw_frames(memory, thread))?;
        raw.iter().take(DEPTH_MAX).map(|raw| self.resolve(memory, raw)).collect()
    }

    /// Reads the frames of the only thread that a forked process has brought along. The ids that Python keeps are those of
    /// the parent if the program forked without Python's knowledge, as uWSGI does. `is_alive` says whether an id is that of
    /// a thread of the process.
    pub(crate) fn forked_frames(
        &self,
        memory: &ProcessMemory,
        is_alive: impl Fn(u32) -> bool,
    ) -> Result<Vec<Frame>> {
        let mut found = Vec::new();
        self.search_threads(memory, |thread, id| {
            if !u32::try_from(id).is_ok_and(&is_alive) {
                found.push(thread);
            }
            false
        })?;
        let thread = match found[..] {
            [only] => only,
            _ => {
                let first = *found.first().context("all threads of Python have an id")?;
                let holder = memory.field(self.gil(memory, first)?, GIL_HOLDER, "holder of the GIL")?;
                ensure!(found.contains(&holder), "several threads of Python have no id");
                holder
            }
        };
        self.frames_of(memory, thread)
    }

    /// The GIL, if a thread waits for it in a futex call, and what the thread that has it does.
    pub(crate) fn awaited_lock(
        &self,
        memory: &ProcessMemory,
        tid: u32,
        futex: u64,
    ) -> Result<Option<RuntimeLock>> {
        let thread = self.find_thread(memory, tid)?;
        let gil = self.gil(memory, thread)?;
        if futex.checked_sub(gil).is_none_or(|offset| offset >= GIL_SIZE) {
            return Ok(None);
        }
        let holder = || {
            let is_locked =
                memory.field(gil, GIL_LOCKED, "state of the GIL").ok()? & u64::from(u32::MAX) == 1;
            memory
                .field(gil, GIL_HOLDER, "holder of the GIL")
                .ok()
                .filter(|&other| is_locked && other != thread)
        };
        let before = holder();
        let frames = before.and_then(|holder| self.frames_of(memory, holder).ok()).unwrap_or_default();
        // It had the lock during the read, or had it again.
        let frames = if holder() == before { frames } else { Vec::new() };
        let sample = StackSample { frames, ..StackSample::default() };
        let holder = sample.culprit().map(|at| sample.frames[at].clone());
        Ok(Some(RuntimeLock { name: "GIL", holder }))
    }

    /// Address of the GIL of a thread.
    fn gil(&self, memory: &ProcessMemory, thread: u64) -> Result<u64> {
        match self.offsets.gil {
            Gil::Runtime(offset) => Ok(self.runtime.wrapping_add(offset)),
            Gil::Interpreter(offset) => {
                let interpreter = memory.field(thread, self.offsets.thread_interpreter, "interpreter")?;
                memory.field(interpreter, offset, "GIL")
            }
        }
    }

    /// Finds the address of a thread's `PyThreadState`.
    fn find_thread(&self, memory: &ProcessMemory, tid: u32) -> Result<u64> {
        let found = self.search_threads(memory, |_, id| id == u64::from(tid))?;
        found.with_context(|| format!("thread {tid} has never run Python"))
    }

    /// Finds the address of the first `PyThreadState` for which `is_wanted`, which gets the address and the thread id, is
    /// true.
    fn search_threads(
        &self,
        memory: &ProcessMemory,
        mut is_wanted: impl FnMut(u64, u64) -> bool,
    ) -> Result<Option<u64>> {
        let at = &self.offsets;
        let mut interpreter = memory.field(self.runtime, at.runtime_interpreters, "list of interpreters")?;
        let mut left = LIST_MAX;
        for _ in 0..LIST_MAX {
            if interpreter == 0 {
                break;
            }
            let mut thread = memory.field(interpreter, at.interpreter_threads, "list of threads")?;
            while thread != 0 {
                left = left.checked_sub(1).context("its list of threads is too long or cyclic")?;
                if is_wanted(thread, memory.field(thread, at.thread_native_id, "thread id")?) {
                    return Ok(Some(thread));
                }
                thread = memory.field(thread, at.thread_next, "next thread")?;
            }
            interpreter = memory.field(interpreter, at.interpreter_next, "next interpreter")?;
        }
        Ok(None)
    }

    /// Reads a thread's frames as addresses, innermost first.
    fn raw_frames(&self, memory: &ProcessMemory, thread: u64) -> Result<Vec<RawFrame>> {
        let at = &self.offsets;
        let mut frame = memory.field(thread, at.thread_frame, "current frame")?;
        if let Some(offset) = at.cframe_frame {
            frame = memory.field(frame, offset, "current frame")?;
        }
        let size = usize::try_from(at.frame_owner + 1)?.max(usize::try_from(at.frame_instruction + 8)?);
        let mut frames = Vec::new();
        while frame != 0 {
            ensure!(frames.len() < CHAIN_MAX, "more than {CHAIN_MAX} frames");
            let bytes = memory.bytes(frame, size, "frame")?;
            let word = |offset| word_in(&bytes, offset).context("a frame is too short");
            if bytes[usize::try_from(at.frame_owner)?] != OWNED_BY_C_STACK {
                frames.push(RawFrame {
                    address: frame,
                    code: word(at.frame_code)?,
                    instruction: word(at.frame_instruction)?,
                });
            }
            frame = word(at.frame_previous)?;
        }
        Ok(frames)
    }

    /// Resolves a frame to its function, file and line.
    fn resolve(&self, memory: &ProcessMemory, raw: &RawFrame) -> Result<Frame> {
        let at = &self.offsets;
        self.check_type(memory, raw.code, "code")?;
        let size = usize::try_from(at.code_instructions)?;
        let code = memory.bytes(raw.code, size, "code")?;
        let word = |offset| word_in(&code, offset).context("a code object is too short");
        let first = u32_in(&code, at.code_first_line).context("a code object is too short")?;
        // A code unit has two bytes. A frame that has not executed an instruction yet is at its first line.
        let unit =
            raw.instruction.checked_sub(raw.code.wrapping_add(at.code_instructions)).map(|bytes| bytes / 2);
        let line = match unit {
            Some(unit) => line(&self.bytes(memory, word(at.code_linetable)?)?, first, unit),
            None => Some(first),
        };
        Ok(Frame {
            function: self.string(memory, word(at.code_qualname)?, "function name")?,
            module: None,
            file: Some(self.string(memory, word(at.code_filename)?, "file name")?),
            line,
        })
    }

    /// Qualified name of a code object's function.
    pub(crate) fn code_name(&self, memory: &ProcessMemory, code: u64) -> Result<String> {
        self.check_type(memory, code, "code")?;
        let name = memory.field(code, self.offsets.code_qualname, "function name")?;
        self.string(memory, name, "function name")
    }

    /// Name of a type.
    pub(crate) fn type_name(&self, memory: &ProcessMemory, kind: u64) -> Result<String> {
        self.check_type(memory, kind, "type")?;
        memory.c_string(memory.field(kind, self.offsets.type_name, "type name")?, "type name")
    }

    /// Checks that an object has the expected type.
    fn check_type(&self, memory: &ProcessMemory, object: u64, expected: &str) -> Result<()> {
        let kind = memory.field(object, self.offsets.object_type, "type")?;
        let name = memory.c_string(memory.field(kind, self.offsets.type_name, "type name")?, "type name")?;
        ensure!(name == expected, "an object is of type {name} instead of {expected}");
        Ok(())
    }

    /// Content of a `bytes` object.
    fn bytes(&self, memory: &ProcessMemory, object: u64) -> Result<Vec<u8>> {
        self.check_type(memory, object, "bytes")?;
        let size = memory.field(object, self.offsets.bytes_size, "size of bytes")?;
        ensure!(size <= TABLE_MAX, "implausible size of a location table: {size}");
        memory.bytes(object.wrapping_add(self.offsets.bytes_data), usize::try_from(size)?, "bytes")
    }

    /// Content of a `str` object.
    fn string(&self, memory: &ProcessMemory, object: u64, what: &str) -> Result<String> {
        /// Bits of `state`: bytes per character; whether the characters follow the header; whether all are ASCII.
        const KIND: u64 = 0b111 << 2;
        const COMPACT: u64 = 1 << 5;
        const ASCII: u64 = 1 << 6;

        let at = &self.offsets;
        self.check_type(memory, object, "str")?;
        let length = checked_length(memory.field(object, at.string_length, what)?, what)?;
        let state = memory.field(object, at.string_state, what)?;
        ensure!(state & COMPACT != 0, "{what} is not a compact string");
        let header = if state & ASCII != 0 { at.string_ascii } else { at.string_compact };
        let width = usize::try_from((state & KIND) >> 2)?;
        let bytes = memory.bytes(object.wrapping_add(header), length * width, what)?;
        let utf8 = match width {
            // The first 256 code points of Unicode are Latin-1.
            1 => bytes.into_iter().map(char::from).collect::<String>(),
            2 => {
                let (units, _) = bytes.as_chunks::<2>();
                char::decode_utf16(units.iter().copied().map(u16::from_le_bytes))
                    .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
                    .collect()
            }
            4 => {
                let (units, _) = bytes.as_chunks::<4>();
                let decode = |unit| char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER);
                units.iter().copied().map(u32::from_le_bytes).map(decode).collect()
            }
            _ => bail!("implausible size of the characters of {what}: {width}"),
        };
        text(utf8.into_bytes(), what)
    }
}

/// Reads the offsets of version 3.13 from `_Py_DebugOffsets`.
fn debug_offsets(memory: &ProcessMemory, runtime: u64) -> Result<Offsets> {
    let table = memory.bytes(runtime, DEBUG_OFFSETS_SIZE, "_Py_DebugOffsets")?;
    ensure!(table.starts_with(COOKIE), "_PyRuntime does not begin with _Py_DebugOffsets");
    let offset = |at: u64| word_in(&table, at).context("_Py_DebugOffsets is too short");
    ensure!(offset(16)? == 0, "free-threaded builds are not supported");
    let ascii = offset(560)?;
    let offsets = Offsets {
        gil: Gil::Interpreter(0x10),
        thread_interpreter: 0x10,
        runtime_interpreters: offset(40)?,
        interpreter_next: offset(64)?,
        interpreter_threads: offset(72)?,
        thread_next: offset(168)?,
        thread_native_id: offset(200)?,
        thread_frame: offset(184)?,
        cframe_frame: None,
        frame_code: offset(240)?,
        frame_previous: offset(232)?,
        frame_instruction: offset(248)?,
        frame_owner: offset(264)?,
        code_filename: offset(280)?,
        code_qualname: offset(296)?,
        code_linetable: offset(304)?,
        code_first_line: offset(312)?,
        code_instructions: offset(344)?,
        object_type: offset(360)?,
        type_name: offset(376)?,
        bytes_size: offset(520)?,
        bytes_data: offset(528)?,
        string_state: offset(544)?,
        string_length: offset(552)?,
        string_ascii: ascii,
        // `PyCompactUnicodeObject` has two more words: the length in UTF-8, and a pointer to it.
        string_compact: ascii.wrapping_add(16),
    };
    // These determine how much is read at once.
    let sizes = [offsets.frame_owner, offsets.frame_instruction, offsets.code_instructions];
    ensure!(sizes.iter().all(|&offset| offset < 4096), "implausible values in _Py_DebugOffsets");
    Ok(offsets)
}

/// Line of a code unit, from its function's location table; `None` if the unit has no line.
///
/// The format is described in CPython's `Objects/locations.md`. An entry is one byte with the highest bit set, which
/// has the kind of the entry and its number of code units, and then bytes without that bit. For some kinds these begin
/// with the change of the line.
pub(crate) fn line(table: &[u8], first_line: u32, unit: u64) -> Option<u32> {
    let mut line = i64::from(first_line);
    let mut end = 0;
    let mut rest = table;
    while let [head, tail @ ..] = rest {
        let length = tail.iter().position(|byte| byte & 0x80 != 0).unwrap_or(tail.len());
        let (entry, next) = tail.split_at(length);
        rest = next;
        end += u64::from(head & 7) + 1;
        let kind = (head >> 3) & 15;
        line = line.saturating_add(match kind {
            10..=12 => i64::from(kind - 10),
            13 | 14 => signed_varint(entry),
            _ => 0,
        });
        if unit < end {
            let has_no_line = kind == 15;
            return u32::try_from(line).ok().filter(|_| !has_no_line);
        }
    }
    None
}

/// Decodes a signed varint: groups of six bits, lowest first. The seventh bit of a byte says that another group
/// follows; the lowest bit of the number is its sign.
fn signed_varint(bytes: &[u8]) -> i64 {
    let mut value = 0_i64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        value |= i64::from(byte & 0x3f) << (6 * index);
        if byte & 0x40 == 0 {
            break;
        }
    }
    if value & 1 != 0 { -(value >> 1) } else { value >> 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_follow_the_location_table() {
        // Three units at the first line, one without a line, two units two lines below, one unit 40 lines above.
        let table = [0x80 | 2, 0x11, 0x80 | 15 << 3, 0x80 | 12 << 3 | 1, 0, 0, 0x80 | 13 << 3, 0x40 | 17, 1];
        let lines: Vec<_> = (0..8).map(|unit| line(&table, 50, unit)).collect();
        assert_eq!(lines, [Some(50), Some(50), Some(50), None, Some(52), Some(52), Some(12), None]);
    }

    #[test]
    fn numbers_carry_their_sign_in_the_lowest_bit() {
        assert_eq!(signed_varint(&[0]), 0);
        assert_eq!(signed_varint(&[2]), 1);
        assert_eq!(signed_varint(&[3]), -1);
        assert_eq!(signed_varint(&[0x40 | 17, 1]), -40);
    }
}
