//! Names of JIT-compiled functions, from the map that a runtime writes for `perf` (`/tmp/perf-PID.map`). The process
//! decides what is at that path, so only a regular file is opened, and only a limited part of it is read.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    str,
};

use nix::fcntl::OFlag;

use super::interpreter::innermost_id;
use crate::binary::mappings::{inside, open_in_root};

/// How much of a map is read, in bytes: ten times the map of a big program.
const SIZE_MAX: u64 = 64 << 20;

/// Maximum length of a line, in bytes.
const LINE_MAX: u64 = 4096;

/// Names of the functions at these addresses, as far as the process's map has them.
pub(super) fn functions(pid: u32, addresses: &[u64]) -> HashMap<u64, String> {
    if addresses.is_empty() {
        return HashMap::new();
    }
    open(pid).map(|map| read(map, addresses)).unwrap_or_default()
}

/// Opens a process's map. It is in the process's root, and its name has the process id of the process's own namespace.
fn open(pid: u32) -> io::Result<File> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = innermost_id(&status, pid).map_err(io::Error::other)?;
    let root = File::open(inside(pid, "/".as_ref()))?;
    open_in_root(&root, format!("tmp/perf-{own}.map").as_ref(), OFlag::O_NOFOLLOW)
}

/// Finds the functions at these addresses in a map.
fn read(map: impl Read, addresses: &[u64]) -> HashMap<u64, String> {
    let mut map = BufReader::new(map.take(SIZE_MAX));
    let mut found = HashMap::new();
    let mut line = Vec::new();
    while matches!(map.by_ref().take(LINE_MAX).read_until(b'\n', &mut line), Ok(1..)) {
        if let Some((start, size, name)) = parse_line(line.trim_ascii_end()) {
            // JIT compilers reuse memory: the last entry for an address is the current one.
            for &address in addresses {
                if address.checked_sub(start).is_some_and(|offset| offset < size.max(1)) {
                    found.insert(address, String::from_utf8_lossy(name).into_owned());
                }
            }
        }
        line.clear();
    }
    found
}

/// Parses one line: start and size in hexadecimal, and a name, which may be any bytes.
fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut parts = line.splitn(3, |&byte| byte == b' ');
    let mut number = || u64::from_str_radix(str::from_utf8(parts.next()?).ok()?, 16).ok();
    Some((number()?, number()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn the_last_entry_for_an_address_wins() {
        let map = "1000 10 LazyCompile:~f /srv/a b.js:1\n1000 10 new f\n\n20 zz no\n2000 0 alone\nffffffffffffffff 5 last";
        let found = read(map.as_bytes(), &[0, 0x1000, 0x100f, 0x1010, 0x2000, 0x2001, u64::MAX]);
        let name = |address: u64| found.get(&address).map(String::as_str);
        assert_eq!((name(0x1000), name(0x100f)), (Some("new f"), Some("new f")));
        assert_eq!((name(0x2000), name(u64::MAX)), (Some("alone"), Some("last")));
        assert_eq!(found.len(), 4);
        // A line without an end is read in parts of limited length.
        assert_eq!(read(io::repeat(b'1').take(1 << 20), &[0x1111]), HashMap::new());
    }

    /// The test would hang if the FIFO were opened.
    #[test]
    fn only_a_regular_file_is_read() {
        let pid = std::process::id();
        let path = format!("/tmp/perf-{pid}.map");
        let name = || functions(pid, &[0x1000]).remove(&0x1000);
        fs::write(&path, "1000 10 made\n").unwrap();
        assert_eq!(name().as_deref(), Some("made"));
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        fs::rename(&path, elsewhere.path()).unwrap();
        symlink(elsewhere.path(), &path).unwrap();
        let of_link = name();
        fs::remove_file(&path).unwrap();
        mkfifo(path.as_str(), Mode::S_IRWXU).unwrap();
        let of_fifo = name();
        fs::remove_file(&path).unwrap();
        assert_eq!((of_link, of_fifo), (None, None));
    }
}
