//! 64-bit ELF files, memory-mapped so that only the parts that are read take memory.

use std::{collections::BTreeSet, fs::File, ops::Range, os::unix::fs::FileExt as _, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use memmap2::{Mmap, MmapMut, MmapOptions};
use nix::unistd::{SysconfVar, sysconf};
use object::{
    LittleEndian, Object as _, ObjectSection as _, ObjectSegment as _, ObjectSymbol as _, SegmentFlags,
    SymbolKind,
    elf::{FileHeader64, PF_X, ProgramHeader64, SHT_NOTE, SHT_STRTAB, SHT_SYMTAB, SectionHeader64},
    read::elf::{ElfFile64, FileHeader as _, NoteIterator, SectionHeader as _},
};
use procfs::process::{MMPermissions, MemoryMap};

/// Maximum number of bytes that are copied of a debug file.
const COPY_MAX: usize = 256 << 20;

/// An ELF file without segments and sections, aligned as the parser requires.
static EMPTY: Aligned = {
    let mut header = [0; 64];
    let (magic, version) = (*b"\x7fELF\x02\x01\x01", 1);
    let mut at = 0;
    while at < magic.len() {
        header[at] = magic[at];
        at += 1;
    }
    header[20] = version;
    header[52] = 64;
    Aligned(header)
};

#[repr(align(8))]
struct Aligned([u8; 64]);

/// A 64-bit ELF file.
#[derive(Clone)]
pub(crate) struct Elf(Arc<Mmap>);

impl Elf {
    /// Maps a file.
    pub(crate) fn open(file: &File) -> Result<Self> {
        // SAFETY: the bytes are only read, through bounds-checked parsers. If the file is truncated while it is mapped,
        // reads raise SIGBUS. That kills observer, as it kills the process that executes the file: observer trusts the
        // same writers.
        let map = unsafe { Mmap::map(file) }.context("cannot map it")?;
        Self::checked(map)
    }

    /// Copies an ELF file that is in memory.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut map = MmapMut::map_anon(bytes.len()).context("cannot allocate memory")?;
        map.copy_from_slice(bytes);
        Self::checked(map.make_read_only()?)
    }

    /// Copies the headers, symbol tables and notes of a debug file to their offsets in an anonymous mapping. The rest
    /// reads as zeros and takes no memory. A debug file is not mapped because no process executes it: it can be
    /// truncated at any time.
    pub(crate) fn open_symbols(file: &File) -> Result<Self> {
        let size = usize::try_from(file.metadata()?.len())?;
        let map = MmapOptions::new().len(size).no_reserve_swap().map_anon();
        let mut map = map.context("cannot allocate memory")?;
        let mut left = COPY_MAX;
        let mut copy = |map: &mut MmapMut, start: u64, length: u64| {
            let (offset, length) = (usize::try_from(start)?, usize::try_from(length)?);
            left = left.checked_sub(length).context("its symbol tables are too large")?;
            let end = offset.checked_add(length).context("an offset in its headers is invalid")?;
            file.read_exact_at(map.get_mut(offset..end).context("the file is truncated")?, start)?;
            anyhow::Ok(())
        };
        copy(&mut map, 0, size_of::<FileHeader64<LittleEndian>>() as u64)?;
        let header = *FileHeader64::<LittleEndian>::parse(&*map).context("not a 64-bit ELF file")?;
        let (segments, sections) = (header.e_phnum(LittleEndian), header.e_shnum(LittleEndian));
        let of_segments = u64::from(segments) * size_of::<ProgramHeader64<LittleEndian>>() as u64;
        copy(&mut map, header.e_phoff(LittleEndian), of_segments)?;
        let of_sections = u64::from(sections) * size_of::<SectionHeader64<LittleEndian>>() as u64;
        copy(&mut map, header.e_shoff(LittleEndian), of_sections)?;
        let sections = header.section_headers(LittleEndian, &*map)?;
        let is_wanted = |kind| [SHT_SYMTAB, SHT_STRTAB, SHT_NOTE].contains(&kind);
        let wanted = sections.iter().filter(|section| is_wanted(section.sh_type(LittleEndian)));
        let wanted: Vec<_> = wanted.filter_map(|section| section.file_range(LittleEndian)).collect();
        for (start, length) in wanted {
            copy(&mut map, start, length)?;
        }
        let elf = Self::checked(map.make_read_only()?)?;
        ensure!(elf.has_symbols(), "it has no symbol table");
        Ok(elf)
    }

    fn checked(map: Mmap) -> Result<Self> {
        ElfFile64::<LittleEndian>::parse(&*map).context("not a 64-bit ELF file")?;
        Ok(Self(Arc::new(map)))
    }

    /// Parses the headers; an empty ELF file if they are no longer valid because the file was overwritten.
    pub(crate) fn parsed(&self) -> ElfFile64<'_, LittleEndian> {
        let parsed = ElfFile64::parse(&**self.0);
        parsed.unwrap_or_else(|_| ElfFile64::parse(&EMPTY.0[..]).expect("the empty file is valid"))
    }

    /// The load bias of a mapping: what to add to an address in the file to get the one in the process. `None` if no
    /// segment of the file belongs to the mapping.
    pub(crate) fn bias(&self, map: &MemoryMap) -> Option<u64> {
        let file = self.parsed();
        let page_size = page_size();
        let is_code = map.perms.contains(MMPermissions::EXECUTE);
        let candidates = file.segments().filter_map(|segment| {
            let (offset, size) = segment.file_range();
            // A mapping starts at the page in which its segment starts, whatever alignment the segment asks for.
            let page = offset - offset % page_size;
            let is_here = size > 0 && (page..offset.saturating_add(size)).contains(&map.offset);
            let SegmentFlags::Elf { p_flags } = segment.flags() else { return None };
            let has_same_access = is_code == (p_flags & PF_X != 0);
            let address = segment.address().wrapping_sub(offset).wrapping_add(map.offset);
            is_here.then_some((has_same_access, page, address))
        });
        // Two segments may share a page: one ends in it, the next begins in it. A mapping of that page belongs to the
        // segment that is executable if the mapping is, and not if it is not; of two such segments to the later.
        let (.., address) = candidates.max_by_key(|&(has_same_access, page, _)| (has_same_access, page))?;
        Some(map.address.0.wrapping_sub(address))
    }

    /// Whether the file has a symbol table (`.symtab`), which also has the symbols that are not exported.
    pub(crate) fn has_symbols(&self) -> bool {
        self.parsed().section_by_name_bytes(b".symtab").is_some()
    }

    /// Address that the first loaded segment is linked to.
    pub(crate) fn start(&self) -> Option<u64> {
        self.parsed().segments().next().map(|segment| segment.address())
    }

    /// Addresses in the file of symbols that it defines. Exported symbols take precedence over those in `.symtab`.
    pub(crate) fn symbols<const N: usize>(&self, names: [&str; N]) -> [Option<u64>; N] {
        let mut found = [None; N];
        self.find_symbols(&names, &mut found);
        found
    }

    /// [`symbols`](Self::symbols) for a number of names that is not known at compile time.
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
                if address.is_none() && matches_pattern(wanted, name) {
                    *address = Some(symbol.address());
                }
            }
            if found.iter().all(Option::is_some) {
                break;
            }
        }
    }

    /// Addresses in the file of all functions that it defines and whose names match `name`, in which `*` matches any
    /// characters; sorted and without duplicates.
    pub(crate) fn functions(&self, name: &str) -> Vec<u64> {
        let file = self.parsed();
        let all = file.dynamic_symbols().chain(file.symbols());
        let functions = all.filter(|symbol| symbol.is_definition() && symbol.kind() == SymbolKind::Text);
        let matching =
            functions.filter(|symbol| symbol.name_bytes().is_ok_and(|found| matches_pattern(name, found)));
        matching.map(|symbol| symbol.address()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The build id, which identifies this build of the file.
    pub(crate) fn build_id(&self) -> Option<Vec<u8>> {
        self.parsed().build_id().ok()?.map(<[u8]>::to_vec)
    }

    /// The debug link: name and CRC-32 of the separate debug file.
    pub(crate) fn debug_link(&self) -> Option<(Vec<u8>, u32)> {
        let (name, checksum) = self.parsed().gnu_debuglink().ok()??;
        Some((name.to_vec(), checksum))
    }

    /// Translates an address in the file to an offset in the file.
    pub(crate) fn file_offset(&self, address: u64) -> Option<u64> {
        self.parsed().segments().find_map(|segment| {
            let (offset, size) = segment.file_range();
            let inside = address.checked_sub(segment.address()).filter(|&inside| inside < size)?;
            offset.checked_add(inside)
        })
    }

    /// Bytes from an address to the end of its segment, whether they are code or data.
    pub(crate) fn code_from(&self, address: u64) -> Option<&[u8]> {
        let file = self.parsed();
        file.segments().find_map(|segment| {
            let inside = usize::try_from(address.checked_sub(segment.address())?).ok()?;
            segment.data().ok()?.get(inside..).filter(|rest| !rest.is_empty())
        })
    }

    /// `length` bytes at an address, whether they are code or data; `None` if the segment ends before.
    pub(crate) fn code(&self, address: u64, length: u64) -> Option<&[u8]> {
        let file = self.parsed();
        file.segments().find_map(|segment| segment.data_range(address, length).ok()?)
    }

    /// Locations of a USDT probe, from `.note.stapsdt`.
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
                // `prelink` moves sections without updating the notes. A note has the original address of
                // `.stapsdt.base`, which shows by how much they moved.
                let shift = base.map_or(0, |base| base.wrapping_sub(word(8)));
                let semaphore = if word(16) == 0 { 0 } else { word(16).wrapping_add(shift) };
                found.push(Usdt { location: word(0).wrapping_add(shift), semaphore });
            }
        }
        found
    }

    /// Finds an instruction with a 32-bit relative address in the first bytes of a function, and returns the address
    /// that it refers to. The instruction is the first that starts with `before`; the bytes after the address must be
    /// `after`.
    pub(crate) fn target_in_code(&self, function: u64, before: &[u8], after: &[u8]) -> Option<u64> {
        /// How much of the function is searched, in bytes.
        const BEGINNING: u64 = 64;

        let code = self.code(function, BEGINNING)?;
        let size = before.len() + 4 + after.len();
        let (at, found) = code
            .windows(size)
            .enumerate()
            .find(|(_, window)| window.starts_with(before) && window.ends_with(after))?;
        let distance = i32::from_le_bytes(*found[before.len()..].first_chunk()?);
        let next = function.wrapping_add((at + before.len() + 4) as u64);
        Some(next.wrapping_add_signed(distance.into()))
    }

    /// Address range of a section, and its content.
    pub(crate) fn section(&self, name: &[u8]) -> Option<(Range<u64>, Bytes)> {
        let file = self.parsed();
        let section = file.section_by_name_bytes(name)?;
        let (start, size) = section.file_range()?;
        let (start, size) = (usize::try_from(start).ok()?, usize::try_from(size).ok()?);
        let range = start..start.checked_add(size).filter(|&end| end <= self.0.len())?;
        let addresses = section.address()..section.address().saturating_add(section.size());
        Some((addresses, Bytes { file: self.0.clone(), range }))
    }
}

/// Size of a page, in bytes.
fn page_size() -> u64 {
    let known = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    known.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096)
}

/// Whether a name matches a pattern, in which each `*` matches any number of any bytes.
pub(crate) fn matches_pattern(pattern: &str, name: &[u8]) -> bool {
    let Some((beginning, rest)) = pattern.split_once('*') else { return name == pattern.as_bytes() };
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

/// One location of a USDT probe; addresses in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usdt {
    /// Address of the instruction.
    pub(crate) location: u64,
    /// Address of the semaphore, a 16-bit count of attached tracers that enables the probe; 0 without one.
    pub(crate) semaphore: u64,
}

/// A part of a mapped file. It keeps the file mapped.
pub(crate) struct Bytes {
    file: Arc<Mmap>,
    /// Checked to be within the file when this was created.
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
    use std::{
        fs,
        path::{Path, PathBuf},
        process::Command,
    };

    use super::*;
    use crate::{
        arch::instructions,
        binary::{
            mappings::Mappings,
            memory::ProcessMemory,
            testing::{Program, find, run, source, wait_for},
        },
    };

    /// A function with unique constants, so that no other code is equal.
    const LIBRARY: &str =
        "__attribute__((noinline)) int in_library(int x) { return x * 0x1234567 + 0x7654321; }";
    const PROGRAM: &str = r#"
        #include <unistd.h>
        int zeros[100000], ones[1000] = { 1 };
        int in_library(int);
        __attribute__((noinline)) int in_program(int x) { return x * 0x2345671 + 0x6543217; }
        int main(int c, char **v) {
            ones[c] = in_library(c) + in_program(c);
            for (;;) pause();
        }
    "#;

    /// Builds a program and its library, each with additional options for the linker.
    fn linked(gcc: &Path, folder: &Path, of_library: &[&str], of_program: &[&str]) -> PathBuf {
        let library = folder.join("libprobe.so");
        let program = folder.join("probing");
        let code = source(folder, "library.c", LIBRARY);
        run(Command::new(gcc)
            .args(["-O2", "-shared", "-fPIC", "-o"])
            .args([&library, &code])
            .args(of_library));
        let code = source(folder, "program.c", PROGRAM);
        let path = format!("-Wl,-rpath,{}", folder.display());
        let files = [&program, &code, &library];
        run(Command::new(gcc).args(["-O2", &path]).args(of_program).arg("-o").args(files));
        program
    }

    #[test]
    fn biases_are_right_for_all_ways_to_link() {
        let Some(gcc) = find("biases_are_right_for_all_ways_to_link", "gcc") else { return };
        // Among them the layouts of a prelinked library, of one for large pages, and of one with code and data in one
        // page.
        for (of_library, of_program) in [
            (vec![], vec!["-pie", "-fPIE"]),
            (vec![], vec!["-no-pie", "-fno-pie"]),
            (vec!["-Wl,-Ttext-segment=0x10000000"], vec!["-no-pie", "-Wl,-Ttext-segment=0x20000000"]),
            (vec!["-Wl,-z,max-page-size=0x200000"], vec!["-no-pie", "-Wl,-z,max-page-size=0x200000"]),
            (vec!["-Wl,-z,noseparate-code"], vec!["-pie", "-fPIE", "-Wl,-z,noseparate-code"]),
            (
                vec!["-Wl,-z,noseparate-code,-z,max-page-size=0x200000"],
                vec!["-pie", "-fPIE", "-Wl,-z,noseparate-code,-z,max-page-size=0x200000"],
            ),
            (vec!["-Wl,-z,noseparate-code,-z,norelro"], vec!["-no-pie", "-Wl,-z,norelro"]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let program = linked(&gcc, folder.path(), &of_library, &of_program);
            let process = Program::start(&mut Command::new(program));
            let mappings = wait_for("the library", || {
                let mappings = Mappings::of(process.pid()).ok()?;
                let is_mapped = mappings.modules_named("libprobe").next().is_some();
                is_mapped.then_some(mappings)
            });
            for (module, function) in [("libprobe", "in_library"), ("probing", "in_program")] {
                let how = format!("{of_library:?} {of_program:?} {function}");
                let map = mappings.modules_named(module).next().expect(&how);
                let file = mappings.open(map).unwrap();
                let elf = Elf::open(&file).unwrap();
                let address = elf.symbols([function])[0].unwrap();
                let code = elf.code(address, 12).unwrap();
                let start = address.wrapping_add(elf.bias(map).unwrap());
                let running = ProcessMemory::of(process.pid()).unwrap().bytes(start, 12, "code").unwrap();
                assert_eq!(running, code, "{how}");
                let mut in_file = [0; 12];
                file.read_exact_at(&mut in_file, elf.file_offset(address).unwrap()).unwrap();
                assert_eq!(in_file, code, "{how}");
            }
        }
    }

    /// Calls every function of a file; none may panic.
    fn read_all(elf: &Elf, map: &MemoryMap) {
        let functions = elf.functions("*");
        elf.all_symbols(&["in_library", "main", "no_such_function"]);
        for address in functions.into_iter().take(8).chain([0, 0x1000, u64::MAX - 8, u64::MAX]) {
            elf.file_offset(address);
            elf.code(address, u64::MAX);
            elf.code_from(address);
            elf.target_in_code(address, &[0xe8], &[]);
            instructions::entry(elf, address, &[]);
            instructions::jump_target(elf, address);
            let _unknown = instructions::ends(elf, address, true);
        }
        elf.bias(map);
        elf.build_id();
        elf.debug_link();
        elf.has_symbols();
        elf.start();
        elf.usdt("python", "gc__start");
        elf.variable("errno");
        for section in [".text", ".eh_frame", ".bss", ".symtab", ".note.stapsdt"] {
            elf.section(section.as_bytes());
        }
    }

    #[test]
    fn a_file_that_is_overwritten_reads_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
        let elf = Elf::open(&File::open(&path).unwrap()).unwrap();
        assert!(elf.start().is_some());
        fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[0; 64], 0).unwrap();
        assert_eq!((elf.start(), elf.symbols(["main"])), (None, [None]));
    }

    #[test]
    fn truncated_and_corrupt_files_do_not_panic() {
        let Some(gcc) = find("truncated_and_corrupt_files", "gcc") else { return };
        let folder = tempfile::tempdir().unwrap();
        let program = linked(&gcc, folder.path(), &[], &["-pie", "-fPIE"]);
        let whole = fs::read(program).unwrap();
        let mappings = Mappings::of(std::process::id()).unwrap();
        let map = mappings.modules().next().unwrap();
        let corrupt = folder.path().join("corrupt");
        let mut accepted = [0; 2];
        let mut try_out = |bytes: &[u8]| {
            if let Ok(elf) = Elf::from_bytes(bytes) {
                accepted[0] += 1;
                read_all(&elf, map);
            }
            fs::write(&corrupt, bytes).unwrap();
            if let Ok(elf) = Elf::open_symbols(&File::open(&corrupt).unwrap()) {
                accepted[1] += 1;
                read_all(&elf, map);
            }
        };
        try_out(&whole);
        for end in (1..whole.len()).step_by(whole.len() / 200) {
            try_out(&whole[..end]);
        }
        let mut random = fastrand::Rng::with_seed(5);
        let sections = usize::try_from(u64::from_le_bytes(*whole[40..].first_chunk().unwrap())).unwrap();
        for round in 0..2000 {
            let mut bytes = whole.clone();
            // The ELF header, program headers and what follows, section headers, anything.
            let part = [16..64, 64..1024, sections..whole.len(), 0..whole.len()][round % 4].clone();
            for _ in 0..random.usize(1..8) {
                bytes[random.usize(part.clone())] = random.u8(..) | [0, 0xff][random.usize(..2)];
            }
            try_out(&bytes);
        }
        eprintln!("{} of 2,201 were read, {} for their symbols", accepted[0], accepted[1]);
        assert!(accepted.iter().all(|&accepted| accepted > 100), "{accepted:?}");
    }

    #[test]
    fn symbols_of_this_process_are_where_it_runs() {
        let mappings = Mappings::of(std::process::id()).unwrap();
        let map = mappings.code(crate::main as *const () as u64).unwrap();
        let elf = Elf::open(&mappings.open(map).unwrap()).unwrap();
        // The symbol `main` is C's, which calls that of Rust; Rust mangles its own.
        let [main, none] = elf.symbols(["main", "no_such_function"]);
        let address = main.unwrap().wrapping_add(elf.bias(map).unwrap());
        assert!((map.address.0..map.address.1).contains(&address));
        assert_eq!(none, None);
        assert!(!elf.section(b".eh_frame").unwrap().1.is_empty());
        assert!(elf.section(b".no_such_section").is_none());
    }

    #[test]
    fn a_star_matches_any_bytes() {
        for (pattern, name, expected) in [
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
            assert_eq!(matches_pattern(pattern, name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        assert!(Elf::from_bytes(b"#!/bin/sh").is_err());
        assert!(Elf::open(&File::open("/dev/null").unwrap()).is_err());
    }
}
