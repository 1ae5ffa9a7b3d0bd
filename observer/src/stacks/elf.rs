//! ELF files, mapped so that only what is looked at takes memory.

use std::{collections::BTreeSet, fs::File, ops::Range, sync::Arc};

use anyhow::{Context as _, Result};
use memmap2::{Mmap, MmapMut};
use nix::unistd::{SysconfVar, sysconf};
use object::{
    LittleEndian, Object as _, ObjectSection as _, ObjectSegment as _, ObjectSymbol as _, SegmentFlags,
    SymbolKind,
    elf::{FileHeader64, PF_X},
    read::elf::{ElfFile64, NoteIterator},
};
use procfs::process::{MMPermissions, MemoryMap};

/// A 64-bit ELF file.
pub(crate) struct Elf(Arc<Mmap>);

impl Elf {
    /// Maps a file.
    pub(crate) fn open(file: &File) -> Result<Self> {
        // SAFETY: the bytes are only read, through bounds-checked parsers. Whoever shortens a file that is being
        // executed gets the program that executes it killed, and this one: the same trust.
        let map = unsafe { Mmap::map(file) }.context("cannot map it")?;
        Self::checked(map)
    }

    /// Takes a file that is in memory alone.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut map = MmapMut::map_anon(bytes.len()).context("no memory")?;
        map.copy_from_slice(bytes);
        Self::checked(map.make_read_only()?)
    }

    fn checked(map: Mmap) -> Result<Self> {
        ElfFile64::<LittleEndian>::parse(&*map).context("it is no 64-bit ELF file")?;
        Ok(Self(Arc::new(map)))
    }

    pub(super) fn parsed(&self) -> ElfFile64<'_, LittleEndian> {
        ElfFile64::parse(&**self.0).expect("it has been parsed before")
    }

    /// What to add to an address in the file to get the one in a process; `None` if the file has no such part.
    pub(crate) fn bias(&self, map: &MemoryMap) -> Option<u64> {
        let file = self.parsed();
        let page_size = page_size();
        let is_code = map.perms.contains(MMPermissions::EXECUTE);
        let parts = file.segments().filter_map(|segment| {
            let (offset, size) = segment.file_range();
            // A mapping starts at the page its segment starts in, however the segment wants to be aligned.
            let page = offset - offset % page_size;
            let is_here = size > 0 && (page..offset.saturating_add(size)).contains(&map.offset);
            let SegmentFlags::Elf { p_flags } = segment.flags() else { return None };
            let is_alike = is_code == (p_flags & PF_X != 0);
            let address = segment.address().wrapping_sub(offset).wrapping_add(map.offset);
            is_here.then_some((is_alike, page, address))
        });
        // Where one segment ends in the page that another begins in, a mapping of that page is the one's whose code is
        // code, or the latter's.
        let (.., address) = parts.max_by_key(|&(is_alike, page, _)| (is_alike, page))?;
        Some(map.address.0.wrapping_sub(address))
    }

    /// Addresses in the file of symbols it defines; exported ones, else those left for debuggers.
    pub(crate) fn symbols<const N: usize>(&self, names: [&str; N]) -> [Option<u64>; N] {
        let mut found = [None; N];
        self.find_symbols(&names, &mut found);
        found
    }

    /// The same of any number of symbols.
    pub(crate) fn all_symbols(&self, names: &[&str]) -> Vec<Option<u64>> {
        let mut found = vec![None; names.len()];
        self.find_symbols(names, &mut found);
        found
    }

    fn find_symbols(&self, names: &[&str], found: &mut [Option<u64>]) {
        let file = self.parsed();
        for symbol in file.dynamic_symbols().chain(file.symbols()).filter(|symbol| symbol.is_definition()) {
            let Ok(name) = symbol.name_bytes() else { continue };
            for (wanted, address) in names.iter().zip(&mut *found) {
                if address.is_none() && is_meant(wanted, name) {
                    *address = Some(symbol.address());
                }
            }
            if found.iter().all(Option::is_some) {
                break;
            }
        }
    }

    /// Addresses in the file of all functions it defines that this name stands for, in which a `*`
    /// stands for anything; each once.
    pub(crate) fn functions(&self, name: &str) -> Vec<u64> {
        let file = self.parsed();
        let all = file.dynamic_symbols().chain(file.symbols());
        let functions = all.filter(|symbol| symbol.is_definition() && symbol.kind() == SymbolKind::Text);
        let meant = functions.filter(|symbol| symbol.name_bytes().is_ok_and(|found| is_meant(name, found)));
        meant.map(|symbol| symbol.address()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What tells this build from all others, as the name of a file with its symbols has it: `ab/cdef.debug`.
    pub(crate) fn debug_name(&self) -> Option<String> {
        let file = self.parsed();
        let id = file.build_id().ok()??;
        let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        Some(format!("{}/{}.debug", digits.get(..2)?, &digits[2..]))
    }

    /// Place in the file of what has this address.
    pub(crate) fn file_offset(&self, address: u64) -> Option<u64> {
        self.parsed().segments().find_map(|segment| {
            let (offset, size) = segment.file_range();
            let inside = address.checked_sub(segment.address()).filter(|&inside| inside < size)?;
            Some(offset + inside)
        })
    }

    /// All code, or what else is there, from an address to the end of its segment.
    pub(crate) fn code_from(&self, address: u64) -> Option<&[u8]> {
        let file = self.parsed();
        file.segments().find_map(|segment| {
            let inside = usize::try_from(address.checked_sub(segment.address())?).ok()?;
            segment.data().ok()?.get(inside..).filter(|rest| !rest.is_empty())
        })
    }

    /// So many bytes of code, or what else is at an address.
    pub(crate) fn code(&self, address: u64, length: u64) -> Option<&[u8]> {
        let file = self.parsed();
        file.segments().find_map(|segment| segment.data_range(address, length).ok()?)
    }

    /// Places of a probe that the file itself has in its code, as `.note.stapsdt` lists them.
    pub(crate) fn usdt(&self, provider: &str, name: &str) -> Vec<Usdt> {
        let wanted = [provider.as_bytes(), name.as_bytes()].map(|part| [part, &[0]].concat()).concat();
        let file = self.parsed();
        let base = file.section_by_name(".stapsdt.base").map(|section| section.address());
        let Some((_, notes)) = self.section(b".note.stapsdt") else { return Vec::new() };
        let Ok(mut notes) = NoteIterator::<FileHeader64<LittleEndian>>::new(LittleEndian, 4, &notes) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        while let Ok(Some(note)) = notes.next() {
            let Some((numbers, words)) = note.desc().split_first_chunk::<24>() else { continue };
            if note.name() == b"stapsdt" && note.n_type(LittleEndian) == 3 && words.starts_with(&wanted) {
                let word = |n: usize| u64::from_le_bytes(*numbers[n..].first_chunk().expect("one of three"));
                // Whoever moved the file's sections has not corrected its notes.
                let moved = base.map_or(0, |base| base.wrapping_sub(word(8)));
                let semaphore = if word(16) == 0 { 0 } else { word(16).wrapping_add(moved) };
                found.push(Usdt { location: word(0).wrapping_add(moved), semaphore });
            }
        }
        found
    }

    /// What an instruction refers to, relative to where it is: the first one, in the beginning of a function, that
    /// starts with `before` and is followed by `after`.
    pub(super) fn target_in_code(&self, function: u64, before: &[u8], after: &[u8]) -> Option<u64> {
        /// How much of the function is looked at, in bytes.
        const BEGINNING: u64 = 64;

        let code = self.code(function, BEGINNING)?;
        let size = before.len() + 4 + after.len();
        let (at, found) = code
            .windows(size)
            .enumerate()
            .find(|(_, window)| window.starts_with(before) && window.ends_with(after))?;
        let distance = i32::from_le_bytes(*found[before.len()..].first_chunk()?);
        let next = function + (at + before.len() + 4) as u64;
        Some(next.wrapping_add_signed(distance.into()))
    }

    /// A section's place in the file's address space, and its content.
    pub(super) fn section(&self, name: &[u8]) -> Option<(Range<u64>, Bytes)> {
        let file = self.parsed();
        let section = file.section_by_name_bytes(name)?;
        let (start, size) = section.file_range()?;
        let (start, size) = (usize::try_from(start).ok()?, usize::try_from(size).ok()?);
        let range = start..start.checked_add(size).filter(|&end| end <= self.0.len())?;
        let addresses = section.address()..section.address() + section.size();
        Some((addresses, Bytes { file: self.0.clone(), range }))
    }
}

/// What mappings begin at multiples of.
fn page_size() -> u64 {
    let known = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    known.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096)
}

/// Whether a name is the wanted one, in which a `*` stands for anything.
fn is_meant(wanted: &str, name: &[u8]) -> bool {
    let Some((beginning, rest)) = wanted.split_once('*') else { return name == wanted.as_bytes() };
    let Some(mut name) = name.strip_prefix(beginning.as_bytes()) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*').filter(|part| !part.is_empty()) {
        let Some(at) = name.windows(part.len()).position(|window| window == part.as_bytes()) else {
            return false;
        };
        name = &name[at + part.len()..];
    }
    name.ends_with(end.as_bytes())
}

/// One place of a probe that a file has in its code; addresses in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usdt {
    /// The instruction.
    pub(crate) location: u64,
    /// The counter of those who watch, 16 bits; 0 if there is none.
    pub(crate) semaphore: u64,
}

/// Part of a mapped file, which it keeps mapped.
pub(super) struct Bytes {
    file: Arc<Mmap>,
    /// Within the file, as checked when made.
    range: Range<usize>,
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stacks::mappings::Mappings;

    #[test]
    fn this_programs_own_symbols_are_where_it_runs() {
        let mappings = Mappings::of(std::process::id()).unwrap();
        let map = mappings.code(crate::main as *const () as u64).unwrap();
        let elf = Elf::open(&mappings.open(map).unwrap()).unwrap();
        // `main` of C, which calls ours, is the only one with a plain name.
        let [main, none] = elf.symbols(["main", "no_such_function"]);
        let address = main.unwrap().wrapping_add(elf.bias(map).unwrap());
        assert!((map.address.0..map.address.1).contains(&address));
        assert_eq!(none, None);
        assert!(!elf.section(b".eh_frame").unwrap().1.is_empty());
        assert!(elf.section(b".no_such_section").is_none());
    }

    #[test]
    fn a_star_stands_for_anything() {
        for (wanted, name, expected) in [
            ("f", "f", true),
            ("f", "fg", false),
            ("f*", "fg", true),
            ("f*", "gf", false),
            ("f*h", "fgh", true),
            ("f*h", "fhg", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("a*b*", "ab", true),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(is_meant(wanted, name.as_bytes()), expected, "{wanted} {name}");
        }
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(Elf::from_bytes(b"#!/bin/sh").is_err());
        assert!(Elf::open(&File::open("/dev/null").unwrap()).is_err());
    }
}
