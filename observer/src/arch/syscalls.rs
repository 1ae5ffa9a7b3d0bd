//! System calls that only older architectures have.

use nix::libc;
use observer_common::block::SyscallClass;
use syscalls::Sysno;

/// Legacy system calls, which newer architectures lack.
#[cfg(target_arch = "x86_64")]
pub(crate) const LEGACY_CLASSES: &[(SyscallClass, &[Sysno])] = &[
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
pub(crate) const LEGACY_CLASSES: &[(SyscallClass, &[Sysno])] = &[];

/// The number of the newer system call that a legacy one waits like; other numbers stay as they are.
pub(crate) fn newer(number: libc::c_long) -> libc::c_long {
    #[cfg(target_arch = "x86_64")]
    match number {
        libc::SYS_epoll_wait => return libc::SYS_epoll_pwait,
        libc::SYS_poll => return libc::SYS_ppoll,
        libc::SYS_select => return libc::SYS_pselect6,
        _ => {}
    }
    number
}
