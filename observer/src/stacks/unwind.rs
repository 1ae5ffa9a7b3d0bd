//! Unwinds native stacks from registers and stack memory.
//!
//! Distributions build without frame pointers, so each module's `.eh_frame` is used. Frame pointers are followed where
//! there is none: in JIT-compiled code.

use std::{collections::HashMap, ops::Range};

use anyhow::{Context as _, Result};
use framehop::{FrameAddress, Module, ModuleSectionInfo, Unwinder as _};
use procfs::process::{MMapPath, MemoryMap};

use crate::{
    arch::registers::{Registers, Rules, Unwinder as Framehop},
    binary::{
        elf::{Bytes, Elf},
        mappings::{FileId, Mappings, file_id},
        memory::{Memory, ProcessMemory},
    },
};

/// Maximum number of frames of a stack.
pub(crate) const DEPTH_MAX: usize = 128;

/// Maximum number of modules whose unwind tables stay mapped. They take address space, and memory only where they are
/// read.
const MODULES_MAX: usize = 256;

/// A native stack.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    /// For each function an address inside its current instruction or call, innermost first.
    pub(crate) addresses: Vec<u64>,
    /// Why the outermost functions are missing; `None` if the stack is complete.
    pub(crate) truncated: Option<String>,
}

/// Unwinds stacks of any process, and caches the unwind tables of their modules.
#[derive(Default)]
pub(crate) struct Unwinder {
    /// `None` for a module that has no usable tables.
    modules: HashMap<ModuleKey, Option<Module<Bytes>>>,
}

/// A file, the start address of its mapping, and the offset of the mapping in the file. Tables are bound to an address.
type ModuleKey = (FileId, u64, u64);

impl Unwinder {
    /// Unwinds one stack. `memory` must be from the same moment as the registers: a copy, or the live memory of a
    /// thread that does not run.
    pub(crate) fn unwind(
        &mut self,
        registers: Registers,
        memory: &impl Memory,
        mappings: &Mappings,
    ) -> Stack {
        let mut stack = Stack { addresses: Vec::new(), truncated: None };
        let mut framehop = Framehop::new();
        // The cache is valid for one set of modules only.
        let mut rules = Rules::<_>::new();
        let mut read = |address| memory.word(address).ok_or(());
        let mut added = Vec::new();
        let mut state = registers.unwind_state();
        let mut at = FrameAddress::from_instruction_pointer(registers.ip);
        loop {
            let address = at.address_for_lookup();
            let Some(map) = mappings.code(address) else {
                stack.truncated = Some(format!("{address:#x} is not in executable memory"));
                break;
            };
            stack.addresses.push(address);
            if stack.addresses.len() == DEPTH_MAX {
                stack.truncated = Some(format!("only the innermost {DEPTH_MAX} frames are reported"));
                break;
            }
            if !added.contains(&map.address.0) {
                added.push(map.address.0);
                if let Some(module) = self.module(map, mappings) {
                    framehop.add_module(module);
                }
            }
            match framehop.unwind_frame(at, &mut state, &mut rules, &mut read) {
                Ok(Some(caller)) => match FrameAddress::from_return_address(caller) {
                    Some(caller) => at = caller,
                    None => break,
                },
                Ok(None) => break,
                Err(error) => {
                    stack.truncated = Some(error.to_string());
                    break;
                }
            }
        }
        stack
    }

    /// Uses `elf` for a mapping, whose file need not exist.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn add_module(&mut self, elf: Elf, map: &MemoryMap) {
        self.modules.insert((file_id(map), map.address.0, map.offset), bind(elf, map).ok());
    }

    /// The unwind tables of a mapped file, which are loaded on first use.
    fn module(&mut self, map: &MemoryMap, mappings: &Mappings) -> Option<Module<Bytes>> {
        let key = (file_id(map), map.address.0, map.offset);
        if let Some(known) = self.modules.get(&key) {
            return known.clone();
        }
        let module = load(map, mappings).ok();
        if self.modules.len() == MODULES_MAX {
            self.modules.clear();
        }
        self.modules.insert(key, module.clone());
        module
    }
}

/// Loads the unwind tables of a mapped file.
fn load(map: &MemoryMap, mappings: &Mappings) -> Result<Module<Bytes>> {
    let elf = match map.pathname {
        MMapPath::Vdso => vdso()?,
        _ => Elf::open(&mappings.open(map)?)?,
    };
    bind(elf, map)
}

/// Binds a file's unwind tables to the address of its mapping.
fn bind(elf: Elf, map: &MemoryMap) -> Result<Module<Bytes>> {
    let base = elf.bias(map).context("no segment of the file belongs to the mapping")?;
    Ok(Module::new(String::new(), map.address.0..map.address.1, base, elf))
}

impl ModuleSectionInfo<Bytes> for Elf {
    fn base_svma(&self) -> u64 {
        // `bind` passes the load bias as the base address, which is relative to address 0 of the file.
        0
    }

    fn section_svma_range(&mut self, name: &[u8]) -> Option<Range<u64>> {
        self.section(name).map(|(addresses, _)| addresses)
    }

    fn section_data(&mut self, name: &[u8]) -> Option<Bytes> {
        self.section(name).map(|(_, bytes)| bytes)
    }
}

/// Copies the vDSO from observer's own memory: it has no file, and is the same in all processes.
fn vdso() -> Result<Elf> {
    let pid = std::process::id();
    let mappings = Mappings::of(pid)?;
    let (start, end) = mappings.vdso().context("the kernel maps no vDSO")?;
    Elf::from_bytes(&ProcessMemory::of(pid)?.bytes(start, usize::try_from(end - start)?, "vdso")?)
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use std::{process::Command, time::Instant};

    use super::*;
    use crate::{
        binary::{
            memory::StackCopy,
            testing::{Program, find, is_asleep, registers, source, wait_for, while_stopped},
        },
        stacks::symbols::Symbols,
    };

    /// Three nested functions; the innermost sleeps (0), does arithmetic (1), or reads the clock through the vDSO (2).
    const CHAIN: &str = r#"
        #include <time.h>
        #include <stdlib.h>
        volatile unsigned long work;
        __attribute__((noinline)) void inner(int how) {
            struct timespec t = { 600, 0 };
            if (how == 0) nanosleep(&t, 0);
            while (how == 1) work++;
            while (how == 2) clock_gettime(CLOCK_MONOTONIC, &t);
            work++;
        }
        __attribute__((noinline)) void middle(int how) { inner(how); work++; }
        __attribute__((noinline)) void outer(int how) { middle(how); work++; }
        int main(int c, char **v) { outer(atoi(v[1])); return work; }
    "#;

    /// The four functions from `inner` on. Those further inside belong to the C library.
    fn from_inner(names: &[String]) -> &[String] {
        let at =
            names.iter().position(|name| name == "inner").unwrap_or_else(|| panic!("no inner in {names:?}"));
        &names[at..at + 4]
    }

    fn names(stack: &Stack, mappings: &Mappings) -> Vec<String> {
        let frames = Symbols::default().of_process(mappings, &stack.addresses);
        frames.into_iter().map(|frame| frame.function).collect()
    }

    /// Compiles the chain without frame pointers and starts it; `None` without a compiler.
    fn chain(test: &str, how: &str) -> Option<Program> {
        let compiler = find(test, "gcc")?;
        let folder = tempfile::tempdir().unwrap();
        let code = source(folder.path(), "chain.c", CHAIN);
        let program = folder.path().join("chain");
        let options = ["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-fno-ipa-cp", "-o"];
        assert!(Command::new(compiler).args(options).args([&program, &code]).status().unwrap().success());
        Some(Program::start(Command::new(program).arg(how)))
    }

    #[test]
    fn a_sleeper_without_frame_pointers_is_unwound_from_its_memory_and_from_a_copy() {
        let Some(program) = chain("a_sleeper_without_frame_pointers", "0") else { return };
        let pid = program.pid();
        wait_for("the sleep", || is_asleep(pid, pid));
        let mappings = Mappings::of(pid).unwrap();
        let live = ProcessMemory::of(pid).unwrap();
        let registers = registers(pid);

        let mut unwinder = Unwinder::default();
        let begun = Instant::now();
        let stack = unwinder.unwind(registers, &live, &mappings);
        let first = begun.elapsed();
        let begun = Instant::now();
        let again = unwinder.unwind(registers, &live, &mappings);
        eprintln!("unwound {} frames in {first:?}, then {:?}", stack.addresses.len(), begun.elapsed());
        assert_eq!(stack.addresses, again.addresses);
        let found = names(&stack, &mappings);
        assert_eq!(from_inner(&found), ["inner", "middle", "outer", "main"], "{found:?}");
        assert_eq!(stack.truncated, None);

        let bytes = live.bytes(registers.sp, 512, "stack").unwrap();
        let copy = StackCopy { start: registers.sp, bytes: &bytes };
        let copied = unwinder.unwind(registers, &copy, &mappings);
        assert_eq!(from_inner(&names(&copied, &mappings)), ["inner", "middle", "outer", "main"]);

        let short = StackCopy { start: registers.sp, bytes: &bytes[..64] };
        let short = unwinder.unwind(registers, &short, &mappings);
        assert!(short.truncated.is_some_and(|why| why.contains("read stack")));
        assert!(stack.addresses.starts_with(&short.addresses));
    }

    #[test]
    fn running_threads_are_unwound_also_from_inside_the_vdso() {
        for how in ["1", "2"] {
            let Some(program) = chain("running_threads_are_unwound", how) else { return };
            let pid = program.pid();
            let mut unwinder = Unwinder::default();
            let mut in_vdso = false;
            let reached = |found: &[String]| found.iter().any(|name| name == "inner").then_some(());
            wait_for("the loop", || {
                let (mappings, live) = (Mappings::of(pid).ok()?, ProcessMemory::of(pid).ok()?);
                let stack = while_stopped(pid, |registers| unwinder.unwind(registers, &live, &mappings));
                reached(&names(&stack, &mappings))
            });
            for _ in 0..50 {
                let mappings = Mappings::of(pid).unwrap();
                let live = ProcessMemory::of(pid).unwrap();
                let stack = while_stopped(pid, |registers| unwinder.unwind(registers, &live, &mappings));
                let found = names(&stack, &mappings);
                assert_eq!(from_inner(&found), ["inner", "middle", "outer", "main"], "{found:?}");
                in_vdso |= mappings.vdso().is_some_and(|(start, end)| {
                    stack.addresses.first().is_some_and(|address| (start..end).contains(address))
                });
            }
            assert_eq!(in_vdso, how == "2");
        }
    }

    #[test]
    fn node_is_unwound_and_its_functions_named_by_the_perf_map() {
        let Some(node) = find("node_is_unwound", "node") else { return };
        let script =
            "function inner() { Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 600000) }
            function middle() { inner(); return 1 }
            function outer() { middle(); return 1 }
            outer()";
        // `--interpreted-frames-native-stack` makes node write a file to its current folder.
        let folder = tempfile::tempdir().unwrap();
        let options = ["--perf-basic-prof", "--interpreted-frames-native-stack", "-e", script];
        let program = Program::start(Command::new(node).current_dir(&folder).args(options));
        let pid = program.pid();
        let mut unwinder = Unwinder::default();
        let found = wait_for("node's functions", || {
            let (mappings, live) = (Mappings::of(pid).ok()?, ProcessMemory::of(pid).ok()?);
            let stack = while_stopped(pid, |registers| unwinder.unwind(registers, &live, &mappings));
            let found = names(&stack, &mappings);
            found.iter().any(|name| name.contains("outer")).then_some(found)
        });
        let at = |wanted: &str| {
            let found = found.iter().position(|name| name.contains(wanted));
            found.unwrap_or_else(|| panic!("no {wanted}"))
        };
        assert!(at("inner") < at("middle") && at("middle") < at("outer") && at("outer") < at("node::Start"));
        std::fs::remove_file(format!("/tmp/perf-{pid}.map")).unwrap();
    }

    #[test]
    fn a_big_program_leaves_little_resident_memory() {
        /// Resident memory of this process, in KiB.
        fn resident() -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        }

        let Some(node) = find("a_big_program_leaves_little_resident", "node") else { return };
        let program = Program::start(Command::new(node).args(["-e", "setInterval(() => {}, 1000)"]));
        let pid = program.pid();
        // Node's bundled libuv waits with the first of these, Debian's with the second.
        let calls = [nix::libc::SYS_epoll_pwait, nix::libc::SYS_epoll_wait].map(|call| format!("{call} "));
        let waits = |call: String| calls.iter().any(|number| call.starts_with(number)).then_some(());
        wait_for("node's loop", || waits(std::fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?));
        let (mut unwinder, mut symbols) = (Unwinder::default(), Symbols::default());
        let before = resident();
        for round in ["first", "again"] {
            let (mappings, live) = (Mappings::of(pid).unwrap(), ProcessMemory::of(pid).unwrap());
            let registers = registers(pid);
            let begun = Instant::now();
            let stack = unwinder.unwind(registers, &live, &mappings);
            let unwound = begun.elapsed();
            let frames = symbols.of_process(&mappings, &stack.addresses);
            let named = begun.elapsed() - unwound;
            eprintln!("node, {round}: {} frames unwound in {unwound:?}, named in {named:?}", frames.len());
            assert!(frames.iter().any(|frame| frame.function == "uv_run"));
        }
        let grown = resident().saturating_sub(before);
        eprintln!("node: {grown} KiB more than before");
        assert!(grown < 8 * 1024);
    }

    #[test]
    fn an_address_outside_of_code_ends_the_stack() {
        let pid = std::process::id();
        let mappings = Mappings::of(pid).unwrap();
        let registers = Registers { ip: 8, sp: 16, bp: 24 };
        let stack = Unwinder::default().unwind(registers, &ProcessMemory::of(pid).unwrap(), &mappings);
        assert!(stack.addresses.is_empty());
        assert_eq!(stack.truncated.as_deref(), Some("0x8 is not in executable memory"));
    }
}
