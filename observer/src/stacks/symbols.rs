//! Names for addresses: from a process's ELF files, debug information and perf maps.
//!
//! Tables of a big program take more memory than all the rest of observer. They are dropped after each batch, and
//! only what was found is kept.

use std::{collections::HashMap, fs::File, hash::Hash, io, os::fd::AsRawFd as _, path::Path};

use blazesym::{
    MaybeDefault, Pid,
    helper::ElfResolver,
    symbolize::{
        CodeInfo, Input, ProcessMemberType, Reason, Resolve, Symbolized, Symbolizer,
        source::{Kernel, Process, Source},
    },
};
use procfs::process::{MMapPath, MemoryMap};

use super::{
    elf::Elf,
    mappings::{FileId, Mappings, Version, file_id, module_name, open_inside},
    perf_map,
    untrusted_elf::is_harmless,
};
use crate::model::frame::Frame;

/// How many addresses are remembered; some hundred bytes apiece.
const KNOWN_MAX: usize = 4096;

/// An address by file rather than by process: the file, which of all that had its inode, and the offset in it.
type Place = (FileId, Version, u64);

/// Tells names, and remembers them.
#[derive(Default)]
pub(crate) struct Symbols {
    /// Frames at a place, innermost first; several where functions were inlined.
    files: HashMap<Place, Vec<Frame>>,
    /// Functions of the kernel, by address.
    kernel: HashMap<u64, String>,
}

impl Symbols {
    /// Functions of the kernel at these addresses; those that nobody may know are left out.
    pub(super) fn of_kernel(&mut self, addresses: &[u64]) -> Vec<String> {
        let missing: Vec<u64> =
            addresses.iter().copied().filter(|address| !self.kernel.contains_key(address)).collect();
        if !missing.is_empty() {
            make_room(&mut self.kernel, missing.len());
            // Its symbols alone: the image with debug information is large, and hardly ever there.
            let source = Source::Kernel(Kernel { vmlinux: MaybeDefault::None, ..Kernel::default() });
            let symbolizer = Symbolizer::new();
            let found = symbolizer.symbolize(&source, Input::AbsAddr(&missing)).unwrap_or_default();
            for (address, found) in missing.iter().zip(&found) {
                if let Some(symbol) = found.as_sym() {
                    self.kernel.insert(*address, symbol.name.to_string());
                }
            }
            trim();
        }
        addresses.iter().filter_map(|address| self.kernel.get(address).cloned()).collect()
    }

    /// Frames of a process, innermost first, at addresses as the unwinder gives them. An inlined function is a
    /// frame of its own.
    pub(crate) fn of_process(&mut self, mappings: &Mappings, addresses: &[u64]) -> Vec<Frame> {
        let places: Vec<_> = addresses.iter().map(|&address| place(mappings, address)).collect();
        let mut found: Vec<_> =
            places.iter().map(|place| place.and_then(|place| self.files.get(&place)).cloned()).collect();
        let missing: Vec<usize> = (0..found.len()).filter(|&index| found[index].is_none()).collect();
        if !missing.is_empty() {
            let asked: Vec<u64> = missing.iter().map(|&index| addresses[index]).collect();
            make_room(&mut self.files, asked.len());
            for (&index, frames) in missing.iter().zip(look_up(mappings, &asked, mappings.by_range())) {
                // Code in no file was made at run time, and may be other code next time.
                if let Some(place) = places[index] {
                    self.files.insert(place, frames.clone());
                }
                found[index] = Some(frames);
            }
            trim();
        }
        found.into_iter().flatten().flatten().collect()
    }
}

/// The place of an address; `None` where no file is.
fn place(mappings: &Mappings, address: u64) -> Option<Place> {
    let map = mappings.find(address)?;
    Some((file_id(map), mappings.version(map)?, address - map.address.0 + map.offset))
}

/// Starts afresh when too much would be kept: what still matters comes back at once.
fn make_room<K: Hash + Eq, V>(known: &mut HashMap<K, V>, more: usize) {
    if known.len() + more > KNOWN_MAX {
        known.clear();
    }
}

/// Frames at each of the addresses. `by_range` is the way that leads to files whatever their name is now.
fn look_up(mappings: &Mappings, addresses: &[u64], by_range: bool) -> Vec<Vec<Frame>> {
    let pid = mappings.pid;
    let symbolizer = Symbolizer::builder()
        .set_process_dispatcher(move |member| match member.member_entry {
            ProcessMemberType::Path(path) if by_range => resolver(&File::open(&path.maps_file)?),
            ProcessMemberType::Path(path) => resolver(&open_inside(pid, &path.symbolic_path)?),
            _ => Ok(None),
        })
        .build();
    let mut process = Process::new(Pid::from(pid));
    process.map_files = by_range;
    // It would open whatever has the name of one.
    process.perf_map = false;
    let source = Source::Process(process);
    let found = symbolizer.symbolize(&source, Input::AbsAddr(addresses)).or_else(|_| {
        // One file that cannot be read spoils all: then each address by itself.
        let each = addresses.iter().map(|&address| {
            let found = symbolizer.symbolize_single(&source, Input::AbsAddr(address));
            found.or(Ok(Symbolized::Unknown(Reason::Unsupported)))
        });
        each.collect::<blazesym::Result<Vec<_>>>()
    });
    let found = found.unwrap_or_default();
    let is_made = |address: &u64| {
        let map = mappings.find(*address);
        map.is_some_and(|map| !matches!(map.pathname, MMapPath::Path(_) | MMapPath::Vdso))
    };
    let made: Vec<u64> = addresses.iter().copied().filter(is_made).collect();
    let made = perf_map::functions(pid, &made);
    let frames = addresses.iter().zip(found).map(|(&address, found)| match made.get(&address) {
        Some(function) => vec![Frame { function: function.clone(), module: None, file: None, line: None }],
        None => frames(mappings.find(address), address, &found),
    });
    frames.collect()
}

/// What tells the symbols of a mapped file, if that does no harm. It is read as it was opened, whatever its name leads to
/// now.
fn resolver(file: &File) -> blazesym::Result<Option<Box<dyn Resolve>>> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = Path::new(&path);
    if !is_harmless(&Elf::open(file).map_err(io::Error::other)?, path) {
        return Err(io::Error::other("it is not to be trusted").into());
    }
    Ok(Some(Box::new(ElfResolver::open(path)?)))
}

/// Frames at an address of a file that is nobody's.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn in_file(path: &Path, address: u64) -> Vec<Frame> {
    if !File::open(path).is_ok_and(|file| resolver(&file).is_ok()) {
        return Vec::new();
    }
    let source = Source::Elf(blazesym::symbolize::source::Elf::new(path));
    let symbolizer = Symbolizer::new();
    let found = symbolizer.symbolize_single(&source, Input::VirtOffset(address));
    frames(None, address, &found.unwrap_or(Symbolized::Unknown(Reason::Unsupported)))
}

/// Frames at one address, innermost first.
fn frames(map: Option<&MemoryMap>, address: u64, found: &Symbolized<'_>) -> Vec<Frame> {
    let module = map.and_then(module_name);
    let Some(symbol) = found.as_sym() else {
        let in_file = map.filter(|map| matches!(map.pathname, MMapPath::Path(_)));
        let address = in_file.map_or(address, |map| address - map.address.0 + map.offset);
        return vec![Frame::unknown(address, module)];
    };
    let frame = |name: &str, code: Option<&CodeInfo<'_>>| Frame {
        function: name.to_owned(),
        module: module.clone(),
        file: code.map(|code| code.to_path().to_string_lossy().into_owned()),
        line: code.and_then(|code| code.line),
    };
    let inlined = symbol.inlined.iter().rev().map(|inlined| frame(&inlined.name, inlined.code_info.as_ref()));
    inlined.chain([frame(&symbol.name, symbol.code_info.as_deref())]).collect()
}

/// Gives the freed tables back to the system; the allocator would keep them.
fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers and may be called at any time from any thread.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn a_function_of_this_test() -> u64 {
        a_function_of_this_test as *const () as u64
    }

    #[test]
    fn own_functions_have_names_by_range_and_by_name() {
        let mappings = Mappings::of(std::process::id()).unwrap();
        let address = a_function_of_this_test();
        for by_range in [true, false] {
            let frames = look_up(&mappings, &[address], by_range).concat();
            let last = frames.last().unwrap();
            assert!(last.function.ends_with("a_function_of_this_test"), "{last}");
            assert!(last.module.as_ref().unwrap().starts_with("observer"), "{last}");
        }
        let mut symbols = Symbols::default();
        let first = symbols.of_process(&mappings, &[address, 8, address]);
        assert_eq!(symbols.files.len(), 1);
        assert_eq!(first, symbols.of_process(&mappings, &[address, 8, address]));
        assert_eq!(first[first.len() / 2], Frame::unknown(8, None));
    }
}
