//! Attaches a program to an instruction in a file, for one process. Not by the loader library, because that cannot name
//! a counter that the kernel has to keep: where a program asks whether somebody watches before it comes to the
//! instruction, the kernel itself has to raise that counter, and to lower it if observer is killed.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::libc;

use super::detach;

/// Where the kernel describes its uprobes.
const PMU: &str = "/sys/bus/event_source/devices/uprobe";

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// The instruction's place, in bytes from the beginning of the file.
    pub(crate) instruction: u64,
    /// Likewise the counter's; 0 if there is none.
    pub(crate) counter: u64,
}

/// A program that is attached. Dropping it has it detached; [`detach::finish`] waits for that.
#[derive(Debug)]
pub(crate) struct Uprobe {
    pid: u32,
    event: Option<OwnedFd>,
}

impl Drop for Uprobe {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            detach::later(self.pid, event);
        }
    }
}

/// `struct perf_event_attr` of `linux/perf_event.h` in its second version, as old as 2.6.33.
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
    /// Place in the file.
    offset: u64,
}

/// An event that counts nothing and runs nothing until it is turned on.
const DISABLED: u64 = 1;

/// What the kernel is told of its size.
const SIZE: u32 = 72;
const _: () = assert!(size_of::<Attributes>() == SIZE as usize);

const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 1 << 3;
const PERF_EVENT_IOC_SET_BPF: libc::c_ulong = 0x4004_2408;

impl Uprobe {
    /// Attaches a loaded program to one place in a file, wherever the process has that mapped, now or later.
    pub(crate) fn attach(program: BorrowedFd<'_>, file: &File, site: Site, pid: u32) -> io::Result<Self> {
        let event = open(file, site, pid, 0)?;
        let (descriptor, uprobe) = (event.as_raw_fd(), Self { pid, event: Some(event) });
        // SAFETY: two descriptors that are open; the kernel holds on to the program itself.
        let outcome = unsafe { libc::ioctl(descriptor, PERF_EVENT_IOC_SET_BPF, program.as_raw_fd()) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(uprobe) }
    }
}

/// Makes an event of a place in a file, for one process.
fn open(file: &File, site: Site, pid: u32, flags: u64) -> io::Result<OwnedFd> {
    let kind = fs::read_to_string(format!("{PMU}/type"))?;
    let kind = kind.trim().parse().map_err(io::Error::other)?;
    // The file that is open, whatever its name is by now and in whose file system.
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
    // SAFETY: the attributes, of the size they state, and the path in them, which ends with a zero, outlive the call.
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
    // SAFETY: a descriptor that was made just now and that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(event) })
}

/// Whether this kernel has uprobes, keeps counters for them, and lets us have some. An error says why not.
pub(crate) fn probe() -> Result<(), String> {
    if fs::metadata(format!("{PMU}/format/ref_ctr_offset")).is_err() {
        return Err("the kernel was built without CONFIG_UPROBE_EVENTS".into());
    }
    let nowhere = Site { instruction: 0, counter: 0 };
    let program = File::open("/proc/self/exe").map_err(|error| error.to_string())?;
    match open(&program, nowhere, std::process::id(), DISABLED) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("the kernel does not let us attach any: {error}")),
    }
}
