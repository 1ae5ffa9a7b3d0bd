//! Names of JIT-compiled functions, from the map that a runtime writes for `perf` (`/tmp/perf-PID.map`). Any user can make a
//! file at that path, so only a regular file of the process's user or of root is read, and only a limited part of it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read},
    os::unix::fs::MetadataExt as _,
    str,
};

use anyhow::{Context as _, Result, ensure};

use nix::fcntl::OFlag;

use super::interpreter::innermost_id;
use crate::{
    binary::mappings::{inside, open_in_root},
    sanitize::clean,
};

/// How much of a map is read, in bytes: ten times the map of a big program.
const SIZE_MAX: u64 = 64 << 20;

/// Maximum length of a line, in bytes.
const LINE_MAX: u64 = 4096;

/// What a map says of some addresses.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    /// Names of the functions at these addresses, as far as the map has them.
    pub(super) functions: HashMap<u64, String>,
    /// Why names may be missing; `None` if the process has no map, or all of it was read.
    pub(super) problem: Option<String>,
}

/// Looks addresses up in the process's map.
pub(super) fn functions(pid: u32, addresses: &[u64]) -> Names {
    if addresses.is_empty() {
        return Names::default();
    }
    match open(pid) {
        Ok(Some(map)) => read(map, addresses),
        Ok(None) => Names::default(),
        Err(why) => Names {
            functions: HashMap::new(),
            problem: Some(format!("the perf map of the process is not used: {why:#}")),
        },
    }
}

/// Opens a process's map, if it has one. It is in the process's root, and its name has the process id of the process's
/// own namespace.
fn open(pid: u32) -> Result<Option<File>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = innermost_id(&status, pid)?;
    let root = File::open(inside(pid, "/".as_ref()))?;
    let path = format!("tmp/perf-{own}.map");
    let map = match open_in_root(&root, path.as_ref(), OFlag::O_NOFOLLOW) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let user = effective_user(&status).context("the user of the process is unknown")?;
    let owner = map.metadata()?.uid();
    ensure!(is_trusted(owner, user), "/{path} belongs to user {owner}, not to user {user} of the process");
    Ok(Some(map))
}

/// The effective user id in a `status` file.
fn effective_user(status: &str) -> Option<u32> {
    // `Uid:`, then the real, effective, saved and file system id.
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// Whether a map that belongs to `owner` says what functions a process of `user` has.
const fn is_trusted(owner: u32, user: u32) -> bool {
    owner == user || owner == 0
}

/// Finds the functions at these addresses in a map.
fn read(map: impl Read, addresses: &[u64]) -> Names {
    let mut map = BufReader::new(map.take(SIZE_MAX));
    let mut functions = HashMap::new();
    let (mut size, mut lines, mut invalid) = (0, 0_u64, 0_u64);
    let mut line = Vec::new();
    while let Ok(length @ 1..) = map.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
        size += length as u64;
        lines += 1;
        match parse_line(line.trim_ascii_end()) {
            Some((start, size, name)) => {
                // JIT compilers reuse memory: the last entry for an address is the current one.
                for &address in addresses {
                    if address.checked_sub(start).is_some_and(|offset| offset < size.max(1)) {
                        functions.insert(address, clean(&String::from_utf8_lossy(name)).into_owned());
                    }
                }
            }
            None => invalid += 1,
        }
        line.clear();
    }
    let problem = if size == SIZE_MAX {
        Some(format!("only the first {} MiB of the process's perf map were read", SIZE_MAX >> 20))
    } else {
        (invalid > 0).then(|| {
            format!(
                "{invalid} of {lines} lines of the process's perf map are not START SIZE NAME in hexadecimal"
            )
        })
    };
    Names { functions, problem }
}

/// Parses one line: start and size in hexadecimal, with or without `0x`, and a name, which may be any bytes.
fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let mut parts = line.splitn(3, |&byte| byte == b' ');
    let mut number = || {
        let digits = str::from_utf8(parts.next()?).ok()?;
        u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok()
    };
    Some((number()?, number()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, process::Command};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::binary::testing::{Program, find, source, wait_for};

    #[test]
    fn the_last_entry_for_an_address_wins() {
        let map = "1000 10 LazyCompile:~f /srv/a b.js:1\n1000 10 new f\n\n20 zz no\n2000 0 alone\nffffffffffffffff 5 last";
        let Names { functions: found, problem } =
            read(map.as_bytes(), &[0, 0x1000, 0x100f, 0x1010, 0x2000, 0x2001, u64::MAX]);
        let name = |address: u64| found.get(&address).map(String::as_str);
        assert_eq!((name(0x1000), name(0x100f)), (Some("new f"), Some("new f")));
        assert_eq!((name(0x2000), name(u64::MAX)), (Some("alone"), Some("last")));
        assert_eq!(found.len(), 4);
        let expected = "2 of 6 lines of the process's perf map are not START SIZE NAME in hexadecimal";
        assert_eq!(problem.as_deref(), Some(expected));
        // A line without an end is read in parts of limited length.
        assert_eq!(read(io::repeat(b'1').take(1 << 20), &[0x1111]).functions, HashMap::new());
        let endless = read(io::repeat(b'1'), &[0x1111]).problem.unwrap();
        assert_eq!(endless, "only the first 64 MiB of the process's perf map were read");
    }

    /// The first form is that of V8 and perf-map-agent, the second that of the JDK's `Compiler.perfmap`.
    #[test]
    fn numbers_may_have_a_prefix() {
        let name = b"void app.Main.work(int)";
        for line in ["7f1200001000 a8", "0x00007f1200001000 0x00000000000000a8", "7f1200001000 0xa8"] {
            let line = [line.as_bytes(), b" ", name].concat();
            assert_eq!(parse_line(&line), Some((0x7f12_0000_1000, 0xa8, &name[..])));
        }
        assert_eq!(parse_line(b"0x 10 a"), None);
        assert_eq!(parse_line(b"0x0x10 10 a"), None);
    }

    #[test]
    fn maps_of_the_jdk_are_read() {
        const SPIN: &str = "public class Main {
            static long work(long n) { long sum = 0; for (long i = 0; i < n; i++) sum += i % 7; return sum; }
            public static void main(String[] arguments) { while (work(1000000) > 0); }
        }";
        let (Some(java), Some(jcmd)) = (find("maps_of_the_jdk", "java"), find("maps_of_the_jdk", "jcmd"))
        else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let script = source(folder.path(), "Main.java", SPIN);
        let program = Program::start(Command::new(java).arg(script));
        let pid = program.pid();
        let path = format!("/tmp/perf-{pid}.map");
        let line = wait_for("the function in the map", || {
            let done = Command::new(&jcmd).args([&pid.to_string(), "Compiler.perfmap"]).output().ok()?;
            assert!(!String::from_utf8_lossy(&done.stdout).contains("Unknown"), "{done:?}");
            let map = fs::read_to_string(&path).ok()?;
            Some(map.lines().find(|line| line.ends_with(" long Main.work(long)"))?.to_owned())
        });
        let address =
            u64::from_str_radix(line.split(' ').next().unwrap().trim_start_matches("0x"), 16).unwrap();
        let names = functions(pid, &[address + 1]);
        fs::remove_file(&path).unwrap();
        assert_eq!(names.functions[&(address + 1)], "long Main.work(long)");
        assert_eq!(names.problem, None);
    }

    #[test]
    fn names_are_cleaned_and_only_two_owners_trusted() {
        let names = read(&b"1000 10 a\x1b[2Jb\n"[..], &[0x1000]);
        assert_eq!(names.functions[&0x1000], "a\u{fffd}[2Jb");
        assert_eq!(names.problem, None);
        assert!(is_trusted(33, 33) && is_trusted(0, 33));
        assert!(!is_trusted(1000, 33) && !is_trusted(1000, 0));
        assert_eq!(effective_user("Name:\tx\nUid:\t1\t2\t3\t4\n"), Some(2));
    }

    /// The test would hang if the FIFO were opened.
    #[test]
    fn only_a_regular_file_is_read() {
        let pid = std::process::id();
        let path = format!("/tmp/perf-{pid}.map");
        let name = || functions(pid, &[0x1000]).functions.remove(&0x1000);
        fs::write(&path, "1000 10 made\n").unwrap();
        assert_eq!(name().as_deref(), Some("made"));
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
            let Names { functions, problem } = functions(pid, &[0x1000]);
            assert_eq!(functions, HashMap::new());
            let why = format!("{path} belongs to user 12345, not to user 0 of the process");
            assert!(problem.as_ref().unwrap().ends_with(&why), "{problem:?}");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
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
