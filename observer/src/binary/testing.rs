//! Starts real programs, blocked or spinning, for the tests of stacks. They end with their test.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

#[cfg(target_arch = "x86_64")]
use nix::{
    sys::{ptrace, wait::waitpid},
    unistd::Pid,
};

#[cfg(target_arch = "x86_64")]
use crate::arch::registers::Registers;

/// How long to wait for something that normally takes no time; an emulated machine is slow.
const LIMIT: Duration = Duration::from_secs(60);

/// A running program. Dropping it kills the program.
pub(crate) struct Program(Child);

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _may_have_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Calls `poll` every 10 ms until it returns something. Panics with `what` after [`LIMIT`].
pub(crate) fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Finds a program in `PATH`. If it is missing, prints that the test is skipped.
pub(crate) fn find(test: &str, program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file());
    if found.is_none() {
        eprintln!("skipped: {test}: there is no {program} here");
    }
    found
}

/// Writes a program's source to a file.
pub(crate) fn source(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
    path
}

/// Runs a program. Panics unless it succeeds.
#[track_caller]
pub(crate) fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Reads the registers of a thread, which is stopped meanwhile. That does not interrupt a system call.
#[cfg(target_arch = "x86_64")]
pub(crate) fn registers(tid: u32) -> Registers {
    while_stopped(tid, |registers| registers)
}

/// Calls `read` with the registers of a thread while the thread is stopped.
#[cfg(target_arch = "x86_64")]
pub(crate) fn while_stopped<T>(tid: u32, read: impl FnOnce(Registers) -> T) -> T {
    let thread = Pid::from_raw(i32::try_from(tid).unwrap());
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(nix::sys::wait::WaitPidFlag::__WALL)).unwrap();
    let registers = ptrace::getregs(thread).unwrap();
    let result = read(Registers { ip: registers.rip, sp: registers.rsp, bp: registers.rbp });
    ptrace::detach(thread, None).unwrap();
    result
}

/// Whether a thread is blocked in one of the system calls that the test programs sleep with.
pub(crate) fn is_asleep(pid: u32, tid: u32) -> Option<()> {
    let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let number: nix::libc::c_long = call.split(' ').next()?.trim().parse().ok()?;
    [nix::libc::SYS_clock_nanosleep, nix::libc::SYS_futex, nix::libc::SYS_ppoll]
        .contains(&number)
        .then_some(())
}

/// Thread ids of a process.
pub(crate) fn threads(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect()
}
