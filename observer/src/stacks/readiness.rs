//! Whether events wait for a busy event loop: asks the kernel whether the epoll set that the loop waits on has any. The
//! loop is not stopped, and no event is consumed.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;

use crate::kernel::descriptor::duplicate;

/// Whether the epoll set behind a descriptor of a process has events now; `None` if there is no such set. An error means
/// that observer may not ask.
///
/// The descriptor is duplicated for a moment. Nothing else than an epoll set is: closing the duplicate of another file
/// may have effects on its owner.
pub(super) fn has_events(pid: u32, descriptor: u32) -> Result<Option<bool>, Errno> {
    let Some(set) = duplicate(pid, descriptor, is_epoll_set)? else { return Ok(None) };
    if !is_epoll_set(&format!("/proc/self/fd/{}", set.as_raw_fd())) {
        return Ok(None);
    }
    let mut polled = [PollFd::new(set.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut polled, PollTimeout::ZERO).ok().map(|ready| ready > 0))
}

fn is_epoll_set(link: &str) -> bool {
    fs::read_link(link).is_ok_and(|file| file.as_os_str() == "anon_inode:[eventpoll]")
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::fd::BorrowedFd};

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

    use super::*;

    /// The descriptor of an epoll set.
    fn number(set: &Epoll) -> u32 {
        let set: BorrowedFd<'_> = set.0.as_fd();
        set.as_raw_fd().try_into().unwrap()
    }

    #[test]
    fn events_are_seen_and_not_consumed() {
        let pid = std::process::id();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        set.add(&reader, EpollEvent::new(edges, 7)).unwrap();
        assert_eq!(has_events(pid, number(&set)), Ok(Some(false)));
        writer.write_all(b"x").unwrap();
        assert_eq!([0; 2].map(|_| has_events(pid, number(&set))), [Ok(Some(true)); 2]);
        let mut events = [EpollEvent::empty()];
        assert_eq!(set.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1);
        // The edge has been returned.
        assert_eq!(has_events(pid, number(&set)), Ok(Some(false)));
        assert_eq!(has_events(pid, reader.as_raw_fd().try_into().unwrap()), Ok(None));
        assert_eq!(has_events(pid, u32::MAX), Ok(None));
    }
}
