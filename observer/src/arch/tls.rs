//! Thread-local variables that an x86-64 ELF file exports: their offset from the thread pointer in a process that runs
//! the file, and the relocations through which the dynamic loader says where they are in a process that has loaded it.

use object::{
    LittleEndian, Object as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SymbolKind,
    elf::{PT_TLS, R_X86_64_DTPMOD64, R_X86_64_TLSDESC, R_X86_64_TPOFF64},
    read::elf::ProgramHeader as _,
};

use crate::binary::elf::Elf;

/// A thread-local variable that a file exports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TlsVariable {
    /// Offset in the file's TLS block, in bytes.
    pub(crate) offset: u64,
    /// Offset from the thread pointer, in bytes, if the file is the program that a process runs.
    pub(crate) in_program: i64,
    /// Words that the loader fills in for this variable, with their addresses in the file.
    pub(crate) slots: Vec<(Slot, u64)>,
}

/// What the loader stores in such a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// The variable's offset from the thread pointer (`R_X86_64_TPOFF64`).
    Distance,
    /// The file's TLS module id (`R_X86_64_DTPMOD64`).
    Module,
    /// A TLS descriptor: a function and its argument (`R_X86_64_TLSDESC`).
    Descriptor,
}

impl Elf {
    /// Finds an exported thread-local variable by its name.
    pub(crate) fn variable(&self, name: &str) -> Option<TlsVariable> {
        let file = self.parsed();
        let symbol = file.dynamic_symbols().find(|symbol| {
            !symbol.is_undefined() && symbol.kind() == SymbolKind::Tls && symbol.name() == Ok(name)
        })?;
        let offset = symbol.address();
        let headers = file.elf_program_headers();
        let block = headers.iter().find(|header| header.p_type(LittleEndian) == PT_TLS)?;
        let (start, size) = (block.p_vaddr(LittleEndian), block.p_memsz(LittleEndian));
        // The block ends at the thread pointer, less the gap that aligns its beginning.
        let gap =
            (start.wrapping_add(size)).wrapping_neg() & block.p_align(LittleEndian).max(1).wrapping_sub(1);
        let in_program = offset.wrapping_sub(size).wrapping_sub(gap).cast_signed();
        let slots = file.dynamic_relocations().into_iter().flatten().filter_map(|(address, relocation)| {
            let RelocationFlags::Elf { r_type } = relocation.flags() else { return None };
            let is_match = match relocation.target() {
                RelocationTarget::Symbol(index) => index == symbol.index(),
                // A linker that knows the offset leaves the symbol out. The module id is the same for all variables.
                RelocationTarget::Absolute => {
                    r_type == R_X86_64_DTPMOD64 || relocation.addend().cast_unsigned() == offset
                }
                _ => false,
            };
            let slot = match r_type {
                R_X86_64_TPOFF64 => Slot::Distance,
                R_X86_64_DTPMOD64 => Slot::Module,
                R_X86_64_TLSDESC => Slot::Descriptor,
                _ => return None,
            };
            is_match.then_some((slot, address))
        });
        Some(TlsVariable { offset, in_program, slots: slots.collect() })
    }
}
