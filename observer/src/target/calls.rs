//! Threads that were inside a wait or an accept before observer attached: nobody saw them enter, so `/proc` is asked.

use nix::libc;

/// A system call that a thread is blocked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// A wait for events.
    Wait,
    /// An accept on this descriptor.
    Accept { fd: u32 },
}

/// Threads of a process that are blocked in such a call now, with the call.
pub(crate) fn blocked_in(pid: u32) -> Vec<(u32, Call)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| {
            let call = std::fs::read_to_string(thread.path().join("syscall")).ok()?;
            Some((thread.file_name().to_str()?.parse().ok()?, parse(&call)?))
        })
        .collect()
}

/// Understands `/proc/PID/task/TID/syscall`: the number in decimal, then arguments in hexadecimal; `running` otherwise.
fn parse(line: &str) -> Option<Call> {
    let mut words = line.split(' ');
    let number: libc::c_long = words.next()?.trim().parse().ok()?;
    match number {
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait => Some(Call::Wait),
        libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => Some(Call::Wait),
        libc::SYS_accept | libc::SYS_accept4 => {
            let fd = u32::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
            Some(Call::Accept { fd })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_number() {
        let epoll =
            format!("{} 0x5 0x7ffd 0x400 0xffffffffffffffff 0x0 0x8 0x7ffd 0x7f\n", libc::SYS_epoll_pwait);
        assert_eq!(parse(&epoll), Some(Call::Wait));
        let accept = format!("{} 0x1f 0x0 0x0 0x80000 0x0 0x0 0x7ffd 0x7f\n", libc::SYS_accept4);
        assert_eq!(parse(&accept), Some(Call::Accept { fd: 31 }));
        assert_eq!(parse("running\n"), None);
        assert_eq!(parse("-1 0x7ffd 0x7f\n"), None);
    }
}
