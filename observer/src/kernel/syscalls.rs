//! System calls by number: their names, and their classes, which say what a thread that blocks in them waits for.

use observer_common::block::{CALLS, SyscallClass};
use syscalls::Sysno;

use crate::arch::syscalls::LEGACY_CLASSES;

/// Classes of system calls; those not listed are [`SyscallClass::Other`].
const CLASSES: &[(SyscallClass, &[Sysno])] = &[
    (SyscallClass::Lock, &[Sysno::futex, Sysno::flock, Sysno::fcntl, Sysno::semop, Sysno::semtimedop]),
    // They take the lock of the address space, which other threads hold while they change, copy or read it.
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
            // The class is that of the destination: the source is a file, usually in the page cache.
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

/// The [`SyscallClass`] of each system call, indexed by number, for the programs.
pub(crate) fn syscall_classes() -> [u8; CALLS] {
    let mut syscall_classes = [SyscallClass::Other as u8; CALLS];
    for (class, calls) in CLASSES.iter().chain(LEGACY_CLASSES) {
        for call in *calls {
            if let Some(entry) =
                usize::try_from(call.id()).ok().and_then(|number| syscall_classes.get_mut(number))
            {
                *entry = *class as u8;
            }
        }
    }
    syscall_classes
}

/// Name of a system call, or its number if it is unknown.
pub(crate) fn name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(|| format!("system call {number}"), |call| call.name().to_owned())
}

#[cfg(test)]
mod tests {
    use observer_common::block::Block;

    use super::*;

    #[test]
    fn calls_have_names_and_classes() {
        let syscall_classes = syscall_classes();
        let class = |call: Sysno| syscall_classes[usize::try_from(call.id()).unwrap()];
        assert_eq!(class(Sysno::futex), Block::Lock as u8);
        assert_eq!(class(Sysno::flock), Block::Lock as u8);
        assert_eq!(class(Sysno::madvise), Block::Lock as u8);
        assert_eq!(class(Sysno::read), SyscallClass::File as u8);
        assert_eq!(class(Sysno::ppoll), SyscallClass::Poll as u8);
        assert_eq!(class(Sysno::wait4), Block::Other as u8);
        assert_eq!(name(u32::try_from(Sysno::clock_nanosleep.id()).unwrap()), "clock_nanosleep");
        assert_eq!(name(100_000), "system call 100000");
    }
}
