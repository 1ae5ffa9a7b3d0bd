//! Real programs for the tests of stacks: they are started blocked or spinning, and end with their test.

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
use super::unwind::Registers;

/// How long anything may take that should take no time at all; an emulated kernel is slow.
const LIMIT: Duration = Duration::from_secs(60);

/// A program that does not outlive its test.
pub(super) struct Program(Child);

impl Program {
    pub(super) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Asks again and again until there is an answer. Panics with `what` when it takes too long.
pub(super) fn wait_for<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Where a program is; says so if it is not here, and that the test is skipped.
pub(super) fn find(test: &str, program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file());
    if found.is_none() {
        eprintln!("skipped: {test}: there is no {program} here");
    }
    found
}

/// A file with a program's source.
pub(super) fn source(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
    path
}

/// Runs a program that has to succeed.
#[track_caller]
pub(super) fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// Registers of a thread. It stands still for as long as that takes, which a system call does not notice.
#[cfg(target_arch = "x86_64")]
pub(super) fn registers(tid: u32) -> Registers {
    stopped(tid, |registers| registers)
}

/// Looks at a thread while it stands still.
#[cfg(target_arch = "x86_64")]
pub(super) fn stopped<T>(tid: u32, look: impl FnOnce(Registers) -> T) -> T {
    let thread = Pid::from_raw(i32::try_from(tid).unwrap());
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(nix::sys::wait::WaitPidFlag::__WALL)).unwrap();
    let registers = ptrace::getregs(thread).unwrap();
    let seen = look(Registers { ip: registers.rip, sp: registers.rsp, bp: registers.rbp });
    ptrace::detach(thread, None).unwrap();
    seen
}

/// Whether a thread is blocked in one of the calls that programs sleep with.
pub(super) fn sleeps(pid: u32, tid: u32) -> Option<()> {
    let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let number: nix::libc::c_long = call.split(' ').next()?.trim().parse().ok()?;
    [nix::libc::SYS_clock_nanosleep, nix::libc::SYS_futex, nix::libc::SYS_ppoll]
        .contains(&number)
        .then_some(())
}

/// Ids of a process's threads.
pub(super) fn threads(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect()
}
