//! The only file that knows fields of kernel structures. Their offsets come from the running kernel (see
//! `observer_common::layout`); the verifier sees them as constants, because the global is frozen when it looks.
//!
//! Two ways to read: arguments of BTF tracepoints are typed pointers, loaded directly and checked by the
//! verifier; everything reached from a plain tracepoint goes through `bpf_probe_read_kernel`.

use core::ptr::read_volatile;

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_task, bpf_probe_read_kernel},
    programs::{BtfTracePointContext, TracePointContext},
};
use observer_common::layout::KernelLayout;

/// Filled in by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static LAYOUT: KernelLayout = KernelLayout::ZERO;

const TCP: u16 = 6;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// The injected offset of a field; volatile, because the compiler believes in the zero it was built with.
#[inline(always)]
fn offset(field: &'static u32) -> usize {
    // SAFETY: a reference; only the loader ever writes there, before any program runs.
    unsafe { read_volatile(field) as usize }
}

/// Loads a field through a pointer whose BTF type the verifier knows.
///
/// # Safety
/// `base` is such a pointer and `offset` that of a `T` in it. A stale pointer reads as zero.
#[inline(always)]
unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: by contract.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// Reads a field through any kernel pointer; `None` if it does not point to memory.
#[inline(always)]
fn probe<T>(base: *const u8, offset: usize) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset).cast()) }.ok()
}

/// Process and thread id of whoever runs now, as the initial pid namespace has them.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two 32-bit ids packed in 64 bits")]
pub(crate) fn current() -> (u32, u32) {
    let both = bpf_get_current_pid_tgid();
    ((both >> 32) as u32, both as u32)
}

/// Return value of a system call, in its exit tracepoint.
#[inline(always)]
pub(crate) fn returned(ctx: &TracePointContext) -> Option<i64> {
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.exit_ret)) }.ok()
}

/// A `struct task_struct` handed to a BTF tracepoint.
pub(crate) struct Task(*const u8);

impl Task {
    #[inline(always)]
    pub(crate) fn argument(ctx: &BtfTracePointContext, n: usize) -> Self {
        Self(ctx.arg(n))
    }

    #[inline(always)]
    pub(crate) fn tid(&self) -> u32 {
        // SAFETY: typed pointer, offset of this field.
        unsafe { load(self.0, offset(&LAYOUT.task_pid)) }
    }

    #[inline(always)]
    pub(crate) fn tgid(&self) -> u32 {
        // SAFETY: as above.
        unsafe { load(self.0, offset(&LAYOUT.task_tgid)) }
    }

    /// Threads of its process that have not begun to exit.
    #[inline(always)]
    pub(crate) fn live_threads(&self) -> u32 {
        // SAFETY: as above; `signal` is a typed pointer as well.
        unsafe {
            let signal: *const u8 = load(self.0, offset(&LAYOUT.task_signal));
            load(signal, offset(&LAYOUT.signal_live))
        }
    }
}

/// Whether the thread that `sched_switch` takes off its CPU blocks, rather than being preempted.
#[inline(always)]
pub(crate) fn blocks(ctx: &BtfTracePointContext) -> bool {
    let preempted: u8 = ctx.arg(0);
    if preempted != 0 {
        return false;
    }
    if offset(&LAYOUT.switch_has_state) != 0 {
        // A wake-up may already have changed the field; the argument is what the scheduler decided on.
        let state: u32 = ctx.arg(3);
        state != 0
    } else {
        let previous: *const u8 = ctx.arg(1);
        // SAFETY: typed pointer, offset of this field.
        let state: u64 = unsafe { load(previous, offset(&LAYOUT.task_state)) };
        state != 0
    }
}

/// A `struct sock` handed to a BTF tracepoint.
pub(crate) struct Sock(*const u8);

impl Sock {
    #[inline(always)]
    pub(crate) fn argument(ctx: &BtfTracePointContext, n: usize) -> Self {
        Self(ctx.arg(n))
    }

    /// Its address, which identifies it while it lives.
    #[inline(always)]
    pub(crate) fn address(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // SAFETY: typed pointer, offset of this field.
        let protocol: u16 = unsafe { load(self.0, offset(&LAYOUT.sock_protocol)) };
        protocol == TCP
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub(crate) fn port(&self) -> u16 {
        // SAFETY: as above.
        unsafe { load(self.0, offset(&LAYOUT.sock_port)) }
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u32 {
        // SAFETY: as above; `net` is a typed pointer as well.
        unsafe {
            let net: *const u8 = load(self.0, offset(&LAYOUT.sock_net));
            load(net, offset(&LAYOUT.net_inum))
        }
    }
}

/// The first argument of `accept` or `accept4`, in its entry tracepoint.
#[inline(always)]
pub(crate) fn accept_fd(ctx: &TracePointContext) -> Option<u32> {
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.enter_accept_fd)) }.ok()
}

/// An open TCP socket of the current process.
pub(crate) struct OpenSocket {
    sk: *const u8,
    inode: *const u8,
}

impl OpenSocket {
    /// What descriptor `fd` stands for; `None` if that is not a TCP socket.
    #[inline(always)]
    pub(crate) fn of(fd: u32) -> Option<Self> {
        // SAFETY: has no preconditions.
        let task = unsafe { bpf_get_current_task() } as *const u8;
        let files: *const u8 = probe(task, offset(&LAYOUT.task_files))?;
        let table: *const u8 = probe(files, offset(&LAYOUT.files_fdt))?;
        if fd >= probe::<u32>(table, offset(&LAYOUT.fdt_max_fds))? {
            return None;
        }
        let open: *const u8 = probe(table, offset(&LAYOUT.fdt_fd))?;
        let file: *const u8 = probe(open, fd as usize * size_of::<*const u8>())?;
        let socket: *const u8 = probe(file, offset(&LAYOUT.file_private_data))?;
        // Any file may have private data; only a socket points back at its file.
        if probe::<*const u8>(socket, offset(&LAYOUT.socket_file))? != file {
            return None;
        }
        let sk: *const u8 = probe(socket, offset(&LAYOUT.socket_sk))?;
        let family: u16 = probe(sk, offset(&LAYOUT.sock_family))?;
        let protocol: u16 = probe(sk, offset(&LAYOUT.sock_protocol))?;
        if (family != AF_INET && family != AF_INET6) || protocol != TCP {
            return None;
        }
        Some(Self { sk, inode: probe(file, offset(&LAYOUT.file_inode))? })
    }

    /// Address of its `struct sock`, as [`Sock::address`] has it.
    #[inline(always)]
    pub(crate) fn address(&self) -> u64 {
        self.sk as u64
    }

    /// Inode number, as in `/proc/PID/fd`.
    #[inline(always)]
    pub(crate) fn inode(&self) -> Option<u64> {
        probe(self.inode, offset(&LAYOUT.inode_number))
    }

    /// Connections in its accept queue.
    #[inline(always)]
    pub(crate) fn queued(&self) -> Option<u32> {
        probe(self.sk, offset(&LAYOUT.sock_ack_backlog))
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub(crate) fn port(&self) -> Option<u16> {
        probe(self.sk, offset(&LAYOUT.sock_port))
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(&self) -> Option<u32> {
        let net: *const u8 = probe(self.sk, offset(&LAYOUT.sock_net))?;
        probe(net, offset(&LAYOUT.net_inum))
    }
}
