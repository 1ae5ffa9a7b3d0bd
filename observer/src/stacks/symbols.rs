//! Symbolizes addresses with a process's ELF files, debug information and perf maps.
//!
//! The symbol tables of a big program take more memory than all the rest of observer. They are dropped after each
//! batch, and only the frames that were found are cached.

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

use super::perf_map;
use crate::{
    binary::{
        elf::Elf,
        mappings::{FileId, Mappings, Version, file_id, module_name, open_of_process},
        untrusted_elf::is_safe,
    },
    model::frame::Frame,
};

/// Maximum number of cached addresses, in each of the two caches. Each takes some hundred bytes.
const CACHE_MAX: usize = 4096;

/// An address independent of the process: the file, its version, and the offset in it.
type FilePosition = (FileId, Version, u64);

/// Symbolizes addresses, and caches the results.
#[derive(Default)]
pub(crate) struct Symbols {
    /// Frames at a position, innermost first; several where functions were inlined.
    files: HashMap<FilePosition, Vec<Frame>>,
    /// Kernel functions, by address.
    kernel: HashMap<u64, String>,
    /// Why names of JIT-compiled functions may be missing from the last stack.
    perf_map_problem: Option<String>,
}

impl Symbols {
    /// Names of the kernel functions at these addresses. Addresses that cannot be resolved are left out.
    pub(super) fn of_kernel(&mut self, addresses: &[u64]) -> Vec<String> {
        let missing: Vec<u64> =
            addresses.iter().copied().filter(|address| !self.kernel.contains_key(address)).collect();
        if !missing.is_empty() {
            evict(&mut self.kernel, missing.len());
            // Only /proc/kallsyms is used: a vmlinux with debug information is large and rarely installed.
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

    /// Frames of a process, innermost first, at addresses from the unwinder. Inlined functions have frames of their own.
    pub(crate) fn of_process(&mut self, mappings: &Mappings, addresses: &[u64]) -> Vec<Frame> {
        let positions: Vec<_> = addresses.iter().map(|&address| file_position(mappings, address)).collect();
        let cached =
            |position: &Option<FilePosition>| position.and_then(|position| self.files.get(&position));
        let mut found: Vec<_> = positions.iter().map(|position| cached(position).cloned()).collect();
        let missing: Vec<usize> = (0..found.len()).filter(|&index| found[index].is_none()).collect();
        if !missing.is_empty() {
            let queried: Vec<u64> = missing.iter().map(|&index| addresses[index]).collect();
            evict(&mut self.files, queried.len());
            let (symbolized, problem) = symbolize(mappings, &queried, mappings.can_open_map_files());
            self.perf_map_problem = problem;
            for (&index, frames) in missing.iter().zip(symbolized) {
                // JIT-compiled code is in no file and not cached: other code may replace it.
                if let Some(position) = positions[index] {
                    self.files.insert(position, frames.clone());
                }
                found[index] = Some(frames);
            }
            trim();
        }
        found.into_iter().flatten().flatten().collect()
    }

    /// Why names of JIT-compiled functions are missing from these frames, which [`of_process`](Self::of_process) has just
    /// returned; `None` if all have names, or the process has no perf map.
    pub(super) fn take_problem(&mut self, frames: &[Frame]) -> Option<String> {
        self.perf_map_problem.take().filter(|_| frames.iter().any(Frame::is_unnamed_jit))
    }
}

/// The position of an address in its file; `None` if no file is mapped there.
fn file_position(mappings: &Mappings, address: u64) -> Option<FilePosition> {
    let map = mappings.find(address)?;
    Some((file_id(map), mappings.version(map)?, address - map.address.0 + map.offset))
}

/// Clears a cache that would exceed its maximum with `more` entries. Entries that are still in use soon return.
fn evict<K: Hash + Eq, V>(cache: &mut HashMap<K, V>, more: usize) {
    if cache.len() + more > CACHE_MAX {
        cache.clear();
    }
}

/// Frames at each of the addresses, and the problem with the process's perf map. `use_map_files` opens files through
/// `/proc/PID/map_files`, which works whatever their names are now; otherwise by name.
fn symbolize(
    mappings: &Mappings,
    addresses: &[u64],
    use_map_files: bool,
) -> (Vec<Vec<Frame>>, Option<String>) {
    let pid = mappings.pid;
    let symbolizer = Symbolizer::builder()
        .set_process_dispatcher(move |member| match member.member_entry {
            ProcessMemberType::Path(path) if use_map_files => resolver(&File::open(&path.maps_file)?),
            ProcessMemberType::Path(path) => resolver(&open_of_process(pid, &path.symbolic_path)?),
            _ => Ok(None),
        })
        .build();
    let mut process = Process::new(Pid::from(pid));
    process.map_files = use_map_files;
    // The crate would open anything at the path of a perf map, such as a FIFO. `perf_map::functions` opens files only.
    process.perf_map = false;
    let source = Source::Process(process);
    let found = symbolizer.symbolize(&source, Input::AbsAddr(addresses)).or_else(|_| {
        // One unreadable file fails the whole batch, so each address is tried separately.
        let each = addresses.iter().map(|&address| {
            let found = symbolizer.symbolize_single(&source, Input::AbsAddr(address));
            found.or(Ok(Symbolized::Unknown(Reason::Unsupported)))
        });
        each.collect::<blazesym::Result<Vec<_>>>()
    });
    let found = found.unwrap_or_default();
    let is_jit = |address: &u64| {
        let map = mappings.find(*address);
        map.is_some_and(|map| !matches!(map.pathname, MMapPath::Path(_) | MMapPath::Vdso))
    };
    let jit: Vec<u64> = addresses.iter().copied().filter(is_jit).collect();
    let jit = perf_map::functions(pid, &jit);
    let frames = addresses.iter().zip(found).map(|(&address, found)| match jit.functions.get(&address) {
        Some(function) => vec![Frame { function: function.clone(), module: None, file: None, line: None }],
        None => frames(mappings.find(address), address, &found),
    });
    (frames.collect(), jit.problem)
}

/// The symbol resolver of a mapped file, if the file is safe to symbolize. It reads the file that is open, whatever its
/// path leads to now.
fn resolver(file: &File) -> blazesym::Result<Option<Box<dyn Resolve>>> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = Path::new(&path);
    if !is_safe(&Elf::open(file).map_err(io::Error::other)?, path) {
        return Err(io::Error::other("the file is not safe to symbolize").into());
    }
    Ok(Some(Box::new(ElfResolver::open(path)?)))
}

/// Frames at an address of a file that no process has mapped.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn symbolize_file(path: &Path, address: u64) -> Vec<Frame> {
    if !File::open(path).is_ok_and(|file| resolver(&file).is_ok()) {
        return Vec::new();
    }
    let source = Source::Elf(blazesym::symbolize::source::Elf::new(path));
    let symbolizer = Symbolizer::new();
    let found = symbolizer.symbolize_single(&source, Input::VirtOffset(address));
    frames(None, address, &found.unwrap_or(Symbolized::Unknown(Reason::Unsupported)))
}

/// Converts the symbol at one address to frames, innermost first.
fn frames(map: Option<&MemoryMap>, address: u64, found: &Symbolized<'_>) -> Vec<Frame> {
    let module = map.and_then(module_name);
    let Some(symbol) = found.as_sym() else {
        let in_file = map.filter(|map| matches!(map.pathname, MMapPath::Path(_)));
        let address = in_file.map_or(address, |map| address - map.address.0 + map.offset);
        return vec![Frame::unknown(address, module)];
    };
    let frame = |name: &str, code: Option<&CodeInfo<'_>>| Frame {
        function: demangle(name),
        module: module.clone(),
        file: code.map(|code| code.to_path().to_string_lossy().into_owned()),
        line: code.and_then(|code| code.line),
    };
    let inlined = symbol.inlined.iter().rev().map(|inlined| frame(&inlined.name, inlined.code_info.as_ref()));
    inlined.chain([frame(&symbol.name, symbol.code_info.as_deref())]).collect()
}

/// Decodes a mangled Rust or C++ name; any other name stays as it is. The crate that symbolizes would decode every name,
/// and the name of a C function may happen to be that of a C++ type: `rd` is `double restrict`.
fn demangle(name: &str) -> String {
    if !name.starts_with('_') {
        return name.to_owned();
    }
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    let is_cpp = ["_Z", "__Z", "___Z"].iter().any(|prefix| name.starts_with(prefix));
    let cpp = is_cpp.then(|| cpp_demangle::Symbol::new(name).ok()?.demangle().ok()).flatten();
    cpp.unwrap_or_else(|| name.to_owned())
}

/// Returns the memory of the dropped tables to the system; the allocator would keep it.
fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time from any thread.
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
    fn only_mangled_names_are_demangled() {
        for name in ["rd", "i", "v", "PKc", "Rd", "_start", "__libc_start_main", "_Zz", "main", "_R"] {
            assert_eq!(demangle(name), name);
        }
        assert_eq!(demangle("_ZN3app6server6handle17h0123456789abcdefE"), "app::server::handle");
        assert_eq!(demangle("_RNvC6_123foo3bar"), "123foo::bar");
        assert_eq!(demangle("_ZN2v85Value3GetEi"), "v8::Value::Get(int)");
    }

    #[test]
    fn functions_are_named_through_map_files_and_by_path() {
        let mappings = Mappings::of(std::process::id()).unwrap();
        let address = a_function_of_this_test();
        for use_map_files in [true, false] {
            let frames = symbolize(&mappings, &[address], use_map_files).0.concat();
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
