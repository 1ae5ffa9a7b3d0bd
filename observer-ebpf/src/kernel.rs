//! The only file that knows fields of kernel structures. Their offsets come from the running kernel (see
//! `observer_common::layout`); the verifier sees them as constants, because the global is frozen when it looks.
//!
//! Two ways to read: arguments of BTF tracepoints are typed pointers, loaded directly and checked by the
//! verifier; everything reached from a plain tracepoint goes through `bpf_probe_read_kernel`.

use core::{
    ffi::c_void,
    ptr::{null, read_volatile},
};

use aya_ebpf::{
    EbpfContext as _,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_kernel_buf,
        bpf_probe_read_user,
    },
    programs::{BtfTracePointContext, ProbeContext, TracePointContext},
};
use observer_common::{
    block::Block,
    layout::{ABSENT, KernelLayout},
    listener::NAME,
    ring::{RingKey, RingShape},
};

/// Filled in by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static LAYOUT: KernelLayout = KernelLayout::ZERO;

const TCP: u16 = 6;
const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCK_STREAM: u16 = 1;
const SOCK_SEQPACKET: u16 = 5;
const CLOSED: u8 = 7;
const LISTENING: u8 = 10;
/// `__TASK_STOPPED` and `__TASK_TRACED`.
const STOPPED: u64 = 4 | 8;
/// `S_IFMT`, `S_IFSOCK`, `S_IFREG` and `S_IFBLK`.
const FILE_KINDS: u16 = 0o170_000;
const SOCKET_FILE: u16 = 0o140_000;
const REGULAR_FILE: u16 = 0o100_000;
const BLOCK_DEVICE: u16 = 0o060_000;
/// An accept, among the operations of io_uring.
const RING_ACCEPT: u8 = 13;
/// The request's descriptor is a place in a table of the ring's own.
const RING_FIXED_FILE: u32 = 1;
/// More completions of the same request will follow.
const RING_MORE: u32 = 2;

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
    if offset(&LAYOUT.exit_ret) == USUAL_PLACE {
        return Some(usual_word(ctx, 0).cast_signed());
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.exit_ret)) }.ok()
}

/// Where what a system call's tracepoint passes begins, in bytes, but for kernels that put more in front. A word there is
/// read directly, which is all that the verifier lets pass: an offset that it is told of is no constant to the compiler.
const USUAL_PLACE: usize = 16;

#[inline(always)]
fn usual_word(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: inside the program's own context, as whoever calls this has made sure.
    unsafe { ctx.as_ptr().cast::<u64>().add(USUAL_PLACE / 8 + n).read_volatile() }
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

/// Why `sched_switch` takes a thread off its CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Off {
    /// It would go on if it could.
    Preempted,
    /// It waits for something.
    Blocked,
    /// Somebody has stopped it, wherever it was.
    Stopped,
}

#[inline(always)]
pub(crate) fn off(ctx: &BtfTracePointContext) -> Off {
    let preempted: u8 = ctx.arg(0);
    if preempted != 0 {
        return Off::Preempted;
    }
    let state = if offset(&LAYOUT.switch_has_state) != 0 {
        // A wake-up may already have changed the field; the argument is what the scheduler decided on.
        let state: u32 = ctx.arg(3);
        u64::from(state)
    } else {
        let previous: *const u8 = ctx.arg(1);
        // SAFETY: typed pointer, offset of this field.
        unsafe { load(previous, offset(&LAYOUT.task_state)) }
    };
    match state {
        0 => Off::Preempted,
        state if state & STOPPED != 0 => Off::Stopped,
        _ => Off::Blocked,
    }
}

/// A system call in progress, by the registers that the kernel keeps of its caller.
pub(crate) struct CallInProgress(*const u8);

impl CallInProgress {
    /// Of the current thread, whose `struct task_struct` a BTF tracepoint was handed as argument `n`. `place` is where
    /// on every kernel stack the registers are.
    #[inline(always)]
    pub(crate) fn of_current(ctx: &BtfTracePointContext, n: usize, place: u32) -> Self {
        let task: *const u8 = ctx.arg(n);
        // SAFETY: typed pointer, offset of this field.
        let stack: *const u8 = unsafe { load(task, offset(&LAYOUT.task_stack)) };
        Self(stack.wrapping_add(place as usize))
    }

    /// Of the current thread, where no program is handed its `struct task_struct`.
    #[inline(always)]
    pub(crate) fn current(place: u32) -> Option<Self> {
        // SAFETY: has no preconditions.
        let task = unsafe { bpf_get_current_task() } as *const u8;
        let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
        Some(Self(stack.wrapping_add(place as usize)))
    }

    /// Its number; `None` outside of any call, that is in the handling of a fault.
    #[inline(always)]
    pub(crate) fn number(&self) -> Option<u32> {
        u32::try_from(self.word(&LAYOUT.registers_call)?.cast_signed()).ok()
    }

    #[inline(always)]
    pub(crate) fn first(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_first)
    }

    #[inline(always)]
    pub(crate) fn second(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_second)
    }

    #[inline(always)]
    pub(crate) fn third(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_third)
    }

    /// The caller's frame pointer.
    #[inline(always)]
    pub(crate) fn frame_pointer(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_frame)
    }

    #[inline(always)]
    fn word(&self, field: &'static u32) -> Option<u64> {
        // What this kernel does not have is past the end of all stacks, and cannot be read.
        if offset(field) == ABSENT as usize { None } else { probe(self.0, offset(field)) }
    }
}

/// Smallest kernel stack there is; others are a power of two times as large. In bytes.
const STACK_MIN: usize = 8192;
/// How many sizes of stacks are tried.
const STACK_SIZES: usize = 4;
/// How far from the end of a stack a caller's registers may begin, in words.
const REGISTERS_WORDS: usize = 64;

/// Where on its kernel stack the registers of the current thread are, which is inside a system call with this number
/// and first argument; 0 if they are not found.
#[inline(always)]
pub(crate) fn registers_place(number: u64, first: u64) -> Option<u32> {
    // SAFETY: has no preconditions.
    let task = unsafe { bpf_get_current_task() } as *const u8;
    let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
    for n in 0..STACK_SIZES * REGISTERS_WORDS {
        let place = (STACK_MIN << (n / REGISTERS_WORDS)) - 8 * (1 + n % REGISTERS_WORDS);
        let call = CallInProgress(stack.wrapping_add(place));
        if call.word(&LAYOUT.registers_call) == Some(number) && call.first() == Some(first) {
            return u32::try_from(place).ok();
        }
    }
    None
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

/// The first argument of `accept`, `accept4`, `connect` or `listen`, in its entry tracepoint.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half of an `int` argument is anything")]
pub(crate) fn fd_argument(ctx: &TracePointContext) -> Option<u32> {
    arguments(ctx).map(|[fd]| fd as u32)
}

/// The first `N` arguments of a system call, in its entry tracepoint.
#[inline(always)]
pub(crate) fn arguments<const N: usize>(ctx: &TracePointContext) -> Option<[u64; N]> {
    if offset(&LAYOUT.enter_arguments) == USUAL_PLACE {
        return Some(core::array::from_fn(|n| usual_word(ctx, n)));
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.enter_arguments)) }.ok()
}

/// Address of the instruction that a uprobe stands at, in the process.
#[inline(always)]
pub(crate) fn instruction(ctx: &ProbeContext) -> u64 {
    // SAFETY: the registers are the program's own context.
    unsafe { (*ctx.regs).rip }
}

/// Reads one register of the context. Each read is an instruction of its own: the compiler would fold the reads into
/// one at a computed place, which the verifier does not let pass.
macro_rules! read {
    ($ctx:ident, $field:ident) => {{
        #[cfg(target_arch = "bpf")]
        {
            let value: u64;
            // SAFETY: a field of the program's own context.
            unsafe {
                core::arch::asm!(
                    "{} = *(u64 *)({} + {})",
                    out(reg) value,
                    in(reg) $ctx.regs,
                    const core::mem::offset_of!(aya_ebpf::bindings::pt_regs, $field),
                    options(nostack, readonly)
                );
            }
            value
        }
        // Where this is only linted, never run.
        #[cfg(not(target_arch = "bpf"))]
        // SAFETY: as above.
        unsafe {
            (*$ctx.regs).$field
        }
    }};
}

/// A register of the thread that has come to a uprobe, by its number in `observer_common::deferred`.
#[inline(always)]
pub(crate) fn register(ctx: &ProbeContext, number: u64) -> u64 {
    match number {
        0 => read!(ctx, rdi),
        1 => read!(ctx, rsi),
        2 => read!(ctx, rdx),
        3 => read!(ctx, rcx),
        4 => read!(ctx, r8),
        5 => read!(ctx, r9),
        6 => read!(ctx, rax),
        7 => read!(ctx, rbx),
        8 => read!(ctx, rbp),
        9 => read!(ctx, rsp),
        10 => read!(ctx, r10),
        11 => read!(ctx, r11),
        12 => read!(ctx, r12),
        13 => read!(ctx, r13),
        14 => read!(ctx, r14),
        _ => read!(ctx, r15),
    }
}

/// Where the current thread has its variables; `None` where the kernel does not say.
#[inline(always)]
pub(crate) fn thread_pointer() -> Option<u64> {
    let field = offset(&LAYOUT.task_thread_pointer);
    if field == ABSENT as usize {
        return None;
    }
    // SAFETY: has no preconditions.
    let task = unsafe { bpf_get_current_task() } as *const u8;
    probe(task, field)
}

/// Reads what an argument of a system call points to in the caller's memory; `None` if it is not there now.
#[inline(always)]
pub(crate) fn pointed<T>(argument: u64) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_user(argument as *const T) }.ok()
}

/// The task and the file that an iteration over open files has come to; `None` at its end.
#[inline(always)]
pub(crate) fn iterated(ctx: *mut c_void) -> Option<(u32, OpenFile)> {
    // The verifier lets contexts be loaded from at fixed places alone; the helper does not mind.
    let task: *const u8 = probe(ctx.cast(), offset(&LAYOUT.iter_task))?;
    let file: *const u8 = probe(ctx.cast(), offset(&LAYOUT.iter_file))?;
    if task.is_null() || file.is_null() {
        return None;
    }
    Some((probe(task, offset(&LAYOUT.task_tgid))?, OpenFile(file)))
}

/// A file that some process has open.
#[derive(Clone, Copy)]
pub(crate) struct OpenFile(*const u8);

impl OpenFile {
    /// What descriptor `fd` of the current process stands for.
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
        if file.is_null() { None } else { Some(Self(file)) }
    }

    /// Inode number, as in `/proc/PID/fd`.
    #[inline(always)]
    pub(crate) fn inode(self) -> Option<u64> {
        probe(probe(self.0, offset(&LAYOUT.file_inode))?, offset(&LAYOUT.inode_number))
    }

    /// Whether it is no file of any file system, but an `eventfd`, a `timerfd` or the like.
    #[inline(always)]
    pub(crate) fn is_anonymous(self) -> Option<bool> {
        let inode = probe(self.0, offset(&LAYOUT.file_inode))?;
        Some(probe::<u16>(inode, offset(&LAYOUT.inode_mode))? & FILE_KINDS == 0)
    }

    /// What a thread waits for that is blocked on it.
    #[inline(always)]
    pub(crate) fn block(self) -> Option<Block> {
        let inode = probe(self.0, offset(&LAYOUT.file_inode))?;
        Some(match probe::<u16>(inode, offset(&LAYOUT.inode_mode))? & FILE_KINDS {
            SOCKET_FILE => Block::Network,
            REGULAR_FILE | BLOCK_DEVICE => Block::Disk,
            _ => Block::Other,
        })
    }

    /// The socket behind it, where the caller knows that it is one.
    #[inline(always)]
    pub(crate) fn known_socket(self) -> Option<Socket> {
        let socket: *const u8 = probe(self.0, offset(&LAYOUT.file_private_data))?;
        Some(Socket(probe(socket, offset(&LAYOUT.socket_sk))?))
    }

    /// The unix stream socket behind it, where the caller knows that it is a socket of any kind.
    #[inline(always)]
    pub(crate) fn unix_socket(self) -> Option<Socket> {
        let socket = self.known_socket()?;
        if socket.is_unix() { Socket::checked(socket.0) } else { None }
    }

    /// The stream socket behind it; `None` if it is anything else.
    #[inline(always)]
    pub(crate) fn socket(self) -> Option<Socket> {
        let socket: *const u8 = probe(self.0, offset(&LAYOUT.file_private_data))?;
        // Any file may have private data; only a socket points back at its file.
        if probe::<*const u8>(socket, offset(&LAYOUT.socket_file))? != self.0 {
            return None;
        }
        Socket::checked(probe(socket, offset(&LAYOUT.socket_sk))?)
    }
}

/// A `struct sock` of TCP or of a unix stream.
#[derive(Clone, Copy)]
pub(crate) struct Socket(*const u8);

impl Socket {
    #[inline(always)]
    fn checked(sk: *const u8) -> Option<Self> {
        let family: u16 = probe(sk, offset(&LAYOUT.sock_family))?;
        let protocol: u16 = probe(sk, offset(&LAYOUT.sock_protocol))?;
        let kind: u16 = probe(sk, offset(&LAYOUT.sock_type))?;
        let is_tcp = (family == AF_INET || family == AF_INET6) && protocol == TCP;
        let is_stream = family == AF_UNIX && (kind == SOCK_STREAM || kind == SOCK_SEQPACKET);
        if is_tcp || is_stream { Some(Self(sk)) } else { None }
    }

    /// The one at this address, which the caller knows to be open.
    #[inline(always)]
    pub(crate) fn known(address: u64) -> Self {
        Self(address as *const u8)
    }

    /// The one that was at this address, if it still is: sockets are freed while nobody looks.
    #[inline(always)]
    pub(crate) fn still_at(address: u64, inode: u64) -> Option<Self> {
        let sk = address as *const u8;
        let socket: *const u8 = probe(sk, offset(&LAYOUT.sock_socket))?;
        let file = OpenFile(probe(socket, offset(&LAYOUT.socket_file))?);
        if file.inode()? == inode { Self::checked(sk) } else { None }
    }

    /// Its address, which identifies it while it lives, as [`Sock::address`] does.
    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn listens(self) -> bool {
        probe::<u8>(self.0, offset(&LAYOUT.sock_state)) == Some(LISTENING)
    }

    /// Whether its connection is over; one that was reset while it waited still waits to be accepted.
    #[inline(always)]
    pub(crate) fn is_closed(self) -> bool {
        probe::<u8>(self.0, offset(&LAYOUT.sock_state)) == Some(CLOSED)
    }

    #[inline(always)]
    pub(crate) fn family(self) -> Option<u16> {
        probe(self.0, offset(&LAYOUT.sock_family))
    }

    #[inline(always)]
    pub(crate) fn is_unix(self) -> bool {
        self.family() == Some(AF_UNIX)
    }

    /// The other end of a unix connection; while a connection waits to be accepted, its client's socket.
    #[inline(always)]
    pub(crate) fn peer(self) -> Option<Self> {
        let peer: *const u8 = probe(self.0, offset(&LAYOUT.unix_peer))?;
        if peer.is_null() { None } else { Some(Self(peer)) }
    }

    /// Identifies the name of a unix socket: a listener and the connections made to it have it in common.
    #[inline(always)]
    pub(crate) fn unix_name(self) -> Option<u64> {
        probe(self.0, offset(&LAYOUT.unix_address))
    }

    /// Local port, host byte order.
    #[inline(always)]
    pub(crate) fn port(self) -> Option<u16> {
        probe(self.0, offset(&LAYOUT.sock_port))
    }

    /// Inode number of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(self) -> Option<u32> {
        probe(probe(self.0, offset(&LAYOUT.sock_net))?, offset(&LAYOUT.net_inum))
    }

    /// Writes the local address, or a unix socket's path, and returns how many bytes of that are meant.
    #[inline(always)]
    pub(crate) fn name(self, to: &mut [u8; NAME]) -> Option<u16> {
        match self.family()? {
            AF_INET => {
                let address: [u8; 4] = probe(self.0, offset(&LAYOUT.sock_address4))?;
                to[..4].copy_from_slice(&address);
                Some(4)
            }
            AF_INET6 => {
                let address: [u8; 16] = probe(self.0, offset(&LAYOUT.sock_address6))?;
                to[..16].copy_from_slice(&address);
                Some(16)
            }
            _ => {
                let address: *const u8 = probe(self.0, offset(&LAYOUT.unix_address))?;
                let length: i32 = probe(address, offset(&LAYOUT.address_length))?;
                let name = address.wrapping_add(offset(&LAYOUT.address_name)).wrapping_add(size_of::<u16>());
                // SAFETY: the helper checks the address.
                unsafe { bpf_probe_read_kernel_buf(name, to) }.ok()?;
                u16::try_from(length).ok()?.checked_sub(2)
            }
        }
    }

    /// Connections in its accept queue.
    #[inline(always)]
    pub(crate) fn queued(self) -> Option<u32> {
        if self.family()? == AF_UNIX {
            probe(self.0, offset(&LAYOUT.sock_received))
        } else {
            probe(self.0, offset(&LAYOUT.sock_ack_backlog))
        }
    }

    /// Most connections the kernel lets wait.
    #[inline(always)]
    pub(crate) fn limit(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.sock_max_ack_backlog))
    }

    /// Connections dropped by the kernel since the socket was made.
    #[inline(always)]
    pub(crate) fn drops(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.sock_drops))
    }

    /// Handshakes that have begun and are not done. TCP alone has any.
    #[inline(always)]
    pub(crate) fn half_open(self) -> Option<u32> {
        probe(self.0, offset(&LAYOUT.accept_half_open))
    }

    /// The first in a unix socket's accept queue, which is the one that has waited longest.
    #[inline(always)]
    pub(crate) fn first_unix_waiting(self) -> Option<Self> {
        let buffer: *const u8 = probe(self.0, offset(&LAYOUT.sock_received_first))?;
        // The end of the list is its head, inside the listener itself.
        if buffer == self.0.wrapping_add(offset(&LAYOUT.sock_received_first)) {
            return None;
        }
        Some(Self(probe(buffer, offset(&LAYOUT.buffer_sk))?))
    }

    /// The first in the accept queue, which is the one that has waited longest. TCP alone.
    #[inline(always)]
    pub(crate) fn first_waiting(self) -> Waiting {
        Waiting(probe(self.0, offset(&LAYOUT.accept_head)).unwrap_or(null()))
    }
}

/// A place in an accept queue.
#[derive(Clone, Copy)]
pub(crate) struct Waiting(*const u8);

impl Waiting {
    /// The one at this address, which the caller has from the kernel.
    #[inline(always)]
    pub(crate) fn known(address: u64) -> Self {
        Self(address as *const u8)
    }

    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    /// Whether nobody waits here.
    #[inline(always)]
    pub(crate) fn is_end(self) -> bool {
        self.0.is_null()
    }

    /// The connection that waits here, and the place behind it.
    #[inline(always)]
    pub(crate) fn take(self) -> Option<(Socket, Self)> {
        if self.0.is_null() {
            return None;
        }
        // What cannot be read reads as null, without a branch: the verifier counts them.
        let connection = Socket(probe(self.0, offset(&LAYOUT.request_sk)).unwrap_or(null()));
        Some((connection, Self(probe(self.0, offset(&LAYOUT.request_next)).unwrap_or(null()))))
    }
}

/// What the tracepoints of io_uring pass here.
#[inline(always)]
fn ring_shape_is(shape: RingShape) -> bool {
    offset(&LAYOUT.ring_shape) == shape as usize
}

/// A `struct io_kiocb` for an accept, handed to a tracepoint.
pub(crate) struct RingAcceptRequest(*const u8);

impl RingAcceptRequest {
    /// What has just been submitted; `None` unless it is an accept.
    #[inline(always)]
    pub(crate) fn submitted(ctx: &BtfTracePointContext) -> Option<Self> {
        if ring_shape_is(RingShape::Loose) {
            let operation: u8 = ctx.arg(2);
            if operation == RING_ACCEPT { Some(Self(ctx.arg(1))) } else { None }
        } else {
            Self::typed(ctx)
        }
    }

    /// The first argument, where that is the request.
    #[inline(always)]
    fn typed(ctx: &BtfTracePointContext) -> Option<Self> {
        let request: *const u8 = ctx.arg(0);
        // SAFETY: typed pointer, offset of this field.
        let operation: u8 = unsafe { load(request, offset(&LAYOUT.ring_opcode)) };
        if operation == RING_ACCEPT { Some(Self(request)) } else { None }
    }

    /// The one at this address, which the caller knows to be in flight.
    #[inline(always)]
    pub(crate) fn known(address: u64) -> Self {
        Self(address as *const u8)
    }

    #[inline(always)]
    pub(crate) fn address(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> Option<RingKey> {
        Some(RingKey {
            ring: probe(self.0, offset(&LAYOUT.ring_context))?,
            user_data: probe(self.0, offset(&LAYOUT.ring_user_data))?,
        })
    }

    /// The file to accept from, once the kernel has looked it up.
    #[inline(always)]
    pub(crate) fn file(&self) -> Option<OpenFile> {
        let file: *const u8 = probe(self.0, offset(&LAYOUT.ring_file))?;
        if file.is_null() { None } else { Some(OpenFile(file)) }
    }

    /// The same at submission, when newer kernels have not looked it up yet. `None` as well for places in the ring's
    /// own table.
    #[inline(always)]
    pub(crate) fn file_at_submission(&self) -> Option<OpenFile> {
        if offset(&LAYOUT.ring_fd) == ABSENT as usize {
            return self.file();
        }
        if probe::<u32>(self.0, offset(&LAYOUT.ring_flags))? & RING_FIXED_FILE != 0 {
            return None;
        }
        OpenFile::of(probe(self.0, offset(&LAYOUT.ring_fd))?)
    }

    /// Whether the connection goes to a table of the ring's own, instead of becoming a descriptor.
    #[inline(always)]
    pub(crate) fn is_direct(&self) -> bool {
        probe::<u32>(self.0, offset(&LAYOUT.ring_slot)).is_some_and(|slot| slot != 0)
    }
}

/// An accept in flight whose wait for a connection has ended.
pub(crate) struct RingWakeup {
    pub(crate) key: RingKey,
    /// The file it accepts from; `None` where the tracepoint does not let one know.
    pub(crate) file: Option<OpenFile>,
    pub(crate) is_direct: bool,
}

impl RingWakeup {
    /// `None` unless it is an accept.
    #[inline(always)]
    pub(crate) fn of(ctx: &BtfTracePointContext) -> Option<Self> {
        if ring_shape_is(RingShape::Loose) {
            let operation: u8 = ctx.arg(1);
            if operation != RING_ACCEPT {
                return None;
            }
            Some(Self {
                key: RingKey { ring: ctx.arg(0), user_data: ctx.arg(2) },
                file: None,
                is_direct: false,
            })
        } else {
            let request = RingAcceptRequest::typed(ctx)?;
            Some(Self { key: request.key()?, file: request.file(), is_direct: request.is_direct() })
        }
    }
}

/// An operation of io_uring that has come to a result.
pub(crate) struct RingCompletion {
    pub(crate) key: RingKey,
    /// Of an accept, the new descriptor; negative if it failed.
    pub(crate) result: i32,
    /// Whether the request is over.
    pub(crate) is_last: bool,
}

impl RingCompletion {
    #[inline(always)]
    pub(crate) fn of(ctx: &BtfTracePointContext) -> Self {
        let ring: u64 = ctx.arg(0);
        if ring_shape_is(RingShape::Loose) {
            // No accept has more than one result there.
            Self { key: RingKey { ring, user_data: ctx.arg(1) }, result: ctx.arg(2), is_last: true }
        } else if ring_shape_is(RingShape::Request) {
            let flags: u32 = ctx.arg(4);
            Self {
                key: RingKey { ring, user_data: ctx.arg(2) },
                result: ctx.arg(3),
                is_last: flags & RING_MORE == 0,
            }
        } else {
            let entry: *const u8 = ctx.arg(2);
            // SAFETY: typed pointer, offsets of its fields.
            unsafe {
                let flags: u32 = load(entry, offset(&LAYOUT.completion_flags));
                Self {
                    key: RingKey { ring, user_data: load(entry, offset(&LAYOUT.completion_user_data)) },
                    result: load(entry, offset(&LAYOUT.completion_result)),
                    is_last: flags & RING_MORE == 0,
                }
            }
        }
    }
}
