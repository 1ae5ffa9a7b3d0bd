//! Reads the current stack of a thread of any process: from its interpreter's data, natively while it is blocked, or from
//! the latest `perf_event` sample while it runs native code.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    interpreter::{Interpreter, is_incomplete},
    sampler::Sampler,
    symbols::Symbols,
    unwind::Unwinder,
};
use crate::{
    arch::registers::Registers,
    binary::{mappings::Mappings, memory::ProcessMemory},
    model::frame::{Frame, RuntimeLock, StackSample},
    read::reactors::InSlice,
};

/// How long a process is assumed to run the interpreter that was found in it. If it calls `exec` before that, its frames
/// cannot be read, and the interpreter is looked up again.
const INTERPRETER_TTL: Duration = Duration::from_secs(10);
/// Maximum number of processes whose interpreters are cached.
const INTERPRETERS_MAX: usize = 64;
/// How often the stack of a blocked thread is read before it counts as running, because it ran on during each read. The
/// first read of a file's unwind table is long, the next ones are short.
const BLOCKED_READS: usize = 8;

/// Reads stacks, and caches unwind tables, symbols and interpreters.
#[derive(Default)]
pub(crate) struct StackReader {
    unwinder: Unwinder,
    symbols: Symbols,
    /// By process: its interpreter, if it has one, and when that was looked up.
    interpreters: HashMap<u32, (Instant, Option<Interpreter>)>,
}

/// The state in which a thread was found.
pub(super) enum ThreadState {
    /// Its stack could be read from outside, or the stack says why not.
    Stack(StackSample),
    /// It runs native code, so that only a `perf_event` sample can show its stack. With the reason why its interpreter's
    /// frames could not be read, if it has an interpreter.
    Running(Option<String>),
}

impl StackReader {
    /// Reads the stack of a thread. This takes about 40 ms the first time that code of a file is seen, and 1 to 2 ms later.
    pub(super) fn read(&mut self, slice: InSlice) -> ThreadState {
        let InSlice { pid, tid, .. } = slice;
        match self.interpreter_frames(pid, tid) {
            Ok(Some((frames, lock))) => ThreadState::Stack(StackSample {
                frames,
                kernel: kernel_functions(pid, tid),
                lock,
                ..StackSample::default()
            }),
            Ok(None) => self.native(slice, None),
            Err(why) => self.native(slice, Some(format!("{why:#}"))),
        }
    }

    /// The stack in the latest sample; `None` without a new sample.
    pub(super) fn sampled(&mut self, pid: u32, sampler: &mut Sampler) -> Option<StackSample> {
        let mappings = Mappings::of(pid).ok()?;
        let Self { unwinder, symbols, .. } = self;
        let (stack, kernel) = sampler.latest(|registers, stack, kernel| {
            (unwinder.unwind(registers, stack, &mappings), kernel.to_vec())
        })?;
        let frames = symbols.of_process(&mappings, &stack.addresses);
        let problem = symbols.take_problem(&frames);
        Some(StackSample {
            frames,
            kernel: symbols.of_kernel(&kernel),
            missing: problem.or(stack.truncated),
            is_on_cpu: true,
            lock: None,
        })
    }

    /// Frames from the process's interpreter, innermost first, and the lock of the interpreter that the thread waits for;
    /// `None` if it has no interpreter.
    fn interpreter_frames(
        &mut self,
        pid: u32,
        tid: u32,
    ) -> Result<Option<(Vec<Frame>, Option<RuntimeLock>)>> {
        let read = |interpreter: &Interpreter| {
            let lock = interpreter.awaited_lock(tid);
            let mut frames = interpreter.frames(tid)?;
            if lock.is_some() {
                // Python's innermost function is the last one that ran.
                frames.insert(0, interpreter.lock_frame());
            }
            anyhow::Ok((frames, lock))
        };
        if let Some((found, known)) = self.interpreters.get(&pid)
            && found.elapsed() < INTERPRETER_TTL
        {
            let Some(interpreter) = known.as_ref().filter(|known| !known.is_native()) else {
                return Ok(None);
            };
            if let Ok(found) = read(interpreter) {
                return Ok(Some(found));
            }
        }
        let interpreter = Interpreter::of(pid).context("the process's memory cannot be read")?;
        let frames = interpreter.as_ref().filter(|found| !found.is_native()).map(read).transpose();
        if self.interpreters.len() == INTERPRETERS_MAX {
            self.interpreters.clear();
        }
        self.interpreters.insert(pid, (Instant::now(), interpreter));
        frames
    }

    /// Reads the native stack of a thread. `interpreter_error` is why its interpreter's frames could not be read.
    fn native(&mut self, slice: InSlice, interpreter_error: Option<String>) -> ThreadState {
        let (frames, missing) = match self.blocked_frames(slice) {
            Ok(Some(unwound)) => unwound,
            Ok(None) => return ThreadState::Running(interpreter_error),
            Err(why) => (Vec::new(), Some(format!("{why:#}"))),
        };
        let missing = interpreter_error.filter(|why| is_incomplete(why, &frames)).or(missing);
        ThreadState::Stack(StackSample {
            frames,
            kernel: kernel_functions(slice.pid, slice.tid),
            missing,
            is_on_cpu: false,
            lock: None,
        })
    }

    /// Native frames of a blocked thread, innermost first, and why the outermost are missing; `None` if the thread runs.
    ///
    /// The thread is not stopped. If it is at another place after the read, what was read may mix several stacks and is
    /// discarded.
    fn blocked_frames(&mut self, slice: InSlice) -> Result<Option<(Vec<Frame>, Option<String>)>> {
        let InSlice { pid, tid, frame_pointer, .. } = slice;
        let path = format!("/proc/{pid}/task/{tid}/syscall");
        let registers = || {
            let call = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            anyhow::Ok(blocked_registers(&call, frame_pointer))
        };
        let mut before = registers()?;
        for _ in 0..BLOCKED_READS {
            let Some(blocked) = before else { return Ok(None) };
            let (mappings, memory) = (Mappings::of(pid)?, ProcessMemory::of(pid)?);
            let stack = self.unwinder.unwind(blocked, &memory, &mappings);
            let after = registers()?;
            if after == before {
                let frames = self.symbols.of_process(&mappings, &stack.addresses);
                let problem = self.symbols.take_problem(&frames);
                return Ok(Some((frames, problem.or(stack.truncated))));
            }
            before = after;
        }
        Ok(None)
    }
}

/// Kernel functions that a blocked thread is in, innermost first; empty if it runs or without the right to read them.
fn kernel_functions(pid: u32, tid: u32) -> Vec<String> {
    parse_kernel_stack(&fs::read_to_string(format!("/proc/{pid}/task/{tid}/stack")).unwrap_or_default())
}

/// Parses `/proc/PID/task/TID/stack`.
pub(crate) fn parse_kernel_stack(stack: &str) -> Vec<String> {
    // `[<0>] do_nanosleep+0x5a/0x190`
    let functions = stack.lines().filter_map(|line| line.split("] ").nth(1)?.split('+').next());
    functions.map(str::to_owned).collect()
}

/// Parses `/proc/PID/task/TID/syscall`, which ends with the stack and the instruction pointer; `None` if it reads
/// `running`. The file does not have the frame pointer, so it comes from the eBPF programs. Where it is unknown (0) and
/// the unwind tables need it, the stack ends.
pub(crate) fn blocked_registers(call: &str, frame_pointer: u64) -> Option<Registers> {
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
        let registers = blocked_registers("35 0x1 0x2 0x0 0x0 0x0 0x0 0x7ffc10 0x7f0020\n", 8).unwrap();
        assert_eq!((registers.sp, registers.ip, registers.bp), (0x7f_fc10, 0x7f_0020, 8));
        assert!(blocked_registers("running\n", 8).is_none());
    }

    #[test]
    fn a_thread_that_reads_its_own_kernel_stack_is_in_a_read() {
        let pid = std::process::id();
        let functions = kernel_functions(pid, nix::unistd::gettid().as_raw().cast_unsigned());
        assert!(functions.iter().any(|function| function.contains("read")), "{functions:?}");
    }
}
