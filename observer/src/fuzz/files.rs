//! Targets for files of observed processes: programs and libraries, their code, unwind tables and symbols, and the perf
//! maps that JIT compilers write.

use std::{fs, os::fd::AsRawFd as _, sync::LazyLock};

use memmap2::MmapOptions;
use object::elf::{PF_R, PF_X, PT_LOAD};
use observer_common::deferred::register;

use super::input::{choice, file, number};
use crate::{
    arch::{accessor::PointerChain, instructions, registers::Registers},
    binary::{
        elf::{Elf, matches_pattern},
        mappings::Mappings,
        memory::StackCopy,
    },
    stacks::{
        symbols::{self, Symbols},
        unwind::{DEPTH_MAX, Unwinder},
    },
};

/// Symbols that profiles use, and a name that no symbol has.
const NAMES: [&str; 6] =
    ["_PyRuntime", "ruby_version", "uv_run", "main", "otel_thread_ctx_v1", "no such name"];

/// An ELF file: calls every function of [`Elf`].
pub(super) fn elf(data: &[u8]) {
    // A debug file is read separately, without most of its content.
    let debug = Elf::open_symbols(&file(data));
    let Ok(elf) = Elf::from_bytes(data) else { return };
    if let Ok(debug) = debug {
        assert!(debug.has_symbols());
        let (_, _) = (debug.all_symbols(&NAMES), debug.build_id());
    }
    let (_, _) = (elf.start(), elf.has_symbols());
    let symbols = elf.symbols(NAMES);
    assert_eq!(symbols.to_vec(), elf.all_symbols(&NAMES));
    for name in ["*", "main", "Py*_*", NAMES[5]] {
        let functions = elf.functions(name);
        assert!(functions.is_sorted_by(|one, other| one < other));
        for &address in functions.iter().take(16) {
            check_address(&elf, address, data.len());
        }
    }
    for address in symbols.into_iter().flatten().chain([0, u64::MAX]) {
        check_address(&elf, address, data.len());
        let _ = elf.target_in_code(address, &[0x48, 0x8d, 0x05], &[0x48, 0x8b, 0x00]);
    }
    for section in ["eh_frame", "eh_frame_hdr", "note.stapsdt", "debug_frame", "text"] {
        if let Some((addresses, bytes)) = elf.section(format!(".{section}").as_bytes()) {
            assert!(addresses.start <= addresses.end && bytes.len() <= data.len());
        }
    }
    for (provider, name) in [("python", "gc__start"), ("ruby", "gc__mark__begin")] {
        // Each note takes at least a header, three numbers and a name.
        assert!(elf.usdt(provider, name).len() <= data.len() / 36);
    }
    assert!(elf.build_id().is_none_or(|id| id.len() <= data.len()));
    assert!(elf.debug_link().is_none_or(|(name, _)| name.len() <= data.len()));
    assert!(elf.variable(NAMES[4]).is_none_or(|variable| variable.slots.len() <= data.len() / 16));
    let maps = Mappings::parse(1, b"7f0000001000-7f0000003000 r-xp 00001000 08:01 5 /lib/a.so\n");
    let _ = elf.bias(maps.find(0x7f00_0000_1000).expect("the address is mapped"));
}

/// Checks what a file of `length` bytes has at an address.
fn check_address(elf: &Elf, address: u64, length: usize) {
    let _ = elf.file_offset(address);
    assert!(elf.code(address, 64).is_none_or(|code| code.len() == 64));
    assert!(elf.code_from(address).is_none_or(|code| !code.is_empty() && code.len() <= length));
}

/// The code of a function, which is the only code of its file: addresses for probes, and chains of pointers.
pub(super) fn code(data: &[u8]) {
    let (layout, code) = choice(data);
    let (read, code) = choice(code);
    let length = code.len() as u64;
    let address = match layout & 3 {
        0 => 0x1000,
        1 => 0x5555_5555_5000,
        2 => u64::MAX - length,
        _ => 0,
    };
    let function = address.saturating_add(u64::from(layout >> 2).min(length.saturating_sub(1)));
    let Ok(elf) = Elf::from_bytes(&program_of(address, code)) else { return };
    let is_inside = |found: u64| found >= address && found - address < length;
    let read: Vec<_> = (0..8).filter(|bit| read & 1 << bit != 0).collect();
    let entry = instructions::entry(&elf, function, &read);
    assert!(entry.is_none_or(|found| is_inside(found) && found >= function));
    for needs_result in [false, true] {
        for end in instructions::ends(&elf, function, needs_result).unwrap_or_default() {
            assert!(is_inside(end.address) && end.result < register::OTHERS + 16);
        }
    }
    let _ = instructions::jump_target(&elf, function);
    if let Some(chain) = PointerChain::of(code, address) {
        let _ = chain.follow(&StackCopy { start: 0, bytes: data }, 0);
    }
}

/// An ELF file with a single segment of code.
fn program_of(address: u64, code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;

    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let length = code.len() as u64;
    [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec(),
        words(&[address, 64, 0]),
        b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0".to_vec(),
        words(&[
            u64::from(PT_LOAD) | u64::from(PF_R | PF_X) << 32,
            HEADERS,
            address,
            address,
            length,
            length,
            1,
        ]),
        code.to_vec(),
    ]
    .concat()
}

/// Unwind tables: the instruction pointer and the frame pointer of a thread, followed by an ELF file. All of the input is
/// also the content of the stack.
pub(super) fn unwind(data: &[u8]) {
    const MAPS: &[u8] = b"10000-30000 r-xp 00000000 08:01 5 /lib/a.so\n\
        40000-80000 r-xp 00001000 08:01 6 /lib/b.so\n";
    const STACK: u64 = 0x7fff_0000;

    let (ip, rest) = number(data);
    let (bp, content) = number(rest);
    let Ok(elf) = Elf::from_bytes(content) else { return };
    let mappings = Mappings::parse(1, MAPS);
    let mut unwinder = Unwinder::default();
    for address in [0x1_0000, 0x4_0000] {
        unwinder.add_module(elf.clone(), mappings.find(address).expect("the address is mapped"));
    }
    let registers = Registers { ip: 0x1_0000 + ip % 0x7_0000, sp: STACK, bp: STACK + bp % 0x1000 };
    let memory = StackCopy { start: STACK, bytes: data };
    let stack = unwinder.unwind(registers, &memory, &mappings);
    assert!(stack.addresses.len() <= DEPTH_MAX);
    assert!(stack.addresses.iter().all(|&address| mappings.code(address).is_some()));
    assert_eq!(unwinder.unwind(registers, &memory, &mappings).addresses, stack.addresses);
}

/// Symbols and debug information of a file, as `blazesym` reads them: an address, followed by the file.
pub(super) fn symbols(data: &[u8]) {
    let (address, content) = number(data);
    let file = file(content);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    for address in [address, 0x1000, 0x1040] {
        let frames = symbols::symbolize_file(path.as_ref(), address);
        assert!(frames.len() <= content.len() + 1);
    }
}

/// A perf map of this process, which has a page of executable memory without a file.
pub(super) fn perf_map(data: &[u8]) {
    static CODE: LazyLock<u64> = LazyLock::new(|| {
        let code = MmapOptions::new().len(4096).map_anon().and_then(memmap2::MmapMut::make_exec);
        let code = Box::leak(Box::new(code.expect("map executable memory")));
        code.as_ptr() as u64
    });

    let pid = std::process::id();
    let path = format!("/tmp/perf-{pid}.map");
    // `CODE` in the input stands for the address of the page, which differs between runs.
    let text = String::from_utf8_lossy(data).replace("CODE", &format!("{:x}", *CODE));
    fs::write(&path, &text).expect("write the perf map");
    let mappings = Mappings::of(pid).expect("read the mappings of this process");
    let frames = Symbols::default().of_process(&mappings, &[*CODE, *CODE + 100]);
    assert!(frames.len() == 2);
    fs::remove_file(path).expect("remove the perf map");
}

/// A pattern with `*`, and a name that it may match.
pub(super) fn names(pattern: &str, name: &[u8]) {
    assert_eq!(
        matches_pattern(pattern, name),
        matches_slowly(pattern.as_bytes(), name),
        "{pattern} {name:?}"
    );
}

/// Reference implementation of [`matches_pattern`]: tracks the lengths of `name` that the pattern so far can match.
fn matches_slowly(pattern: &[u8], name: &[u8]) -> bool {
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for &byte in pattern {
        if byte == b'*' {
            let first = reached.iter().position(|&is| is).unwrap_or(reached.len());
            reached[first..].fill(true);
        } else {
            for at in (0..name.len()).rev() {
                reached[at + 1] = reached[at] && name[at] == byte;
            }
            reached[0] = false;
        }
    }
    reached[name.len()]
}
