//! What a thread of any process is doing at this moment: by its interpreter's own account, or natively if it is blocked;
//! and what the kernel's clock has seen of one that computes.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    interpreter::Interpreter,
    mappings::Mappings,
    memory::Live,
    sampler::Sampler,
    symbols::Symbols,
    unwind::{Registers, Unwinder},
};
use crate::{
    model::frame::{Frame, Look},
    read::reactors::InSlice,
};

/// How long a process is taken to run the program that it was found to run; one that has another before fails to be
/// read, and is looked at anew.
const PROGRAM_KEPT: Duration = Duration::from_secs(10);
/// Processes whose interpreters are kept.
const PROGRAMS_MAX: usize = 64;

/// Looks at threads, and keeps what looking at one more needs.
#[derive(Default)]
pub(crate) struct StackReader {
    unwinder: Unwinder,
    symbols: Symbols,
    /// By process: its interpreter, if it has one, and when that was found.
    programs: HashMap<u32, (Instant, Option<Interpreter>)>,
}

/// What there is to see of a thread from here.
pub(super) enum ThreadState {
    /// Its stack, or why there is none.
    Stack(Look),
    /// It computes in native code, where only the kernel's clock can look. With the reason why its interpreter's own account could
    /// not be read, if it has one.
    Running(Option<String>),
}

impl StackReader {
    /// Looks at a thread, which takes some 40 ms where code is met for the first time, and one or two later.
    pub(super) fn look(&mut self, slice: InSlice) -> ThreadState {
        let InSlice { pid, tid, .. } = slice;
        match self.interpreted(pid, tid) {
            Ok(Some(frames)) => ThreadState::Stack(Look {
                frames,
                kernel: kernel_functions(pid, tid),
                missing: None,
                is_on_cpu: false,
            }),
            Ok(None) => self.native(slice, None),
            Err(why) => self.native(slice, Some(format!("{why:#}"))),
        }
    }

    /// What the clock has seen last, if it has seen anything new.
    pub(super) fn sampled(&mut self, pid: u32, sampler: &mut Sampler) -> Option<Look> {
        let mappings = Mappings::of(pid).ok()?;
        let Self { unwinder, symbols, .. } = self;
        let (stack, kernel) = sampler.latest(|registers, stack, kernel| {
            (unwinder.unwind(registers, stack, &mappings), kernel.to_vec())
        })?;
        let frames = symbols.of_process(&mappings, &stack.addresses);
        Some(Look { frames, kernel: symbols.of_kernel(&kernel), missing: stack.cut, is_on_cpu: true })
    }

    /// Functions as the process's interpreter has them, innermost first; `None` if it has no interpreter.
    fn interpreted(&mut self, pid: u32, tid: u32) -> Result<Option<Vec<Frame>>> {
        if let Some((found, known)) = self.programs.get(&pid)
            && found.elapsed() < PROGRAM_KEPT
        {
            let Some(interpreter) = known else { return Ok(None) };
            if let Ok(frames) = interpreter.frames(tid) {
                return Ok(Some(frames));
            }
        }
        let interpreter = Interpreter::of(pid).context("its memory cannot be read")?;
        let frames = interpreter.as_ref().map(|interpreter| interpreter.frames(tid)).transpose();
        if self.programs.len() == PROGRAMS_MAX {
            self.programs.clear();
        }
        self.programs.insert(pid, (Instant::now(), interpreter));
        frames
    }

    /// Native functions of a thread, for want of better ones for this reason.
    fn native(&mut self, slice: InSlice, why_native: Option<String>) -> ThreadState {
        let (frames, cut) = match self.unwound(slice) {
            Ok(Some(unwound)) => unwound,
            Ok(None) => return ThreadState::Running(why_native),
            Err(why) => (Vec::new(), Some(format!("{why:#}"))),
        };
        ThreadState::Stack(Look {
            frames,
            kernel: kernel_functions(slice.pid, slice.tid),
            missing: why_native.or(cut),
            is_on_cpu: false,
        })
    }

    /// Functions of a blocked thread, innermost first, and why the outermost are missing; `None` if it runs.
    fn unwound(&mut self, slice: InSlice) -> Result<Option<(Vec<Frame>, Option<String>)>> {
        let InSlice { pid, tid, frame_pointer, .. } = slice;
        let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).context("it is gone")?;
        let Some(registers) = blocked_at(&call, frame_pointer) else { return Ok(None) };
        let (mappings, memory) = (Mappings::of(pid)?, Live::of(pid)?);
        let stack = self.unwinder.unwind(registers, &memory, &mappings);
        Ok(Some((self.symbols.of_process(&mappings, &stack.addresses), stack.cut)))
    }
}

/// Functions of the kernel that a blocked thread is in, innermost first; none if it runs or nobody may know.
fn kernel_functions(pid: u32, tid: u32) -> Vec<String> {
    functions_in(&fs::read_to_string(format!("/proc/{pid}/task/{tid}/stack")).unwrap_or_default())
}

/// Understands the content of that file.
pub(crate) fn functions_in(stack: &str) -> Vec<String> {
    // `[<0>] do_nanosleep+0x5a/0x190`
    let functions = stack.lines().filter_map(|line| line.split("] ").nth(1)?.split('+').next());
    functions.map(str::to_owned).collect()
}

/// Understands `/proc/PID/task/TID/syscall`, which ends in the stack and instruction pointers; `running` otherwise. The
/// frame pointer it does not tell: where the programs could not either, and the tables ask for it, the stack ends.
pub(crate) fn blocked_at(call: &str, frame_pointer: u64) -> Option<Registers> {
    let mut words =
        call.split_whitespace().rev().map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (ip, sp) = (words.next()??, words.next()??);
    Some(Registers { ip, sp, bp: frame_pointer })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_two_words_are_registers() {
        let registers = blocked_at("35 0x1 0x2 0x0 0x0 0x0 0x0 0x7ffc10 0x7f0020\n", 8).unwrap();
        assert_eq!((registers.sp, registers.ip, registers.bp), (0x7f_fc10, 0x7f_0020, 8));
        assert!(blocked_at("running\n", 8).is_none());
    }

    #[test]
    fn this_thread_is_somewhere_in_the_kernel_while_it_reads_that() {
        let pid = std::process::id();
        let functions = kernel_functions(pid, nix::unistd::gettid().as_raw().cast_unsigned());
        assert!(functions.iter().any(|function| function.contains("read")), "{functions:?}");
    }
}
