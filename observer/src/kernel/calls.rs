//! System calls by number: their names, and what a thread that blocks in one waits for.

use observer_common::block::{CALLS, SyscallClass};
use syscalls::Sysno;

/// What each call tells; those that are not listed tell nothing ([`SyscallClass::Other`]).
const CLUED: &[(SyscallClass, &[Sysno])] = &[
    (SyscallClass::Futex, &[Sysno::futex]),
    (SyscallClass::Lock, &[Sysno::flock, Sysno::fcntl, Sysno::semop, Sysno::semtimedop]),
    // That of the address space, which another thread changes, copies or reads.
    (
        SyscallClass::Lock,
        &[Sysno::brk, Sysno::mmap, Sysno::munmap, Sysno::mremap, Sysno::mprotect, Sysno::madvise],
    ),
    (SyscallClass::Sleep, &[Sysno::nanosleep, Sysno::clock_nanosleep]),
    (
        SyscallClass::Network,
        &[
            Sysno::accept,
            Sysno::accept4,
            Sysno::connect,
            Sysno::recvfrom,
            Sysno::recvmsg,
            Sysno::recvmmsg,
            Sysno::sendto,
            Sysno::sendmsg,
            Sysno::sendmmsg,
            Sysno::shutdown,
        ],
    ),
    (
        SyscallClass::File,
        &[
            Sysno::read,
            Sysno::readv,
            Sysno::pread64,
            Sysno::preadv,
            Sysno::preadv2,
            Sysno::write,
            Sysno::writev,
            Sysno::pwrite64,
            Sysno::pwritev,
            Sysno::pwritev2,
            // To what it writes to: what it reads is a file, most of the time in memory.
            Sysno::sendfile,
            Sysno::ioctl,
            Sysno::close,
        ],
    ),
    (
        SyscallClass::Disk,
        &[
            Sysno::openat,
            Sysno::openat2,
            Sysno::newfstatat,
            Sysno::fstat,
            Sysno::statx,
            Sysno::faccessat,
            Sysno::faccessat2,
            Sysno::readlinkat,
            Sysno::getdents64,
            Sysno::statfs,
            Sysno::fstatfs,
            Sysno::mkdirat,
            Sysno::unlinkat,
            Sysno::renameat,
            Sysno::renameat2,
            Sysno::linkat,
            Sysno::symlinkat,
            Sysno::fchmodat,
            Sysno::fchownat,
            Sysno::utimensat,
            Sysno::truncate,
            Sysno::ftruncate,
            Sysno::fallocate,
            Sysno::fsync,
            Sysno::fdatasync,
            Sysno::sync,
            Sysno::syncfs,
            Sysno::sync_file_range,
            Sysno::msync,
            Sysno::copy_file_range,
            Sysno::readahead,
            Sysno::fadvise64,
        ],
    ),
    (SyscallClass::Poll, &[Sysno::ppoll]),
    (SyscallClass::Select, &[Sysno::pselect6]),
];

/// Those that newer architectures do without.
#[cfg(target_arch = "x86_64")]
const CLUED_HERE: &[(SyscallClass, &[Sysno])] = &[
    (SyscallClass::Sleep, &[Sysno::pause]),
    (
        SyscallClass::Disk,
        &[
            Sysno::open,
            Sysno::creat,
            Sysno::stat,
            Sysno::lstat,
            Sysno::access,
            Sysno::readlink,
            Sysno::getdents,
            Sysno::mkdir,
            Sysno::rmdir,
            Sysno::unlink,
            Sysno::rename,
            Sysno::link,
            Sysno::symlink,
            Sysno::chmod,
            Sysno::chown,
        ],
    ),
    (SyscallClass::Poll, &[Sysno::poll]),
    (SyscallClass::Select, &[Sysno::select]),
];
#[cfg(not(target_arch = "x86_64"))]
const CLUED_HERE: &[(SyscallClass, &[Sysno])] = &[];

/// A [`SyscallClass`] for each system call, by number, as the programs want it.
pub(crate) fn syscall_classes() -> [u8; CALLS] {
    let mut syscall_classes = [SyscallClass::Other as u8; CALLS];
    for (class, calls) in CLUED.iter().chain(CLUED_HERE) {
        for call in *calls {
            if let Some(place) =
                usize::try_from(call.id()).ok().and_then(|number| syscall_classes.get_mut(number))
            {
                *place = *class as u8;
            }
        }
    }
    syscall_classes
}

/// Name of a system call; its number if it is newer than observer.
pub(crate) fn name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(|| format!("system call {number}"), |call| call.name().to_owned())
}

#[cfg(test)]
mod tests {
    use observer_common::block::Block;

    use super::*;

    #[test]
    fn calls_have_names_and_clues() {
        let syscall_classes = syscall_classes();
        let class = |call: Sysno| syscall_classes[usize::try_from(call.id()).unwrap()];
        assert_eq!(class(Sysno::futex), SyscallClass::Futex as u8);
        assert_eq!(class(Sysno::flock), Block::Lock as u8);
        assert_eq!(class(Sysno::madvise), Block::Lock as u8);
        assert_eq!(class(Sysno::read), SyscallClass::File as u8);
        assert_eq!(class(Sysno::ppoll), SyscallClass::Poll as u8);
        assert_eq!(class(Sysno::wait4), Block::Other as u8);
        assert_eq!(name(u32::try_from(Sysno::clock_nanosleep.id()).unwrap()), "clock_nanosleep");
        assert_eq!(name(100_000), "system call 100000");
    }
}
