//! What a thread of any process is doing at this moment: by its interpreter's own account, or natively if it is blocked.

use std::fs;

use anyhow::{Context as _, Result};

use super::{
    interpreter::Interpreter,
    mappings::Mappings,
    memory::Live,
    symbols::Symbols,
    unwind::{Registers, Unwinder},
};
use crate::model::{frame::Frame, snapshot::Look};

/// Looks at threads, and keeps what looking at one more needs.
#[derive(Default)]
pub(crate) struct Looker {
    unwinder: Unwinder,
    symbols: Symbols,
}

impl Looker {
    /// Looks at a thread, which takes some 40 ms where code is met for the first time.
    pub(crate) fn look(&mut self, pid: u32, tid: u32) -> Look {
        // Not kept: the process may run another program by the next time, and this is rare.
        let interpreter = Interpreter::of(pid).context("its memory cannot be read");
        let mut why_native = None;
        if let Ok(Some(interpreter)) = &interpreter {
            match interpreter.frames(tid) {
                Ok(frames) => return Look { frames, missing: None },
                Err(why) => why_native = Some(format!("{why:#}")),
            }
        }
        let native = interpreter.and_then(|_| self.native(pid, tid));
        let (frames, cut) = native.unwrap_or_else(|why| (Vec::new(), Some(format!("{why:#}"))));
        Look { frames, missing: why_native.or(cut) }
    }

    /// Functions of a blocked thread, innermost first, and why the outermost are missing.
    fn native(&mut self, pid: u32, tid: u32) -> Result<(Vec<Frame>, Option<String>)> {
        let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).context("it is gone")?;
        let registers =
            blocked_at(&call).context("it runs; only a thread that is blocked can be looked at")?;
        let (mappings, memory) = (Mappings::of(pid)?, Live::of(pid)?);
        let stack = self.unwinder.unwind(registers, &memory, &mappings);
        Ok((self.symbols.of_process(&mappings, &stack.addresses), stack.cut))
    }
}

/// Understands `/proc/PID/task/TID/syscall`, which ends in the stack and instruction pointers; `running` otherwise. The
/// frame pointer it does not tell: where the tables ask for that, the stack ends.
fn blocked_at(call: &str) -> Option<Registers> {
    let mut words =
        call.split_whitespace().rev().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (ip, sp) = (words.next()??, words.next()??);
    Some(Registers { ip, sp, bp: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_two_words_are_registers() {
        let registers = blocked_at("35 0x1 0x2 0x0 0x0 0x0 0x0 0x7ffc10 0x7f0020\n").unwrap();
        assert_eq!((registers.sp, registers.ip), (0x7f_fc10, 0x7f_0020));
        assert!(blocked_at("running\n").is_none());
    }
}
