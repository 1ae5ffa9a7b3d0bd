//! TaskNames of what stands for a kind of deferred work in a process's memory.

use std::collections::{HashMap, hash_map::Entry};

use anyhow::{Context as _, Result, bail};

use super::{
    interpreter::Interpreter,
    mappings::Mappings,
    memory::{Live, Memory as _},
    naming::Naming,
    symbols::Symbols,
};

/// Makes names.
#[derive(Default)]
pub(crate) struct TaskNames {
    symbols: Symbols,
    /// By process id; `None` for one without an interpreter.
    interpreters: HashMap<u32, Option<Interpreter>>,
}

impl TaskNames {
    /// What people call a value. An error says why nobody knows.
    pub(crate) fn of(&mut self, pid: u32, naming: Naming, value: u64) -> Result<String> {
        match naming {
            Naming::PythonCode | Naming::PythonType | Naming::RubyClass | Naming::RubyBlock => {
                self.prepare(pid)?.context("no interpreter is there")?.name(naming, value)
            }
            Naming::Function => self.function(pid, value),
            Naming::Vtable => {
                let function = Live::of(pid)?.word(value).context("its table is not there")?;
                let name = self.function(pid, function)?;
                // Symbols without types are the same for all types.
                Ok(if name.contains('<') { name } else { format!("{name} by {:#x}", value & 0xff_ffff) })
            }
            Naming::String => Live::of(pid)?.c_string(value, "name"),
            Naming::SameWork => bail!("it is no work of its own"),
        }
    }

    /// Finds the interpreter of a process, which takes longer than to ask it for a name.
    pub(crate) fn prepare(&mut self, pid: u32) -> Result<Option<&Interpreter>> {
        let interpreter = match self.interpreters.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Interpreter::of(pid)?),
        };
        Ok(interpreter.as_ref())
    }

    /// A process is gone, or runs another program now.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.interpreters.remove(&pid);
    }

    fn function(&mut self, pid: u32, address: u64) -> Result<String> {
        let frames = self.symbols.of_process(&Mappings::of(pid)?, &[address]);
        // What was inlined there is part of it.
        frames.into_iter().next_back().map(|frame| frame.function).context("nothing is there")
    }
}
