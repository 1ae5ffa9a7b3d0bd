//! Descriptors of other processes.

use std::os::fd::OwnedFd;

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

/// Duplicates a descriptor of a process if its path in `/proc` satisfies a condition; `None` if it does not, or is gone. An
/// error means that observer may not duplicate it.
///
/// Closing the duplicate of some files has effects on their owner, and the duplicate keeps the file open if its owner closes
/// it meanwhile. The condition must exclude files for which either matters.
pub(crate) fn duplicate(
    pid: u32,
    descriptor: u32,
    condition: impl FnOnce(&str) -> bool,
) -> Result<Option<OwnedFd>, Errno> {
    let numbers = i32::try_from(pid).ok().and_then(Pid::from_raw).zip(descriptor.try_into().ok());
    let Some((leader, number)) = numbers else { return Ok(None) };
    // From here on, the process id cannot come to mean another process.
    let Ok(process) = pidfd_open(leader, PidfdFlags::empty()) else { return Ok(None) };
    if !condition(&format!("/proc/{pid}/fd/{descriptor}")) {
        return Ok(None);
    }
    match pidfd_getfd(process, number, PidfdGetfdFlags::empty()) {
        Ok(duplicate) => Ok(Some(duplicate)),
        Err(Errno::PERM | Errno::NOSYS) => Err(Errno::PERM),
        // Gone.
        Err(_) => Ok(None),
    }
}
