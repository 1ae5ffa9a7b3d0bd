//! Reads the Ruby frames of a thread from the virtual machine's data in the process's memory, whether the thread runs
//! or is blocked.

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    raw_frames::{self, RawFrame},
    unwind::DEPTH_MAX,
};
use crate::{
    binary::{
        elf::Elf,
        memory::{Memory as _, ProcessMemory, checked_length, text, word_in},
    },
    model::frame::Frame,
};

/// Maximum number of ractors, and of threads of all ractors together, that are searched.
const LIST_MAX: usize = 4096;

/// Maximum number of control frames that are read: as many as fit into a thread's default stack of 1 MiB.
const CHAIN_MAX: u64 = 16_384;

/// Maximum number of a class's variables that are searched for its name, which is the first that a class gets.
const VARIABLES_MAX: u64 = 256;

/// Offsets into Ruby's structures on x86-64, in bytes. They were printed from the bindings in rbspy's
/// `rbspy-ruby-structs` 0.55 for 3.1.0 to 3.1.7 and 3.3.0 to 3.3.13, and do not differ among those. The offsets of
/// class names and first lines were determined with Debian's 3.1.2 and 3.3.8.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    /// In a ractor: the head of its list of threads. The link in that list is at offset 0 of a thread.
    ractor_threads: u64,
    /// In a ractor: the link in the virtual machine's list of ractors.
    ractor_link: u64,
    thread_context: u64,
    /// In a thread: the pointer to its native thread; `None` for versions without that structure.
    thread_native: Option<u64>,
    /// In a native thread, else in a thread: its thread id.
    native_tid: u64,
    frame_size: u64,
    body_insns: u64,
    /// Whether an embedded string has its length in a field before its content, and not in its flags.
    string_has_length: bool,
    /// In a class: its name; `None` for versions in which the name is one of the class's variables.
    class_name: Option<u64>,
    /// Whether the first line of a method is a Ruby object (a fixnum) and not a plain integer.
    first_line_is_object: bool,
}

const V3_1: Offsets = Offsets {
    ractor_threads: 0x130,
    ractor_link: 0x238,
    thread_context: 0x28,
    thread_native: None,
    native_tid: 0x58,
    frame_size: 0x40,
    body_insns: 0x78,
    string_has_length: false,
    class_name: None,
    first_line_is_object: true,
};

const V3_3: Offsets = Offsets {
    ractor_threads: 0x100,
    ractor_link: 0x1b0,
    thread_context: 0x30,
    thread_native: Some(0x28),
    native_tid: 0x18,
    frame_size: 0x38,
    body_insns: 0x70,
    string_has_length: true,
    class_name: Some(0x98),
    first_line_is_object: false,
};

// Offsets that are the same in all supported versions.
const VM_RACTORS: u64 = 0x8;
const VM_MAIN_THREAD: u64 = 0x28;
const CONTEXT_STACK: u64 = 0;
const CONTEXT_STACK_WORDS: u64 = 0x8;
const CONTEXT_FRAME: u64 = 0x10;
const FRAME_PC: u64 = 0;
const FRAME_ISEQ: u64 = 0x10;
const FRAME_ENVIRONMENT: u64 = 0x20;
const ISEQ_BODY: u64 = 0x10;
const BODY_CODE: u64 = 0x8;
const BODY_PATH: u64 = 0x40;
const BODY_LABEL: u64 = 0x50;
const BODY_FIRST_LINE: u64 = 0x58;
const INSNS_SIZE: u64 = 0x10;
const INSNS_INDEX: u64 = 0x18;
const METHOD_DEFINITION: u64 = 0x10;
const DEFINITION_ID: u64 = 0x20;

/// Bits of an object's flags that are its type.
const TYPE: u64 = 0x1f;
const T_CLASS: u64 = 0x02;
const T_MODULE: u64 = 0x03;
const T_STRING: u64 = 0x05;
const T_ARRAY: u64 = 0x07;
const T_IMEMO: u64 = 0x1a;
/// Type of the object that compaction leaves at the old address of an object, and the offset of the new address in it.
const T_MOVED: u64 = 0x1e;
const MOVED_TO: u64 = 16;
/// Bit of an object's flags: a string's content is outside of the object; an array's elements are inside of it.
const USER_1: u64 = 1 << 13;

/// Kinds of internal objects (`T_IMEMO`), in the flags above the type.
const IMEMO_METHOD: u64 = 6;
const IMEMO_ISEQ: u64 = 7;

/// Bits of an environment's flags that are the type of its frame, and the type of the frame of a method written in C.
const FRAME_MAGIC: u64 = 0x7fff_0001;
const FRAME_MAGIC_CFUNC: u64 = 0x5555_0001;

/// Ids up to this are operators and are serial numbers themselves. Other ids have the serial number above bits that are
/// the scope of the name.
const LAST_OPERATOR: u64 = 0xa9;
const ID_SCOPE_BITS: u32 = 4;
/// The table of symbols is an array of arrays. Each holds this many names, and for each its string and its symbol.
const NAMES_IN_ARRAY: u64 = 512;

/// A Ruby virtual machine in a process.
pub(crate) struct Ruby {
    /// Address of the pointer to the virtual machine.
    vm: u64,
    /// Address of the pointer to the array of all names; `None` if it was not found.
    names: Option<u64>,
    offsets: Offsets,
}

/// Reads the interpreter's version from the address of `ruby_version`.
pub(crate) fn version(memory: &ProcessMemory, address: u64) -> Result<String> {
    memory.c_string(address, "version")
}

impl Offsets {
    fn of(version: &str) -> Result<Self> {
        match version.rsplit_once('.') {
            Some(("3.1", _)) => Ok(V3_1),
            Some(("3.3", _)) => Ok(V3_3),
            _ => bail!("only versions 3.1 and 3.3 are supported"),
        }
    }
}

impl Ruby {
    /// Creates a reader for given addresses.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn at(vm: u64, names: Option<u64>, version: &str) -> Result<Self> {
        Ok(Self { vm, names, offsets: Offsets::of(version)? })
    }

    /// Prepares to read a virtual machine. `bias` is added to addresses in `elf`. Fails if the version is not supported
    /// or the virtual machine is not found.
    pub(crate) fn new(elf: &Elf, bias: u64, version: &str) -> Result<Self> {
        let offsets = Offsets::of(version)?;
        let [vm, names] = elf.symbols(["ruby_current_vm_ptr", "ruby_global_symbols"]);
        let vm = vm.or_else(|| vm_in_code(elf));
        let vm =
            vm.context("its virtual machine is not found: no symbol ruby_current_vm_ptr, and unknown code")?;
        // In `ruby_global_symbols` the array follows a number and a table by name.
        let names = names.map(|names| names.wrapping_add(16)).or_else(|| names_in_code(elf));
        Ok(Self { vm: vm.wrapping_add(bias), names: names.map(|names| names.wrapping_add(bias)), offsets })
    }

    /// Reads the frames of a thread, innermost first. `tid` is its id in the process's own PID namespace, `main`
    /// whether it is the main thread.
    pub(crate) fn frames(&self, memory: &ProcessMemory, tid: u32, main: bool) -> Result<Vec<Frame>> {
        let thread = self.find_thread(memory, tid, main)?;
        let raw = raw_frames::read_consistent(|| self.raw_frames(memory, thread))?;
        let frames = raw.iter().filter_map(|raw| self.resolve(memory, raw).transpose());
        frames.take(DEPTH_MAX).collect()
    }

    /// Finds the address of a thread's `rb_thread_t`.
    fn find_thread(&self, memory: &ProcessMemory, tid: u32, main: bool) -> Result<u64> {
        let vm = memory.field(self.vm, 0, "virtual machine")?;
        ensure!(vm != 0, "its virtual machine has not started");
        if main {
            // After a fork the ids in the list may still be those of the parent.
            return memory.field(vm, VM_MAIN_THREAD, "main thread");
        }
        let mut left = LIST_MAX;
        for link in list(memory, vm.wrapping_add(VM_RACTORS))? {
            let ractor = link.wrapping_sub(self.offsets.ractor_link);
            for thread in list(memory, ractor.wrapping_add(self.offsets.ractor_threads))? {
                left = left.checked_sub(1).context("its list of threads is too long or cyclic")?;
                let native = match self.offsets.thread_native {
                    Some(offset) => memory.field(thread, offset, "native thread")?,
                    None => thread,
                };
                // A thread that waits for a native thread has no id.
                let id = memory.word(native.wrapping_add(self.offsets.native_tid)).filter(|_| native != 0);
                if id.is_some_and(|id| id & u64::from(u32::MAX) == u64::from(tid)) {
                    return Ok(thread);
                }
            }
        }
        bail!("thread {tid} is not a Ruby thread")
    }

    /// Reads a thread's frames as addresses, innermost first.
    fn raw_frames(&self, memory: &ProcessMemory, thread: u64) -> Result<Vec<RawFrame>> {
        let context = memory.field(thread, self.offsets.thread_context, "context")?;
        let stack = memory.field(context, CONTEXT_STACK, "stack")?;
        let words = memory.field(context, CONTEXT_STACK_WORDS, "size of the stack")?;
        let first = memory.field(context, CONTEXT_FRAME, "current frame")?;
        let end = stack.checked_add(words.saturating_mul(8)).context("implausible size of a stack")?;
        // Frames grow down from the end of the stack.
        let bytes =
            end.checked_sub(first).filter(|_| first >= stack).context("a frame is not on the stack")?;
        let size = self.offsets.frame_size;
        ensure!(bytes % size == 0 && bytes / size <= CHAIN_MAX, "a frame is not on the stack");
        let frames = memory.bytes(first, usize::try_from(bytes)?, "frames")?;
        let raw = frames.chunks(usize::try_from(size)?).zip(0..).map(|(frame, index)| {
            let word = |offset| word_in(frame, offset).context("a frame is too short");
            let (code, pc) = (word(FRAME_ISEQ)?, word(FRAME_PC)?);
            let environment = word(FRAME_ENVIRONMENT)?;
            let code = if code == 0 { environment | C_FRAME } else { code };
            Ok(RawFrame { address: first + index * size, code, instruction: pc })
        });
        raw.collect()
    }

    /// Resolves a frame to its function, file and line; `None` for Ruby's internal frames.
    fn resolve(&self, memory: &ProcessMemory, raw: &RawFrame) -> Result<Option<Frame>> {
        if raw.code & C_FRAME != 0 {
            return self.c_frame(memory, raw.code & !C_FRAME);
        }
        // The dummy frame at the bottom of every stack has no instruction pointer.
        if raw.instruction == 0 {
            return Ok(None);
        }
        check_imemo(memory, raw.code, IMEMO_ISEQ)?;
        let body = memory.field(raw.code, ISEQ_BODY, "method body")?;
        let line = self.line(memory, body, raw.instruction)?;
        // The frame of TOPLEVEL_BINDING, which is outside that of the script, has line 0.
        if line == 0 {
            return Ok(None);
        }
        let label = memory.field(body, BODY_LABEL, "label")?;
        Ok(Some(Frame {
            function: self.string(memory, label, "label")?,
            module: None,
            file: Some(self.path(memory, body)?),
            line: Some(line),
        }))
    }

    /// Path of the file that a method is in, as it was given to Ruby.
    fn path(&self, memory: &ProcessMemory, body: u64) -> Result<String> {
        let path = memory.field(body, BODY_PATH, "path")?;
        // Either a string, or an array of the given and the absolute path.
        let path = if kind(memory, path)? == T_ARRAY { element(memory, path, 0)? } else { path };
        self.string(memory, path, "path")
    }

    /// Name of a block, from its `rb_iseq_t`, with file and line, which distinguish the blocks of a method.
    pub(crate) fn block_name(&self, memory: &ProcessMemory, code: u64) -> Result<String> {
        check_imemo(memory, code, IMEMO_ISEQ)?;
        let body = memory.field(code, ISEQ_BODY, "block")?;
        let label = self.string(memory, memory.field(body, BODY_LABEL, "label")?, "label")?;
        let path = self.path(memory, body)?;
        let line = memory.field(body, BODY_FIRST_LINE, "first line")?;
        let line = if self.offsets.first_line_is_object { line >> 1 } else { line & u64::from(u32::MAX) };
        let file = path.rsplit_once('/').map_or(path.as_str(), |(_, file)| file);
        Ok(format!("{label} ({file}:{line})"))
    }

    /// Name of a class.
    pub(crate) fn class_name(&self, memory: &ProcessMemory, class: u64) -> Result<String> {
        // Compaction leaves the new address at the old one until that is reused.
        let class = match kind(memory, class)? {
            T_MOVED => memory.field(class, MOVED_TO, "class")?,
            _ => class,
        };
        ensure!(matches!(kind(memory, class)?, T_CLASS | T_MODULE), "an object is not a class");
        let name = match self.offsets.class_name {
            Some(offset) => memory.field(class, offset, "class name")?,
            None => self.class_path_variable(memory, class)?,
        };
        ensure!(name != 0, "a class has no name");
        self.string(memory, name, "class name")
    }

    /// Value of the internal variable that holds a class's name; 0 if the class has no such variable.
    fn class_path_variable(&self, memory: &ProcessMemory, class: u64) -> Result<u64> {
        /// A name that Ruby code cannot give to a variable.
        const NAME: &str = "__classpath__";
        const CLASS_EXTENSION: u64 = 24;
        const EXTENSION_VARIABLES: u64 = 8;
        /// Number of entries of a table, and the pointer to them.
        const ENTRIES_END: u64 = 40;
        const ENTRIES: u64 = 48;
        /// Size of an entry: a hash, the id of the name, the value.
        const ENTRY: u64 = 24;

        let names = self.names.context("the table of symbols is not found")?;
        let extension = memory.field(class, CLASS_EXTENSION, "class")?;
        let variables = memory.field(extension, EXTENSION_VARIABLES, "variables")?;
        if variables == 0 {
            return Ok(0);
        }
        let entries = memory.field(variables, ENTRIES, "variables")?;
        let end = memory.field(variables, ENTRIES_END, "variables")?;
        for number in 0..end.min(VARIABLES_MAX) {
            let entry = entries.wrapping_add(number * ENTRY);
            let id = memory.field(entry, 8, "variable")?;
            // A deleted entry has no valid id.
            if self.name(memory, names, id).is_ok_and(|name| name == NAME) {
                return memory.field(entry, 16, "class name");
            }
        }
        Ok(0)
    }

    /// The frame of a method that is written in C, with its Ruby name; `None` for frames of other types.
    fn c_frame(&self, memory: &ProcessMemory, environment: u64) -> Result<Option<Frame>> {
        let flags = memory.field(environment, 0, "environment")?;
        if flags & FRAME_MAGIC != FRAME_MAGIC_CFUNC {
            return Ok(None);
        }
        let method = memory.field(environment.wrapping_sub(16), 0, "method")?;
        check_imemo(memory, method, IMEMO_METHOD)?;
        let definition = memory.field(method, METHOD_DEFINITION, "method definition")?;
        let id = memory.field(definition, DEFINITION_ID, "method id")?;
        let function = match self.names {
            Some(names) => self.name(memory, names, id)?,
            None => "(method in C)".into(),
        };
        Ok(Some(Frame::in_c(function)))
    }

    /// Resolves an id to its name.
    fn name(&self, memory: &ProcessMemory, names: u64, id: u64) -> Result<String> {
        let serial = if id > LAST_OPERATOR { id >> ID_SCOPE_BITS } else { id };
        let arrays = memory.field(names, 0, "table of symbols")?;
        let array = element(memory, arrays, serial / NAMES_IN_ARRAY)?;
        let name = element(memory, array, serial % NAMES_IN_ARRAY * 2)?;
        self.string(memory, name, "method name")
    }

    /// Content of a string.
    fn string(&self, memory: &ProcessMemory, object: u64, what: &str) -> Result<String> {
        ensure!(kind(memory, object)? == T_STRING, "{what} is not a string");
        let flags = memory.field(object, 0, what)?;
        let is_on_heap = flags & USER_1 != 0;
        let size = if self.offsets.string_has_length || is_on_heap {
            memory.field(object, 16, what)?
        } else {
            flags >> 14 & 0x1f
        };
        let data = match (is_on_heap, self.offsets.string_has_length) {
            (true, _) => memory.field(object, 24, what)?,
            (false, true) => object.wrapping_add(24),
            (false, false) => object.wrapping_add(16),
        };
        text(memory.bytes(data, checked_length(size, what)?, what)?, what)
    }

    /// Line of an instruction pointer.
    fn line(&self, memory: &ProcessMemory, body: u64, pc: u64) -> Result<u32> {
        /// Size of an entry of the line table, which begins with the line.
        const ENTRY: u64 = 12;

        let insns = body.wrapping_add(self.offsets.body_insns);
        let entries = memory.field(insns, 0, "line table")?;
        let size = memory.field(insns, INSNS_SIZE, "line table")? & u64::from(u32::MAX);
        let code = memory.field(body, BODY_CODE, "code")?;
        // The instruction pointer is behind the instruction that is being executed.
        let position =
            (pc.checked_sub(code).context("an instruction is not in its method")? / 8).saturating_sub(1);
        let entry = match size {
            0 => bail!("a method has no lines"),
            1 => 0,
            _ => {
                let index = memory.field(insns, INSNS_INDEX, "line index")?;
                rank(memory, index, position)?.checked_sub(1).context("an instruction has no line")?
            }
        };
        ensure!(entry < size, "an instruction has no line");
        let line = memory.field(entries.wrapping_add(entry * ENTRY), 0, "line")? & u64::from(u32::MAX);
        Ok(u32::try_from(line)?)
    }
}

/// Bit of [`RawFrame::code`] that is set if the address is the environment of a frame without code. Addresses are even.
const C_FRAME: u64 = 1;

/// Number of entries of a method's line table that start at or before a position: Ruby's `succ_index_lookup`.
fn rank(memory: &ProcessMemory, index: u64, position: u64) -> Result<u64> {
    /// Number of positions at the beginning of the index whose ranks are stored directly, nine of seven bits per word.
    const IMMEDIATE: u64 = 54;
    /// Number of positions of each block that follows. A block has the rank before it, the ranks of its eight words,
    /// and a bit for each position.
    const BLOCK: u64 = 512;
    const BLOCK_SIZE: u64 = 8 + 8 + BLOCK / 8;

    let Some(beyond) = position.checked_sub(IMMEDIATE) else {
        let word = memory.field(index, position / 9 * 8, "line index")?;
        return Ok(word >> (position % 9 * 7) & 0x7f);
    };
    let block = index.wrapping_add(IMMEDIATE / 9 * 8 + beyond / BLOCK * BLOCK_SIZE);
    let (word, bit) = (beyond % BLOCK / 64, beyond % 64);
    let before_block = memory.field(block, 0, "line index")? & u64::from(u32::MAX);
    let before_word = match word {
        0 => 0,
        _ => memory.field(block, 8, "line index")? >> ((word - 1) * 9) & 0x1ff,
    };
    let bits = memory.field(block, 16 + word * 8, "line index")?;
    Ok(before_block + before_word + u64::from((bits << (63 - bit)).count_ones()))
}

/// Addresses of the links of all members of a linked list.
fn list(memory: &ProcessMemory, head: u64) -> Result<Vec<u64>> {
    let mut members = Vec::new();
    let mut link = memory.field(head, 0, "list")?;
    while link != head {
        ensure!(members.len() < LIST_MAX, "a list is too long or cyclic");
        members.push(link);
        link = memory.field(link, 0, "list")?;
    }
    Ok(members)
}

/// Type of an object.
fn kind(memory: &ProcessMemory, object: u64) -> Result<u64> {
    Ok(memory.field(object, 0, "object")? & TYPE)
}

/// Checks that an object is an internal object of the expected kind.
fn check_imemo(memory: &ProcessMemory, object: u64, expected: u64) -> Result<()> {
    let flags = memory.field(object, 0, "internal object")?;
    ensure!(
        flags & TYPE == T_IMEMO && flags >> 12 & 0xf == expected,
        "an internal object is not of the expected kind"
    );
    Ok(())
}

/// An element of an array.
fn element(memory: &ProcessMemory, array: u64, index: u64) -> Result<u64> {
    ensure!(kind(memory, array)? == T_ARRAY, "an object is not an array");
    let is_embedded = memory.field(array, 0, "array")? & USER_1 != 0;
    let data = if is_embedded { array.wrapping_add(16) } else { memory.field(array, 32, "array")? };
    memory.field(data, index.checked_mul(8).context("an array index is too large")?, "array element")
}

/// Address of the pointer to the virtual machine, from the code of a function that reads it. For stripped files.
fn vm_in_code(elf: &Elf) -> Option<u64> {
    let [reader] = elf.symbols(["rb_gc_count"]);
    // lea POINTER(%rip), %rax; mov (%rax), %rax
    elf.target_in_code(reader?, &[0x48, 0x8d, 0x05], &[0x48, 0x8b, 0x00])
}

/// Address of the pointer to the array of names. It follows the pointer to the table of names, which the code of a
/// function reads for the table's size. For stripped files.
fn names_in_code(elf: &Elf) -> Option<u64> {
    let [reader] = elf.symbols(["rb_sym_all_symbols"]);
    // mov POINTER(%rip), %rax; mov 0x10(%rax), %rdi
    Some(elf.target_in_code(reader?, &[0x48, 0x8b, 0x05], &[0x48, 0x8b, 0x78, 0x10])?.wrapping_add(8))
}
