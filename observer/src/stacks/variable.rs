//! Variables of which each thread has its own, as an ELF file for x86-64 has them: where they are in a process that runs
//! the file, and in which words of a process that has loaded it the loader says where it has put them.

use object::{
    LittleEndian, Object as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SymbolKind,
    elf::{PT_TLS, R_X86_64_DTPMOD64, R_X86_64_TLSDESC, R_X86_64_TPOFF64},
    read::elf::ProgramHeader as _,
};

use super::elf::Elf;

/// A variable that a file exports, of which each thread has its own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Variable {
    /// Where it is among those of the file, in bytes.
    pub(crate) offset: u64,
    /// Where it is from the thread pointer, if the file is the program that a process runs.
    pub(crate) in_program: i64,
    /// What the loader fills in, with addresses in the file.
    pub(crate) slots: Vec<(Slot, u64)>,
}

/// What the loader leaves at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Where the variable is from the thread pointer.
    Distance,
    /// The file's number.
    Module,
    /// A function, and what it is to be called with.
    Descriptor,
}

impl Elf {
    /// Finds such a variable by its name.
    pub(crate) fn variable(&self, name: &str) -> Option<Variable> {
        let file = self.parsed();
        let symbol = file.dynamic_symbols().find(|symbol| {
            !symbol.is_undefined() && symbol.kind() == SymbolKind::Tls && symbol.name() == Ok(name)
        })?;
        let offset = symbol.address();
        let headers = file.elf_program_headers();
        let block = headers.iter().find(|header| header.p_type(LittleEndian) == PT_TLS)?;
        let (start, size) = (block.p_vaddr(LittleEndian), block.p_memsz(LittleEndian));
        // The block ends at the thread pointer, and is moved down until it begins where its alignment wants it.
        let gap =
            (start.wrapping_add(size)).wrapping_neg() & block.p_align(LittleEndian).max(1).wrapping_sub(1);
        let in_program = offset.wrapping_sub(size).wrapping_sub(gap).cast_signed();
        let slots = file.dynamic_relocations().into_iter().flatten().filter_map(|(address, relocation)| {
            let RelocationFlags::Elf { r_type } = relocation.flags() else { return None };
            let is_meant = match relocation.target() {
                RelocationTarget::Symbol(index) => index == symbol.index(),
                // A linker that knows where it is names no symbol; the number of the module is the same for all.
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
            is_meant.then_some((slot, address))
        });
        Some(Variable { offset, in_program, slots: slots.collect() })
    }
}
