//! Ruby frames of a thread, read from the virtual machine's own data while it runs or stands still.

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    elf::Elf,
    memory::{Live, Memory as _, length, text, word_in},
    snapshot::{self, Link},
    unwind::DEPTH_MAX,
};
use crate::model::frame::Frame;

/// Most ractors, and threads of all of them, that are looked through.
const LIST_MAX: usize = 4096;

/// Most control frames that are read: what fits into a default stack of a thread, 1 MiB.
const CHAIN_MAX: u64 = 16_384;

/// Most variables of a class among which its name is looked for; it is the first that a class gets.
const VARIABLES_MAX: u64 = 256;

/// Where Ruby keeps what: offsets in bytes into its structures, on x86-64. They were printed from the bindings in
/// rbspy's `rbspy-ruby-structs` 0.55 for 3.1.0 to 3.1.7 and 3.3.0 to 3.3.13, and do not differ among those; where names
/// of classes and first lines are was found in Debian's 3.1.2 and 3.3.8.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    /// In the ractor: its list of threads. In a thread: its link in that list comes first.
    ractor_threads: u64,
    /// In the ractor: its link in the machine's list.
    ractor_link: u64,
    thread_context: u64,
    /// In the thread: a pointer to its native thread, where that is a structure of its own.
    thread_native: Option<u64>,
    /// In the native thread, else in the thread: its id.
    native_tid: u64,
    frame_size: u64,
    body_insns: u64,
    /// Whether a string's length stands before its content even if that is in place.
    string_has_length: bool,
    /// In a class: its name, if that has a place of its own and is none of the class's variables.
    class_name: Option<u64>,
    /// Whether the line a method begins at is an object, as numbers in Ruby are.
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

// Offsets that all these versions share.
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

/// Bits of an object's flags: its type; a string or array elsewhere than in place, in place.
const TYPE: u64 = 0x1f;
const T_CLASS: u64 = 0x02;
const T_MODULE: u64 = 0x03;
const T_STRING: u64 = 0x05;
const T_ARRAY: u64 = 0x07;
const T_IMEMO: u64 = 0x1a;
/// What stays behind where something was moved away when memory was compacted, and where in it the new place is.
const T_MOVED: u64 = 0x1e;
const MOVED_TO: u64 = 16;
const USER_1: u64 = 1 << 13;

/// Kinds of internal objects, above the type.
const IMEMO_METHOD: u64 = 6;
const IMEMO_ISEQ: u64 = 7;

/// The environment's flags say that its frame is one of a method written in C.
const MAGIC: u64 = 0x7fff_0001;
const MAGIC_C: u64 = 0x5555_0001;

/// Names of methods have ids above those of operators; the lowest bits tell what kind of name it is.
const LAST_OPERATOR: u64 = 0xa9;
const ID_SCOPE_BITS: u32 = 4;
/// Names are in a list of lists, each with this many, and for each its string and its symbol.
const NAMES_IN_LIST: u64 = 512;

/// A Ruby virtual machine in some process.
pub(crate) struct Ruby {
    /// Address of the pointer to the machine.
    machine: u64,
    /// Address of the pointer to the list of all names; `None` if it was not found.
    names: Option<u64>,
    offsets: Offsets,
}

/// Version of the interpreter, from the address of `ruby_version`.
pub(crate) fn version(memory: &Live, address: u64) -> Result<String> {
    memory.c_string(address, "version")
}

impl Offsets {
    fn of(version: &str) -> Result<Self> {
        match version.rsplit_once('.') {
            Some(("3.1", _)) => Ok(V3_1),
            Some(("3.3", _)) => Ok(V3_3),
            _ => bail!("only 3.1 and 3.3 are understood"),
        }
    }
}

impl Ruby {
    /// One whose data is known to be at these places.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn at(machine: u64, names: Option<u64>, version: &str) -> Result<Self> {
        Ok(Self { machine, names, offsets: Offsets::of(version)? })
    }

    /// Makes sure that this machine's data can be understood. `bias` is what to add to addresses in `elf`.
    pub(crate) fn new(elf: &Elf, bias: u64, version: &str) -> Result<Self> {
        let offsets = Offsets::of(version)?;
        let [machine, names] = elf.symbols(["ruby_current_vm_ptr", "ruby_global_symbols"]);
        let machine = machine.or_else(|| machine_in_code(elf));
        let machine = machine.context("neither a symbol nor known code tells where its machine is")?;
        // Behind a number and a table by name.
        let names = names.map(|names| names.wrapping_add(16)).or_else(|| names_in_code(elf));
        Ok(Self {
            machine: machine.wrapping_add(bias),
            names: names.map(|names| names.wrapping_add(bias)),
            offsets,
        })
    }

    /// Frames of a thread, innermost first; `tid` is what the process itself calls it, `main` whether it is the
    /// first one.
    pub(crate) fn frames(&self, memory: &Live, tid: u32, main: bool) -> Result<Vec<Frame>> {
        let thread = self.thread(memory, tid, main)?;
        let links = snapshot::stable(|| self.chain(memory, thread))?;
        let frames = links.iter().filter_map(|link| self.frame(memory, link).transpose());
        frames.take(DEPTH_MAX).collect()
    }

    /// Address of the thread's data.
    fn thread(&self, memory: &Live, tid: u32, main: bool) -> Result<u64> {
        let machine = memory.field(self.machine, 0, "machine")?;
        ensure!(machine != 0, "its machine has not started");
        if main {
            // After a fork this is right, where ids may be the parent's.
            return memory.field(machine, VM_MAIN_THREAD, "main thread");
        }
        let mut left = LIST_MAX;
        for link in list(memory, machine.wrapping_add(VM_RACTORS))? {
            let ractor = link.wrapping_sub(self.offsets.ractor_link);
            for thread in list(memory, ractor.wrapping_add(self.offsets.ractor_threads))? {
                left = left.checked_sub(1).context("its lists of threads have no end")?;
                let native = match self.offsets.thread_native {
                    Some(offset) => memory.field(thread, offset, "native thread")?,
                    None => thread,
                };
                // A thread that waits for a native one has none.
                let id = memory.word(native.wrapping_add(self.offsets.native_tid)).filter(|_| native != 0);
                if id.is_some_and(|id| id & u64::from(u32::MAX) == u64::from(tid)) {
                    return Ok(thread);
                }
            }
        }
        bail!("thread {tid} is none of Ruby's")
    }

    /// The thread's frames, innermost first.
    fn chain(&self, memory: &Live, thread: u64) -> Result<Vec<Link>> {
        let context = memory.field(thread, self.offsets.thread_context, "context")?;
        let stack = memory.field(context, CONTEXT_STACK, "stack")?;
        let words = memory.field(context, CONTEXT_STACK_WORDS, "size of the stack")?;
        let first = memory.field(context, CONTEXT_FRAME, "current frame")?;
        let end = stack.checked_add(words.saturating_mul(8)).context("a stack is too long to be true")?;
        // Frames grow down from the stack's end.
        let bytes =
            end.checked_sub(first).filter(|_| first >= stack).context("a frame is not on the stack")?;
        let size = self.offsets.frame_size;
        ensure!(bytes % size == 0 && bytes / size <= CHAIN_MAX, "a frame is not on the stack");
        let frames = memory.bytes(first, usize::try_from(bytes)?, "frames")?;
        let links = frames.chunks(usize::try_from(size)?).zip(0..).map(|(frame, index)| {
            let word = |offset| word_in(frame, offset).context("a frame is too short");
            let (code, pc) = (word(FRAME_ISEQ)?, word(FRAME_PC)?);
            let environment = word(FRAME_ENVIRONMENT)?;
            let code = if code == 0 { environment | C_FRAME } else { code };
            Ok(Link { address: first + index * size, code, instruction: pc })
        });
        links.collect()
    }

    /// What people call a frame; `None` for those that are Ruby's own.
    fn frame(&self, memory: &Live, link: &Link) -> Result<Option<Frame>> {
        if link.code & C_FRAME != 0 {
            return self.c_frame(memory, link.code & !C_FRAME);
        }
        // Without an instruction pointer it is the one that every stack begins with.
        if link.instruction == 0 {
            return Ok(None);
        }
        check_imemo(memory, link.code, IMEMO_ISEQ)?;
        let body = memory.field(link.code, ISEQ_BODY, "method body")?;
        let line = self.line(memory, body, link.instruction)?;
        // The frame of TOPLEVEL_BINDING, below that of the script.
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

    /// The file a method is in, as its path was given.
    fn path(&self, memory: &Live, body: u64) -> Result<String> {
        let path = memory.field(body, BODY_PATH, "path")?;
        // The path, or an array of the path as given and in full.
        let path = if kind(memory, path)? == T_ARRAY { element(memory, path, 0)? } else { path };
        self.string(memory, path, "path")
    }

    /// What people call a block, by its code: of those in one method each is at another line.
    pub(crate) fn block_name(&self, memory: &Live, code: u64) -> Result<String> {
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
    pub(crate) fn class_name(&self, memory: &Live, class: u64) -> Result<String> {
        // While nothing else has its place, what was moved has left word of where it is.
        let class = match kind(memory, class)? {
            T_MOVED => memory.field(class, MOVED_TO, "class")?,
            _ => class,
        };
        ensure!(matches!(kind(memory, class)?, T_CLASS | T_MODULE), "what should be a class is none");
        let name = match self.offsets.class_name {
            Some(offset) => memory.field(class, offset, "class name")?,
            None => self.name_variable(memory, class)?,
        };
        ensure!(name != 0, "a class has no name");
        self.string(memory, name, "class name")
    }

    /// What a class's variable is that has its name; zero if there is none.
    fn name_variable(&self, memory: &Live, class: u64) -> Result<u64> {
        /// No Ruby code can give a variable this name.
        const NAME: &str = "__classpath__";
        const CLASS_MORE: u64 = 24;
        const MORE_VARIABLES: u64 = 8;
        /// Of a table: where its entries are, and how many there are.
        const ENTRIES_END: u64 = 40;
        const ENTRIES: u64 = 48;
        /// Size of an entry: a hash, the name's id, the value.
        const ENTRY: u64 = 24;

        let names = self.names.context("where the names of variables are is not known")?;
        let more = memory.field(class, CLASS_MORE, "class")?;
        let variables = memory.field(more, MORE_VARIABLES, "variables")?;
        if variables == 0 {
            return Ok(0);
        }
        let entries = memory.field(variables, ENTRIES, "variables")?;
        let end = memory.field(variables, ENTRIES_END, "variables")?;
        for number in 0..end.min(VARIABLES_MAX) {
            let entry = entries.wrapping_add(number * ENTRY);
            let id = memory.field(entry, 8, "variable")?;
            // What was removed has no name.
            if self.name(memory, names, id).is_ok_and(|name| name == NAME) {
                return memory.field(entry, 16, "class name");
            }
        }
        Ok(0)
    }

    /// A method written in C, by its Ruby name.
    fn c_frame(&self, memory: &Live, environment: u64) -> Result<Option<Frame>> {
        let flags = memory.field(environment, 0, "environment")?;
        if flags & MAGIC != MAGIC_C {
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
        Ok(Some(Frame { function, module: None, file: None, line: None }))
    }

    /// The name behind an id.
    fn name(&self, memory: &Live, names: u64, id: u64) -> Result<String> {
        let number = if id > LAST_OPERATOR { id >> ID_SCOPE_BITS } else { id };
        let lists = memory.field(names, 0, "list of names")?;
        let list = element(memory, lists, number / NAMES_IN_LIST)?;
        let name = element(memory, list, number % NAMES_IN_LIST * 2)?;
        self.string(memory, name, "method name")
    }

    /// Content of a string.
    fn string(&self, memory: &Live, object: u64, what: &str) -> Result<String> {
        ensure!(kind(memory, object)? == T_STRING, "{what} is no string");
        let flags = memory.field(object, 0, what)?;
        let elsewhere = flags & USER_1 != 0;
        let size = if self.offsets.string_has_length || elsewhere {
            memory.field(object, 16, what)?
        } else {
            flags >> 14 & 0x1f
        };
        let data = match (elsewhere, self.offsets.string_has_length) {
            (true, _) => memory.field(object, 24, what)?,
            (false, true) => object.wrapping_add(24),
            (false, false) => object.wrapping_add(16),
        };
        text(memory.bytes(data, length(size, what)?, what)?, what)
    }

    /// The line an instruction pointer is at.
    fn line(&self, memory: &Live, body: u64, pc: u64) -> Result<u32> {
        /// Size of an entry, which begins with the line.
        const ENTRY: u64 = 12;

        let insns = body.wrapping_add(self.offsets.body_insns);
        let entries = memory.field(insns, 0, "table of lines")?;
        let size = memory.field(insns, INSNS_SIZE, "table of lines")? & u64::from(u32::MAX);
        let code = memory.field(body, BODY_CODE, "code")?;
        // It points behind the instruction that is being executed.
        let position =
            (pc.checked_sub(code).context("an instruction is not in its method")? / 8).saturating_sub(1);
        let entry = match size {
            0 => bail!("a method has no lines"),
            1 => 0,
            _ => {
                let index = memory.field(insns, INSNS_INDEX, "index of lines")?;
                rank(memory, index, position)?.checked_sub(1).context("an instruction has no line")?
            }
        };
        ensure!(entry < size, "an instruction has no line");
        let line = memory.field(entries.wrapping_add(entry * ENTRY), 0, "line")? & u64::from(u32::MAX);
        Ok(u32::try_from(line)?)
    }
}

/// Marks, in a link, that what follows is the environment of a frame without code. Addresses are even.
const C_FRAME: u64 = 1;

/// How many entries of a method's table of lines start at or before a position: Ruby's `succ_index_lookup`.
fn rank(memory: &Live, index: u64, position: u64) -> Result<u64> {
    /// Positions whose rank is in the table itself, nine of seven bits a word.
    const IMMEDIATE: u64 = 54;
    /// Then blocks of 512 positions: the rank before it, those of its eight words, a bit for each position.
    const BLOCK: u64 = 512;
    const BLOCK_SIZE: u64 = 8 + 8 + BLOCK / 8;

    let Some(beyond) = position.checked_sub(IMMEDIATE) else {
        let word = memory.field(index, position / 9 * 8, "index of lines")?;
        return Ok(word >> (position % 9 * 7) & 0x7f);
    };
    let block = index.wrapping_add(IMMEDIATE / 9 * 8 + beyond / BLOCK * BLOCK_SIZE);
    let (word, bit) = (beyond % BLOCK / 64, beyond % 64);
    let before_block = memory.field(block, 0, "index of lines")? & u64::from(u32::MAX);
    let before_word = match word {
        0 => 0,
        _ => memory.field(block, 8, "index of lines")? >> ((word - 1) * 9) & 0x1ff,
    };
    let bits = memory.field(block, 16 + word * 8, "index of lines")?;
    Ok(before_block + before_word + u64::from((bits << (63 - bit)).count_ones()))
}

/// Members of a linked list, by the addresses of their links.
fn list(memory: &Live, head: u64) -> Result<Vec<u64>> {
    let mut members = Vec::new();
    let mut link = memory.field(head, 0, "list")?;
    while link != head {
        ensure!(members.len() < LIST_MAX, "a list has no end");
        members.push(link);
        link = memory.field(link, 0, "list")?;
    }
    Ok(members)
}

/// Type of an object.
fn kind(memory: &Live, object: u64) -> Result<u64> {
    Ok(memory.field(object, 0, "object")? & TYPE)
}

/// Makes sure that an internal object is of the kind it should be.
fn check_imemo(memory: &Live, object: u64, wanted: u64) -> Result<()> {
    let flags = memory.field(object, 0, "internal object")?;
    ensure!(
        flags & TYPE == T_IMEMO && flags >> 12 & 0xf == wanted,
        "an internal object is not what it should be"
    );
    Ok(())
}

/// An element of an array.
fn element(memory: &Live, array: u64, index: u64) -> Result<u64> {
    ensure!(kind(memory, array)? == T_ARRAY, "what should be an array is none");
    let in_place = memory.field(array, 0, "array")? & USER_1 != 0;
    let data = if in_place { array.wrapping_add(16) } else { memory.field(array, 32, "array")? };
    memory.field(data, index.checked_mul(8).context("an index is too high")?, "array element")
}

/// Where the pointer to the machine is, by the code that reads it, where symbols are stripped.
fn machine_in_code(elf: &Elf) -> Option<u64> {
    let [reader] = elf.symbols(["rb_gc_count"]);
    // lea POINTER(%rip), %rax; mov (%rax), %rax
    elf.target_in_code(reader?, &[0x48, 0x8d, 0x05], &[0x48, 0x8b, 0x00])
}

/// Where the pointer to the list of names is: it follows that to the table of names, which is asked for its size.
fn names_in_code(elf: &Elf) -> Option<u64> {
    let [reader] = elf.symbols(["rb_sym_all_symbols"]);
    // mov POINTER(%rip), %rax; mov 0x10(%rax), %rdi
    Some(elf.target_in_code(reader?, &[0x48, 0x8b, 0x05], &[0x48, 0x8b, 0x78, 0x10])?.wrapping_add(8))
}
