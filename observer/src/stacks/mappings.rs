//! What a process has mapped where, and the files behind it, also those of containers and deleted ones.

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

/// Which file it is: major and minor number of its device, and its inode.
pub(crate) type FileId = ((i32, i32), u64);

/// When a file was last changed, in seconds and nanoseconds: inodes are used again for other files.
pub(crate) type Version = (i64, i64);

/// All mappings of a process, as they were when asked for.
pub(crate) struct Mappings {
    /// Their process.
    pub(crate) pid: u32,
    /// In order of address, never overlapping.
    maps: Vec<MemoryMap>,
}

impl Mappings {
    /// Asks for a process's mappings.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self::parse(pid, &fs::read(format!("/proc/{pid}/maps"))?))
    }

    /// Understands what the kernel says in `/proc/PID/maps`. Files in there may be called anything.
    pub(crate) fn parse(pid: u32, text: &[u8]) -> Self {
        Self { pid, maps: text.split(|&byte| byte == b'\n').filter_map(mapping).collect() }
    }

    /// The mapping an address is in.
    pub(crate) fn find(&self, address: u64) -> Option<&MemoryMap> {
        let after = self.maps.partition_point(|map| map.address.0 <= address);
        self.maps[..after].last().filter(|map| address < map.address.1)
    }

    /// The mapping of code an address is in.
    pub(crate) fn code(&self, address: u64) -> Option<&MemoryMap> {
        self.find(address).filter(|map| map.perms.contains(MMPermissions::EXECUTE))
    }

    /// Where the code is that the kernel maps into every process.
    pub(crate) fn vdso(&self) -> Option<(u64, u64)> {
        self.maps.iter().find(|map| map.pathname == MMapPath::Vdso).map(|map| map.address)
    }

    /// One mapping of code for each file that has any, or several if the process has several copies of it: its code once
    /// more, from its beginning.
    pub(crate) fn modules(&self) -> impl Iterator<Item = &MemoryMap> {
        let mut last = HashMap::new();
        let code = self.maps.iter().filter(|map| map.perms.contains(MMPermissions::EXECUTE));
        code.filter(move |map| {
            matches!(map.pathname, MMapPath::Path(_))
                && last.insert(file_id(map), map.offset).is_none_or(|before| map.offset <= before)
        })
    }

    /// A mapping of code of each module whose file name begins so.
    pub(crate) fn modules_named(&self, beginning: &str) -> impl Iterator<Item = &MemoryMap> {
        self.modules().filter(move |map| module_name(map).is_some_and(|name| name.starts_with(beginning)))
    }

    /// Which of all files that had the inode is mapped; `None` if there is no file or nobody may look.
    pub(crate) fn version(&self, map: &MemoryMap) -> Option<Version> {
        let MMapPath::Path(path) = &map.pathname else { return None };
        let metadata =
            fs::metadata(self.by_range_path(map)).or_else(|_| fs::metadata(inside(self.pid, path)));
        metadata.ok().map(|metadata| (metadata.ctime(), metadata.ctime_nsec()))
    }

    /// Where the kernel shows the file behind a mapping, whatever its name is now. Looking takes CAP_SYS_ADMIN or
    /// CAP_CHECKPOINT_RESTORE.
    fn by_range_path(&self, map: &MemoryMap) -> PathBuf {
        format!("/proc/{}/map_files/{:x}-{:x}", self.pid, map.address.0, map.address.1).into()
    }

    /// Opens the file behind a mapping, and no other that has taken its name since.
    pub(crate) fn open(&self, map: &MemoryMap) -> io::Result<File> {
        File::open(self.by_range_path(map)).or_else(|_| self.open_by_name(map))
    }

    /// Opens the file of that name in the process's file system, if it still is the mapped one.
    fn open_by_name(&self, map: &MemoryMap) -> io::Result<File> {
        let MMapPath::Path(path) = &map.pathname else {
            return Err(io::Error::other("no file is mapped there"));
        };
        let file = open_inside(self.pid, path)?;
        if file.metadata()?.ino() != map.inode {
            return Err(io::Error::other(format!("{} has been replaced", path.display())));
        }
        Ok(file)
    }

    /// Whether mapped files can be opened without their names.
    pub(super) fn by_range(&self) -> bool {
        let first =
            fs::read_dir(format!("/proc/{}/map_files", self.pid)).into_iter().flatten().flatten().next();
        first.is_some_and(|first| File::open(first.path()).is_ok())
    }
}

/// Understands one line: five columns of figures, and a path that may be anything. procfs takes some files' paths for
/// something else, and panics where they are not.
fn mapping(line: &[u8]) -> Option<MemoryMap> {
    let line = String::from_utf8_lossy(line);
    let path = line.splitn(6, ' ').nth(5)?;
    let figures = &line[..line.len() - path.len()];
    let map = MemoryMaps::from_buf_read(figures.as_bytes()).ok()?.into_iter().next()?;
    let pathname = match path.trim_start() {
        "" => MMapPath::Anonymous,
        "[vdso]" => MMapPath::Vdso,
        other if other.starts_with('[') => MMapPath::Other(other.to_owned()),
        file => MMapPath::Path(file.into()),
    };
    Some(MemoryMap { pathname, ..map })
}

/// Opens a regular file by its name under a root, which no symbolic link leads out of; `links` tells whether the last part
/// may be one. Nothing else is opened, be it for a moment: a device may do something, a pipe wait for somebody to write.
pub(super) fn open_under(root: &File, path: &Path, links: OFlag) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | links;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let place = File::from(openat2(root, path, how)?);
    if !place.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is no file", path.display())));
    }
    File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

/// Opens a regular file by the name that it has for a process.
pub(super) fn open_inside(pid: u32, path: &Path) -> io::Result<File> {
    open_under(&File::open(inside(pid, "/".as_ref()))?, path, OFlag::empty())
}

/// A path of a process, as seen from here, whatever its root is.
pub(crate) fn inside(pid: u32, path: &Path) -> PathBuf {
    Path::new(&format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(path))
}

/// Which file is mapped.
pub(crate) fn file_id(map: &MemoryMap) -> FileId {
    (map.dev, map.inode)
}

/// What people call the module a mapping belongs to; `None` for code that was made at run time.
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
    fn a_file_may_be_called_anything() {
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
