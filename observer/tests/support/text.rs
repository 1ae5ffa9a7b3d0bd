//! Compares the code of a process in memory with the files that it is mapped from: a breakpoint is a difference.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
};

use nix::libc;
use procfs::process::{MMPermissions, MMapPath, Process};

const PAGE: usize = 4096;

/// Addresses at which the code differs from its file, as `path+offset`.
pub(crate) fn altered_code(pid: u32) -> Vec<String> {
    let process = Process::new(pid.cast_signed()).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut altered = Vec::new();
    for map in process.maps().unwrap() {
        let MMapPath::Path(path) = &map.pathname else { continue };
        if !map.perms.contains(MMPermissions::EXECUTE) {
            continue;
        }
        let (start, end) = map.address;
        // A library that was loaded or unloaded in between is checked the next time.
        let Ok(file) = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")) else { continue };
        let length = usize::try_from(end - start).unwrap();
        let (mut in_memory, mut in_file) = (vec![0; length], vec![0; length]);
        if memory.read_exact_at(&mut in_memory, start).is_err() {
            continue;
        }
        // The last page may extend beyond the end of the file.
        let mut read = 0;
        while read < length {
            let more = file.read_at(&mut in_file[read..], map.offset + read as u64).unwrap();
            if more == 0 {
                break;
            }
            read += more;
        }
        // Comparing whole pages first makes this ten times faster.
        let pages = (0..read).step_by(PAGE).map(|at| at..read.min(at + PAGE));
        let differing_pages = pages.filter(|page| in_memory[page.clone()] != in_file[page.clone()]);
        let differs = differing_pages.flatten().filter(|&at| in_memory[at] != in_file[at]);
        altered.extend(differs.map(|at| format!("{}+{:#x}", path.display(), map.offset + at as u64)));
    }
    altered
}

/// The kernel log from now on.
pub(crate) struct KernelLog(File);

impl KernelLog {
    /// Skips existing records.
    pub(crate) fn from_now_on() -> Self {
        let log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let mut log = Self(log.unwrap());
        log.lines();
        log
    }

    /// Lines since the last call.
    pub(crate) fn lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(length) => lines.push(String::from_utf8_lossy(&record[..length]).into_owned()),
                // Records were overwritten before they were read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return lines,
                Err(error) => panic!("/dev/kmsg: {error}"),
            }
        }
    }
}
