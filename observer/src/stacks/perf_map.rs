//! Names of code that a runtime makes while it runs, from the map of it that the runtime writes for `perf`.
//! Whatever has that map's name is the process's choice: nothing but a file is opened, and of that only so much is read.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    str,
};

use nix::fcntl::OFlag;

use super::{
    interpreter::innermost_id,
    mappings::{inside, open_under},
};

/// How much of a map is read, in bytes: ten times what big programs write.
const MOST: u64 = 64 << 20;

/// Longest line.
const LINE: u64 = 4096;

/// Functions at those of the addresses that the map of a process tells of.
pub(super) fn functions(pid: u32, addresses: &[u64]) -> HashMap<u64, String> {
    if addresses.is_empty() {
        return HashMap::new();
    }
    open(pid).map(|map| read(map, addresses)).unwrap_or_default()
}

/// The map is named after the id that the process knows itself by, in the root that it has.
fn open(pid: u32) -> io::Result<File> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = innermost_id(&status, pid).map_err(io::Error::other)?;
    let root = File::open(inside(pid, "/".as_ref()))?;
    open_under(&root, format!("tmp/perf-{own}.map").as_ref(), OFlag::O_NOFOLLOW)
}

fn read(map: impl Read, addresses: &[u64]) -> HashMap<u64, String> {
    let mut map = BufReader::new(map.take(MOST));
    let mut found = HashMap::new();
    let mut line = Vec::new();
    while matches!(map.by_ref().take(LINE).read_until(b'\n', &mut line), Ok(1..)) {
        if let Some((start, size, name)) = function(line.trim_ascii_end()) {
            // Memory is used again: the last one that was written there is there.
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

/// Understands one line: start and size in hexadecimal, and a name that may be anything.
fn function(line: &[u8]) -> Option<(u64, u64, &[u8])> {
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
    fn the_latest_function_at_an_address_is_told() {
        let map = "1000 10 LazyCompile:~f /srv/a b.js:1\n1000 10 new f\n\n20 zz no\n2000 0 alone\nffffffffffffffff 5 last";
        let found = read(map.as_bytes(), &[0, 0x1000, 0x100f, 0x1010, 0x2000, 0x2001, u64::MAX]);
        let told = |address: u64| found.get(&address).map(String::as_str);
        assert_eq!((told(0x1000), told(0x100f)), (Some("new f"), Some("new f")));
        assert_eq!((told(0x2000), told(u64::MAX)), (Some("alone"), Some("last")));
        assert_eq!(found.len(), 4);
        // A line without an end takes no memory.
        assert_eq!(read(io::repeat(b'1').take(1 << 20), &[0x1111]), HashMap::new());
    }

    /// It would hang, were the pipe opened.
    #[test]
    fn only_a_file_is_a_map() {
        let pid = std::process::id();
        let path = format!("/tmp/perf-{pid}.map");
        let told = || functions(pid, &[0x1000]).remove(&0x1000);
        fs::write(&path, "1000 10 made\n").unwrap();
        assert_eq!(told().as_deref(), Some("made"));
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        fs::rename(&path, elsewhere.path()).unwrap();
        symlink(elsewhere.path(), &path).unwrap();
        let of_link = told();
        fs::remove_file(&path).unwrap();
        mkfifo(path.as_str(), Mode::S_IRWXU).unwrap();
        let of_pipe = told();
        fs::remove_file(&path).unwrap();
        assert_eq!((of_link, of_pipe), (None, None));
    }
}
