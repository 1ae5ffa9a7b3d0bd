//! System calls that event loops wait in, and threads that are blocked in such a call or in an accept. The programs
//! miss calls that were entered before observer attached, so these are read from `/proc`.

use std::{fmt, fs::File, os::unix::fs::FileExt as _};

use clap::ValueEnum;
use nix::libc;
use observer_common::waiter::Kind;

use crate::arch::syscalls::newer;

/// A family of system calls that event loops wait in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitCall {
    /// epoll_wait, epoll_pwait, epoll_pwait2
    Epoll,
    /// io_uring_enter, where it waits for completions
    #[value(name = "io_uring")]
    IoUring,
    /// poll, ppoll
    Poll,
    /// select, pselect6
    Select,
}

impl WaitCall {
    /// Calls that are hardly used by anything but event loops.
    pub(crate) const DEFAULT: [Self; 2] = [Self::Epoll, Self::IoUring];
}

impl WaitCall {
    /// Name on the command line.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Epoll => "epoll",
            Self::IoUring => "io_uring",
            Self::Poll => "poll",
            Self::Select => "select",
        }
    }
}

impl fmt::Display for WaitCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Number of bits of a `fd_set` in C libraries (`FD_SETSIZE`).
const FD_SETSIZE: usize = 1024;

/// A system call that a thread is blocked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// A wait for events of this kind, on this epoll set or ring, or on several descriptors of which `set` is the
    /// first.
    Wait { kind: Kind, set: u32 },
    /// The same, in a call of a family that is not watched.
    Unwatched(WaitCall),
    /// An accept on this descriptor.
    Accept { fd: u32 },
}

/// Threads of a process that are blocked in an accept or a wait now, each with its call. `waits` are those that are
/// watched.
pub(crate) fn blocked_in(pid: u32, waits: &[WaitCall]) -> Vec<(u32, Call)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    threads.filter_map(|tid| Some((tid, call_of(pid, tid, waits)?))).collect()
}

/// The call that a thread is blocked in now, if it is an accept or a wait. `waits` are those that are watched.
pub(crate) fn call_of(pid: u32, tid: u32, waits: &[WaitCall]) -> Option<Call> {
    let call = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let memory =
        |at, buffer: &mut [u8]| File::open(format!("/proc/{pid}/mem")).ok()?.read_exact_at(buffer, at).ok();
    parse(&call, waits, memory)
}

/// Parses `/proc/PID/task/TID/syscall`: the number in decimal, then the arguments in hexadecimal; or `running`.
/// `memory` reads the caller's memory.
pub(crate) fn parse(
    line: &str,
    waits: &[WaitCall],
    memory: impl Fn(u64, &mut [u8]) -> Option<()>,
) -> Option<Call> {
    let mut words = line.split_whitespace();
    let number: libc::c_long = words.next()?.parse().ok()?;
    let arguments: Vec<u64> =
        words.map_while(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect();
    let [first, second, third, fourth, ..] = arguments[..] else { return None };
    // The programs apply the same rules, see `observer-ebpf/src/probes/reactor`.
    let (calls, wait) = match newer(number) {
        libc::SYS_accept | libc::SYS_accept4 => return Some(Call::Accept { fd: int(first) }),
        libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => (WaitCall::Epoll, Some((Kind::Epoll, int(first)))),
        libc::SYS_io_uring_enter => {
            // Arguments: fd, to_submit, min_complete, flags. Bit 0 is IORING_ENTER_GETEVENTS.
            let waits = int(third) > 0 && int(fourth) & 1 != 0;
            (WaitCall::IoUring, waits.then_some((Kind::IoUring, int(first))))
        }
        libc::SYS_ppoll => (WaitCall::Poll, poll_set(first, int(second), memory)),
        libc::SYS_pselect6 => (WaitCall::Select, select_set(int(first), [second, third, fourth], memory)),
        _ => return None,
    };
    let (kind, set) = wait?;
    Some(if waits.contains(&calls) { Call::Wait { kind, set } } else { Call::Unwatched(calls) })
}

/// The first descriptor of a `poll`; `None` if there are fewer than two.
fn poll_set(at: u64, count: u32, memory: impl Fn(u64, &mut [u8]) -> Option<()>) -> Option<(Kind, u32)> {
    let mut first = [0; 4];
    memory(at, &mut first)?;
    (count > 1).then_some((Kind::Poll, u32::from_ne_bytes(first)))
}

/// The lowest descriptor of a `select`; `None` if there are fewer than two.
fn select_set(
    limit: u32,
    sets: [u64; 3],
    memory: impl Fn(u64, &mut [u8]) -> Option<()>,
) -> Option<(Kind, u32)> {
    let bytes = usize::try_from(limit.div_ceil(u64::BITS)).ok()? * 8;
    let mut members = [0; FD_SETSIZE / 8];
    let members = members.get_mut(..bytes)?;
    for at in sets.into_iter().filter(|&at| at != 0) {
        let mut set = [0; FD_SETSIZE / 8];
        let set = set.get_mut(..bytes)?;
        memory(at, set)?;
        members.iter_mut().zip(set).for_each(|(all, one)| *all |= *one);
    }
    let mut descriptors = (0..limit).filter(|fd| members[*fd as usize / 8] & 1 << (fd % 8) != 0);
    let first = descriptors.next()?;
    descriptors.next().map(|_| (Kind::Poll, first))
}

/// An `int` argument: the upper half of its register is undefined.
#[expect(clippy::cast_possible_truncation, reason = "the truncation is intended")]
const fn int(argument: u64) -> u32 {
    argument as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads memory with descriptors 4 and 6 in a `fd_set` at 0x100, whose first word is also descriptor 80 of a
    /// `poll`.
    fn read(at: u64, buffer: &mut [u8]) -> Option<()> {
        buffer.fill(0);
        if at == 0x100 {
            buffer[0] = 1 << 4 | 1 << 6;
        }
        Some(())
    }

    fn call(number: libc::c_long, arguments: &str) -> Option<Call> {
        parse(&format!("{number} {arguments} 0x7ffd 0x7f\n"), WaitCall::value_variants(), read)
    }

    #[test]
    fn calls_are_recognised_by_number_and_arguments() {
        let wait = |kind, set| Some(Call::Wait { kind, set });
        assert_eq!(
            call(libc::SYS_epoll_pwait, "0x5 0x7ffd 0x400 0xffffffffffffffff 0x0 0x8"),
            wait(Kind::Epoll, 5)
        );
        assert_eq!(call(libc::SYS_accept4, "0x1f 0x0 0x0 0x80000 0x0 0x0"), Some(Call::Accept { fd: 31 }));
        assert_eq!(call(libc::SYS_io_uring_enter, "0x6 0x0 0x1 0x1 0x0 0x8"), wait(Kind::IoUring, 6));
        // Only submits.
        assert_eq!(call(libc::SYS_io_uring_enter, "0x6 0x1 0x0 0x0 0x0 0x8"), None);
        assert_eq!(call(libc::SYS_ppoll, "0x100 0x2 0x0 0x0 0x8 0x0"), wait(Kind::Poll, 80));
        assert_eq!(call(libc::SYS_ppoll, "0x100 0x1 0x0 0x0 0x8 0x0"), None);
        assert_eq!(call(libc::SYS_pselect6, "0x7 0x100 0x0 0x0 0x0 0x0"), wait(Kind::Poll, 4));
        // One descriptor below the limit; none at all, which is a sleep.
        assert_eq!(call(libc::SYS_pselect6, "0x5 0x100 0x0 0x0 0x0 0x0"), None);
        assert_eq!(call(libc::SYS_pselect6, "0x0 0x0 0x0 0x0 0x0 0x0"), None);
        assert_eq!(call(libc::SYS_read, "0x0 0x0 0x0 0x0 0x0 0x0"), None);
    }

    #[test]
    fn calls_not_asked_for_are_unwatched() {
        let poll = format!("{} 0x100 0x2 0x0 0x0 0x8 0x0 0x7ffd 0x7f\n", libc::SYS_ppoll);
        assert_eq!(parse(&poll, &WaitCall::DEFAULT, read), Some(Call::Unwatched(WaitCall::Poll)));
    }

    #[test]
    fn a_running_thread_is_in_no_call() {
        assert_eq!(parse("running\n", &WaitCall::DEFAULT, read), None);
        assert_eq!(parse("-1 0x7ffd 0x7f\n", &WaitCall::DEFAULT, read), None);
    }
}
