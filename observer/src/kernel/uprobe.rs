//! Attaches a program to an instruction in a file, for one process. Uses `perf_event_open` directly because aya cannot
//! pass a reference counter (USDT semaphore). The kernel must increment it, so that the traced program reaches the
//! instruction, and decrement it even if observer is killed.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::libc;

use super::detach;

/// The kernel's PMU of uprobes.
const PMU: &str = "/sys/bus/event_source/devices/uprobe";

/// An attach point in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// Offset of the instruction in the file, in bytes.
    pub(crate) instruction: u64,
    /// Offset of the reference counter in the file, in bytes; 0 for none.
    pub(crate) counter: u64,
}

/// An attached program. Dropping it detaches it in the background; [`detach::finish`] waits for that.
#[derive(Debug)]
pub(crate) struct Uprobe {
    pid: u32,
    event: Option<OwnedFd>,
}

impl Drop for Uprobe {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            detach::schedule(self.pid, event);
        }
    }
}

/// `struct perf_event_attr` of `linux/perf_event.h` up to `PERF_ATTR_SIZE_VER1`, which every kernel since 2.6.33
/// accepts.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    sample: u64,
    read: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    /// Address of the file's path.
    path: u64,
    /// Offset in the file.
    offset: u64,
}

/// `disabled`: the event neither counts nor runs anything until it is enabled.
const DISABLED: u64 = 1;

/// Size passed to the kernel, `PERF_ATTR_SIZE_VER1`.
const SIZE: u32 = 72;
const _: () = assert!(size_of::<Attributes>() == SIZE as usize);

const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
const PERF_EVENT_IOC_SET_BPF: libc::c_ulong = 0x4004_2408;

impl Uprobe {
    /// Attaches a loaded program to an instruction of a file, wherever the process maps it, now or later.
    pub(crate) fn attach(program: BorrowedFd<'_>, file: &File, site: Site, pid: u32) -> io::Result<Self> {
        let event = open(file, site, pid, 0)?;
        let (descriptor, uprobe) = (event.as_raw_fd(), Self { pid, event: Some(event) });
        // SAFETY: both descriptors are open for the duration of the call; the kernel takes its own reference to the
        // program.
        let outcome = unsafe { libc::ioctl(descriptor, PERF_EVENT_IOC_SET_BPF, program.as_raw_fd()) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(uprobe) }
    }
}

/// Opens a perf event for an instruction of a file, for one process.
fn open(file: &File, site: Site, pid: u32, flags: u64) -> io::Result<OwnedFd> {
    let kind = fs::read_to_string(format!("{PMU}/type"))?;
    let kind = kind.trim().parse().map_err(io::Error::other)?;
    // By descriptor: the file may be renamed or deleted, or be in another mount namespace.
    let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
    let counter = u32::try_from(site.counter).map_err(io::Error::other)?;
    let attributes = Attributes {
        kind,
        size: SIZE,
        config: u64::from(counter) << 32,
        path: path.as_ptr() as u64,
        offset: site.instruction,
        flags,
        ..Attributes::default()
    };
    let (any_cpu, no_group) = (-1, -1);
    // SAFETY: `attributes` has the size that it states; it and the zero-terminated path that it points to outlive the
    // call.
    let event = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            pid,
            any_cpu,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    let event = i32::try_from(event).ok().filter(|&event| event >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(event) })
}

/// Checks that this kernel has uprobes with reference counters and permits attaching them. An error says why not.
pub(crate) fn probe() -> Result<(), String> {
    if fs::metadata(format!("{PMU}/format/ref_ctr_offset")).is_err() {
        return Err("the kernel was built without CONFIG_UPROBE_EVENTS".into());
    }
    let nowhere = Site { instruction: 0, counter: 0 };
    let program = File::open("/proc/self/exe").map_err(|error| error.to_string())?;
    match open(&program, nowhere, std::process::id(), DISABLED) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("the kernel refuses to attach uprobes: {error}")),
    }
}
