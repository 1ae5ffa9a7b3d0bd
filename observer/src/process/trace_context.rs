//! Locates OpenTelemetry's thread context (OTEP 4947) in a process: the module that exports the thread-local variable,
//! and the variable's offset in each thread.

use std::{fs, os::unix::fs::MetadataExt as _};

use observer_common::deferred::ThreadLocal;

use crate::{
    arch::tls::{Slot, TlsVariable},
    binary::{
        elf::Elf,
        mappings::{Mappings, module_name},
        memory::{Memory as _, ProcessMemory},
    },
};

/// The thread-local variable: a pointer to the thread's published context.
const VARIABLE: &str = "otel_thread_ctx_v1";

/// Upper bound of TLS module ids: a larger value in a slot is not a module id.
const MAX_MODULES: u64 = 1 << 16;

/// Location of the variable; `None` if the process publishes no context, or if the location cannot be determined.
pub(crate) fn published(mappings: &Mappings) -> Option<ThreadLocal> {
    find(mappings, VARIABLE)
}

fn find(mappings: &Mappings, name: &str) -> Option<ThreadLocal> {
    let program = fs::metadata(format!("/proc/{}/exe", mappings.pid)).ok()?.ino();
    let memory = ProcessMemory::of(mappings.pid).ok()?;
    let has_glibc = ["libc.so.6", "libc-2."].iter().any(|name| mappings.modules_named(name).next().is_some());
    // The executable first, as in the dynamic loader's symbol lookup.
    let mut modules: Vec<_> = mappings.modules().collect();
    modules.sort_by_key(|map| map.inode != program);
    modules.into_iter().find_map(|map| {
        let elf = Elf::open(&mappings.open(map).ok()?).ok()?;
        let variable = elf.variable(name)?;
        if map.inode == program {
            return Some(ThreadLocal::new(0, variable.in_program.try_into().ok()?));
        }
        let bias = elf.bias(map)?;
        let word = |address: u64| memory.word(address);
        let mut places = variable
            .slots
            .iter()
            .filter_map(|&(slot, at)| resolve(&variable, slot, at.wrapping_add(bias), word));
        // The offsets of the thread's module table are those of glibc; other C libraries differ.
        let found = places.find(|place| place.module() == 0 || has_glibc);
        if found.is_none() {
            let module = module_name(map).unwrap_or_default();
            log::debug!("process {}: cannot locate the trace context variable of {module}", mappings.pid);
        }
        found
    })
}

/// Location of the variable according to the relocation slot at `address`; `None` if the loader has not filled it in
/// yet.
fn resolve(
    variable: &TlsVariable,
    slot: Slot,
    address: u64,
    word: impl Fn(u64) -> Option<u64>,
) -> Option<ThreadLocal> {
    let from_thread_pointer = |distance: u64| {
        let distance = i32::try_from(distance.cast_signed()).ok().filter(|&distance| distance < 0)?;
        Some(ThreadLocal::new(0, distance))
    };
    let in_module = |module: u64| {
        let module =
            u32::try_from(module).ok().filter(|module| (1..MAX_MODULES).contains(&u64::from(*module)))?;
        Some(ThreadLocal::new(module, variable.offset.try_into().ok()?))
    };
    match slot {
        Slot::Distance => from_thread_pointer(word(address)?),
        Slot::Module => in_module(word(address)?),
        Slot::Descriptor => {
            let argument = word(address.wrapping_add(8))?;
            from_thread_pointer(argument).or_else(|| {
                let offset = word(argument.wrapping_add(8))?;
                if offset == variable.offset { in_module(word(argument)?) } else { None }
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    /// Python prints the offset of its C library's `errno` from the thread pointer.
    #[test]
    fn a_thread_local_variable_of_the_c_library_is_located() {
        const SCRIPT: &str = "import ctypes
c = ctypes.CDLL(None)
for f in c.__errno_location, c.pthread_self:
    f.restype = ctypes.c_void_p
print(c.__errno_location() - c.pthread_self(), flush=True)
input()";
        let mut python = Command::new("/usr/bin/python3")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(python.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let mappings = Mappings::of(python.id()).unwrap();
        let found = find(&mappings, "errno");
        let none = find(&mappings, "no_such_variable");
        // The script exits when its standard input is closed.
        drop(python.stdin.take());
        python.wait().unwrap();
        assert_eq!(found, Some(ThreadLocal::new(0, line.trim().parse().unwrap())));
        assert_eq!(none, None);
    }

    const EXAMPLE: TlsVariable = TlsVariable { offset: 0x110, in_program: -8, slots: Vec::new() };

    fn found(slot: Slot, words: &[(u64, u64)]) -> Option<ThreadLocal> {
        resolve(&EXAMPLE, slot, 0x1000, |address| {
            words.iter().find(|(at, _)| *at == address).map(|(_, word)| *word)
        })
    }

    #[test]
    fn each_kind_of_slot_leads_to_the_variable() {
        let minus = 64_u64.wrapping_neg();
        let static_location = Some(ThreadLocal::new(0, -64));
        let module_location = Some(ThreadLocal::new(3, 0x110));
        assert_eq!(found(Slot::Distance, &[(0x1000, minus)]), static_location);
        assert_eq!(found(Slot::Module, &[(0x1000, 3)]), module_location);
        assert_eq!(found(Slot::Descriptor, &[(0x1000, 1), (0x1008, minus)]), static_location);
        let dynamic = [(0x1000, 1), (0x1008, 0x2000), (0x2000, 3), (0x2008, 0x110)];
        assert_eq!(found(Slot::Descriptor, &dynamic), module_location);
    }

    #[test]
    fn an_unresolved_slot_yields_no_location() {
        for slot in [Slot::Distance, Slot::Module, Slot::Descriptor] {
            assert_eq!(found(slot, &[(0x1000, 0), (0x1008, 0)]), None, "{slot:?}");
            assert_eq!(found(slot, &[]), None, "{slot:?}");
        }
        // Lazy binding: the argument still points to the file's relocation record.
        let unresolved = [(0x1008, 0x2000), (0x2000, 0xa37888), (0x2008, 0x1a9_0000_0024)];
        assert_eq!(found(Slot::Descriptor, &unresolved), None);
    }

    #[test]
    fn module_and_offset_are_packed_separately() {
        let location = ThreadLocal::new(7, -9);
        assert_eq!((location.module(), location.offset()), (7, -9));
        assert_ne!(ThreadLocal::new(0, -1), ThreadLocal::NONE);
    }
}
