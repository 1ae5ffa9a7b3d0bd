//! Names the kinds of deferred tasks, each of which is a value in a process's memory.

use std::collections::{HashMap, hash_map::Entry};

use anyhow::{Context as _, Result, bail};

use super::{interpreter::Interpreter, naming::Naming, symbols::Symbols};
use crate::binary::{
    mappings::Mappings,
    memory::{Memory as _, ProcessMemory},
};

/// Resolves names of kinds.
#[derive(Default)]
pub(crate) struct TaskNames {
    symbols: Symbols,
    /// By process id; `None` for one without an interpreter.
    interpreters: HashMap<u32, Option<Interpreter>>,
}

impl TaskNames {
    /// The name of the kind that `value` stands for. Fails if the value cannot be read or has no name.
    pub(crate) fn of(&mut self, pid: u32, naming: Naming, value: u64) -> Result<String> {
        match naming {
            Naming::PythonCode | Naming::PythonType | Naming::RubyClass | Naming::RubyBlock => {
                self.prepare(pid)?.context("the process has no interpreter")?.name(naming, value)
            }
            Naming::Function => self.function(pid, value),
            Naming::Vtable => {
                let function = ProcessMemory::of(pid)?.word(value).context("its table cannot be read")?;
                let name = self.function(pid, function)?;
                // Without type parameters the symbol is the same for all types, so the table's address distinguishes them.
                Ok(if name.contains('<') { name } else { format!("{name} by {:#x}", value & 0xff_ffff) })
            }
            Naming::String => ProcessMemory::of(pid)?.c_string(value, "name"),
            Naming::SameWork => bail!("it continues another task and has no kind"),
        }
    }

    /// Looks up and caches the interpreter of a process, which takes longer than to resolve a name with it.
    pub(crate) fn prepare(&mut self, pid: u32) -> Result<Option<&Interpreter>> {
        let interpreter = match self.interpreters.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(entry) => entry.insert(Interpreter::of(pid)?),
        };
        Ok(interpreter.as_ref())
    }

    /// Drops the interpreter of a process that has exited or runs another program.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.interpreters.remove(&pid);
    }

    /// The name of the native function at an address.
    fn function(&mut self, pid: u32, address: u64) -> Result<String> {
        let frames = self.symbols.of_process(&Mappings::of(pid)?, &[address]);
        // The last frame is the function itself; those before it are inlined into it.
        frames.into_iter().next_back().map(|frame| frame.function).context("no function is mapped there")
    }
}
