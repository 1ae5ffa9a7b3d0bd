//! The memory mappings of a process, and access to the mapped files, including those of containers and deleted files.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use procfs::{
    FromBufRead as _,
    process::{MMPermissions, MMapPath, MemoryMap, MemoryMaps},
};

/// Identity of a file: major and minor number of its device, and its inode.
pub(crate) type FileId = ((i32, i32), u64);

/// A file's change time (`ctime`), in seconds and nanoseconds. With the [`FileId`] it identifies a file's content:
/// inodes are reused for other files.
pub(crate) type Version = (i64, i64);

/// All mappings of a process at the time they were read.
pub(crate) struct Mappings {
    /// The process.
    pub(crate) pid: u32,
    /// Sorted by address; they never overlap.
    maps: Vec<MemoryMap>,
}

impl Mappings {
    /// Reads a process's mappings.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self::parse(pid, &fs::read(format!("/proc/{pid}/maps"))?))
    }

    /// Parses `/proc/PID/maps`. File names in it may be any bytes.
    pub(crate) fn parse(pid: u32, text: &[u8]) -> Self {
        Self { pid, maps: text.split(|&byte| byte == b'\n').filter_map(parse_line).collect() }
    }

    /// The mapping that contains an address.
    pub(crate) fn find(&self, address: u64) -> Option<&MemoryMap> {
        let after = self.maps.partition_point(|map| map.address.0 <= address);
        self.maps[..after].last().filter(|map| address < map.address.1)
    }

    /// The executable mapping that contains an address.
    pub(crate) fn code(&self, address: u64) -> Option<&MemoryMap> {
        self.find(address).filter(|map| map.perms.contains(MMPermissions::EXECUTE))
    }

    /// Address range of the vDSO, the code that the kernel maps into every process.
    pub(crate) fn vdso(&self) -> Option<(u64, u64)> {
        self.maps.iter().find(|map| map.pathname == MMapPath::Vdso).map(|map| map.address)
    }

    /// One executable mapping for each mapped file, or one for each copy if the file is mapped several times. A mapping
    /// starts another copy if its offset in the file is not beyond that of the mapping before.
    pub(crate) fn modules(&self) -> impl Iterator<Item = &MemoryMap> {
        let mut last = HashMap::new();
        let code = self.maps.iter().filter(|map| map.perms.contains(MMPermissions::EXECUTE));
        code.filter(move |map| {
            matches!(map.pathname, MMapPath::Path(_))
                && last.insert(file_id(map), map.offset).is_none_or(|before| map.offset <= before)
        })
    }

    /// The [`modules`](Self::modules) whose file name starts with `prefix`.
    pub(crate) fn modules_named(&self, prefix: &str) -> impl Iterator<Item = &MemoryMap> {
        self.modules().filter(move |map| module_name(map).is_some_and(|name| name.starts_with(prefix)))
    }

    /// Version of the mapped file; `None` if no file is mapped or it cannot be accessed.
    pub(crate) fn version(&self, map: &MemoryMap) -> Option<Version> {
        let MMapPath::Path(path) = &map.pathname else { return None };
        let metadata =
            fs::metadata(self.map_files_path(map)).or_else(|_| fs::metadata(inside(self.pid, path)));
        metadata.ok().map(|metadata| (metadata.ctime(), metadata.ctime_nsec()))
    }

    /// Link to a mapped file by the address range of its mapping, which works whatever the file's name is now. To
    /// follow it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    fn map_files_path(&self, map: &MemoryMap) -> PathBuf {
        format!("/proc/{}/map_files/{:x}-{:x}", self.pid, map.address.0, map.address.1).into()
    }

    /// Opens a mapped file. A file that has replaced it under its name is not opened.
    pub(crate) fn open(&self, map: &MemoryMap) -> io::Result<File> {
        File::open(self.map_files_path(map)).or_else(|_| self.open_by_name(map))
    }

    /// Opens a mapped file by its name in the process's file system, if its inode is still the mapped one.
    fn open_by_name(&self, map: &MemoryMap) -> io::Result<File> {
        let MMapPath::Path(path) = &map.pathname else {
            return Err(io::Error::other("the mapping has no file"));
        };
        let file = open_of_process(self.pid, path)?;
        if file.metadata()?.ino() != map.inode {
            return Err(io::Error::other(format!(
                "{} has been replaced since it was mapped",
                path.display()
            )));
        }
        Ok(file)
    }

    /// Whether observer may open mapped files through `/proc/PID/map_files`.
    pub(crate) fn can_open_map_files(&self) -> bool {
        let first =
            fs::read_dir(format!("/proc/{}/map_files", self.pid)).into_iter().flatten().flatten().next();
        first.is_some_and(|first| File::open(first.path()).is_ok())
    }
}

/// Parses one line: five columns and a path, which may be any bytes. The path is not passed to the crate `procfs`, which
/// mistakes some paths of files for special mappings and panics.
fn parse_line(line: &[u8]) -> Option<MemoryMap> {
    let line = String::from_utf8_lossy(line);
    let path = line.splitn(6, ' ').nth(5)?;
    let columns = &line[..line.len() - path.len()];
    let map = MemoryMaps::from_buf_read(columns.as_bytes()).ok()?.into_iter().next()?;
    let pathname = match path.trim_start() {
        "" => MMapPath::Anonymous,
        "[vdso]" => MMapPath::Vdso,
        other if other.starts_with('[') => MMapPath::Other(other.to_owned()),
        file => MMapPath::Path(file.into()),
    };
    Some(MemoryMap { pathname, ..map })
}

/// Opens a regular file by its path under `root`; no symbolic link leads out of the root. `links` is `O_NOFOLLOW` if
/// the last component must not be a symbolic link. Files of other types are never opened, not even briefly: opening a
/// device can have an effect, and opening a FIFO waits for a writer.
pub(crate) fn open_in_root(root: &File, path: &Path, links: OFlag) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | links;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let found = File::from(openat2(root, path, how)?);
    if !found.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is not a regular file", path.display())));
    }
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// Opens a regular file by its path in a process's root.
pub(crate) fn open_of_process(pid: u32, path: &Path) -> io::Result<File> {
    open_in_root(&File::open(inside(pid, "/".as_ref()))?, path, OFlag::empty())
}

/// Translates a path of a process to observer's, through the process's root.
pub(crate) fn inside(pid: u32, path: &Path) -> PathBuf {
    Path::new(&format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(path))
}

/// Identity of the mapped file.
pub(crate) fn file_id(map: &MemoryMap) -> FileId {
    (map.dev, map.inode)
}

/// Base name of the mapped file, without ` (deleted)`, or `vdso`; `None` for other mappings, such as JIT-compiled code.
pub(crate) fn module_name(map: &MemoryMap) -> Option<String> {
    match &map.pathname {
        MMapPath::Path(path) => {
            let name = path.file_name()?.to_string_lossy();
            Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
        }
        MMapPath::Vdso => Some("vdso".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_may_be_any_bytes() {
        let text = b"1000-2000 r-xp 00000000 08:01 5 /SYSV\n2000-3000 r-xp 00000000 08:01 6 /SYSVzzzzzzzz (deleted)\n\
            3000-4000 rw-s 00000000 00:01 7 /SYSV0000002a (deleted)\n4000-5000 r-xp 00000000 08:01 8 /lib/\xff.so\n\
            5000-6000 r-xp 00000000 08:01 9 /srv/a /SYSV b\n";
        let mappings = Mappings::parse(1, text);
        let names: Vec<_> = mappings.modules().filter_map(module_name).collect();
        assert_eq!(names, ["SYSV", "SYSVzzzzzzzz", "\u{fffd}.so", "SYSV b"]);
    }

    #[test]
    fn code_of_this_process_is_found_in_its_file() {
        let mappings = Mappings::of(std::process::id()).unwrap();
        let here = file_id as *const () as u64;
        let map = mappings.code(here).unwrap();
        let exe = std::env::current_exe().unwrap();
        assert_eq!(module_name(map), Some(exe.file_name().unwrap().to_string_lossy().into_owned()));
        assert!(mappings.modules().any(|module| file_id(module) == file_id(map)));
        let inode = fs::metadata(&exe).unwrap().ino();
        assert_eq!(mappings.open_by_name(map).unwrap().metadata().unwrap().ino(), inode);
        assert_eq!(mappings.open(map).unwrap().metadata().unwrap().ino(), inode);
        let data = Box::new(0_u8);
        assert!(mappings.code(&raw const *data as u64).is_none());
        assert!(mappings.find(0).is_none());
    }
}
