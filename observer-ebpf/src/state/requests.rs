//! Requests on connections that targets have accepted, and which request a thread works for.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_RB_NO_WAKEUP},
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_probe_read_user_buf},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
    programs::TracePointContext,
};
use observer_common::{
    deferred::Work,
    loss::Loss,
    origin::{Answer, Connection, Descriptor, HEAD, HEADS_PER_CPU, Origin, Request},
};

use super::{id_filter, system_call, work};
use crate::{
    emit::count_loss,
    kernel::{self, CallInProgress, OpenFile},
};

/// Maximum number of bytes of a request that are copied at once.
const MAX_COPY: u32 = 1024;

const _: () = assert!(MAX_COPY as usize == HEAD);

/// Processes whose deferred tasks are followed, by ID; written by the loader.
#[map]
static FOLLOWED: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);

/// Connections that these processes have accepted. An entry stays until its descriptor is reused or its process has
/// exited.
#[map]
pub(crate) static CONNECTIONS: HashMap<Descriptor, Connection> = HashMap::with_max_entries(32_768, 0);

/// The latest requests of each CPU; the loader sets the number of entries.
#[map]
static HEADS: Array<Request> = Array::with_max_entries(HEADS_PER_CPU, 0);

/// Number of entries that each CPU has written.
#[map]
static NEXT_HEAD: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Requests for which a task was enqueued or a slice stalled.
#[map]
static REQUESTS: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);

/// Answers to requests that have already been sent.
#[map]
static ANSWERS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Records the first write after a request as its answer.
///
/// # Safety
/// `connection` points to a live map value: the entry of this descriptor.
#[inline(always)]
pub(crate) unsafe fn record_answer(connection: *mut Connection, fd: u32) {
    // SAFETY: by contract; the request's entry is a live map value as well.
    unsafe {
        if (*connection).is_answered != 0 {
            return;
        }
        let inode = OpenFile::of(fd).and_then(|file| file.inode());
        if inode != Some((*connection).inode) {
            return;
        }
        (*connection).is_answered = 1;
        let request = (*connection).request;
        let answered_ns = bpf_ktime_get_ns();
        if let Some(head) = HEADS.get_ptr_mut((*connection).head)
            && (*head).id == request
        {
            (*head).answered_ns = answered_ns;
        }
        // The flag is read last: a concurrent `emit_request` either sees the answer above, or is seen here.
        let is_emitted = (&raw const (*connection).is_emitted).read_volatile() != 0;
        if is_emitted {
            let answer = Answer { request, answered_ns };
            if ANSWERS.output::<Answer>(&answer, u64::from(BPF_RB_NO_WAKEUP)).is_err() {
                count_loss(Loss::AnswersFull);
            }
        }
    }
}

/// Whether the deferred tasks of a process are followed. Such a process is a target.
#[inline(always)]
pub(crate) fn is_followed(tgid: u32) -> bool {
    id_filter::may_contain_process(tgid) && FOLLOWED.get_ptr(tgid).is_some()
}

/// Records that the current thread has accepted a connection. It works for the connection until a request arrives.
#[inline(always)]
pub(crate) fn record_accept(tgid: u32, tid: u32, fd: u32, file: OpenFile) {
    if is_followed(tgid)
        && let Some(inode) = file.inode()
        && add_connection(tgid, fd, inode)
    {
        let origin = Origin { request: 0, inode, fd, reserved: 0 };
        // SAFETY: has no preconditions.
        let now = unsafe { bpf_ktime_get_ns() };
        work::switch_to(tid, &Work { origin, ..work::current(tid) }, now);
    }
}

/// Adds a connection that a process has open. Returns whether there was space.
#[inline(always)]
fn add_connection(tgid: u32, fd: u32, inode: u64) -> bool {
    let connection = Connection { inode, ..Connection::default() };
    let has_room = CONNECTIONS.insert(Descriptor { tgid, fd }, connection, u64::from(BPF_ANY)).is_ok();
    if !has_room {
        count_loss(Loss::ConnectionsFull);
    }
    has_room
}

/// The connection of an origin, if its descriptor has not been reused.
#[inline(always)]
fn connection_of(tgid: u32, origin: &Origin) -> Option<*mut Connection> {
    let connection = CONNECTIONS.get_ptr_mut(Descriptor { tgid, fd: origin.fd })?;
    // SAFETY: a live map value; the inode number never changes.
    if unsafe { (*connection).inode } == origin.inode { Some(connection) } else { None }
}

/// Resolves an origin when work for it starts: an origin without a request stands for the latest request of its
/// connection.
#[inline(always)]
pub(crate) fn resolve_origin(tgid: u32, origin: &Origin) -> Origin {
    if origin.request == 0
        && origin.inode != 0
        && let Some(connection) = connection_of(tgid, origin)
    {
        // SAFETY: a live map value; each word is read atomically.
        unsafe {
            if (*connection).overlaps == 0 {
                return Origin { request: (*connection).request, ..*origin };
            }
        }
        count_loss(Loss::RequestsOverlap);
    }
    *origin
}

/// The origin of a task that is enqueued now. Sends the request to user space.
#[inline(always)]
pub(crate) fn origin_for_enqueue(tgid: u32, origin: &Origin) -> Origin {
    if origin.request != 0
        && let Some(connection) = connection_of(tgid, origin)
    {
        // SAFETY: a live map value.
        unsafe {
            if (*connection).overlaps != 0 {
                count_loss(Loss::RequestsOverlap);
                return Origin { request: 0, ..*origin };
            }
            emit_request(connection, origin.request);
        }
    }
    *origin
}

/// Sends the request of a stall to user space.
#[inline(always)]
pub(crate) fn emit_stalled_request(tgid: u32, origin: &Origin) {
    if origin.request != 0
        && let Some(connection) = connection_of(tgid, origin)
    {
        // SAFETY: a live map value.
        unsafe { emit_request(connection, origin.request) };
    }
}

/// Sends a request to user space, once.
///
/// # Safety
/// `connection` points to a live map value.
#[inline(always)]
unsafe fn emit_request(connection: *mut Connection, request: u64) {
    // SAFETY: by contract; the request's entry is a live map value as well.
    unsafe {
        if (*connection).request != request || (*connection).is_emitted != 0 {
            return;
        }
        (*connection).is_emitted = 1;
        let is_sent = match HEADS.get_ptr((*connection).head) {
            // Otherwise a newer request has overwritten it.
            Some(head) if (*head).id == request => {
                REQUESTS.output::<Request>(&*head, u64::from(BPF_RB_NO_WAKEUP)).is_ok()
            }
            _ => false,
        };
        if !is_sent {
            count_loss(Loss::RequestsFull);
        }
    }
}

/// A call that has read from a connection.
pub(crate) struct ReadCall {
    pub(crate) tgid: u32,
    pub(crate) tid: u32,
    pub(crate) fd: u32,
    pub(crate) received: u32,
    pub(crate) call: CallInProgress,
    pub(crate) connection: *mut Connection,
}

impl ReadCall {
    /// The call that the current thread returns from; `None` if it has read nothing, or not from a known connection.
    #[inline(always)]
    pub(crate) fn of(ctx: &TracePointContext) -> Option<Self> {
        let (tgid, tid) = kernel::current();
        if !is_followed(tgid) {
            return None;
        }
        let received = u32::try_from(kernel::return_value(ctx)?).ok().filter(|&received| received > 0)?;
        let call = system_call::call_in_progress()?;
        let fd = u32::try_from(call.first()?).ok()?;
        let connection = CONNECTIONS.get_ptr_mut(Descriptor { tgid, fd })?;
        // SAFETY: a live map value; the inode number never changes.
        if OpenFile::of(fd)?.inode()? != unsafe { (*connection).inode } {
            return None;
        }
        Some(Self { tgid, tid, fd, received, call, connection })
    }

    #[inline(always)]
    pub(crate) fn handle_first_part(&self, parts: u64) {
        if let Some([buffer, length]) = kernel::read_user::<[u64; 2]>(parts) {
            self.handle(buffer, length);
        }
    }

    /// Handles received data in a buffer of this length: a new request, or more of one.
    #[inline(always)]
    pub(crate) fn handle(&self, buffer: u64, length: u64) {
        // SAFETY: has no preconditions.
        let now = unsafe { bpf_ktime_get_ns() };
        let is_http = kernel::read_user::<[u8; 8]>(buffer).is_some_and(starts_request);
        // SAFETY: a live map value; only the thread that reads from the connection writes these fields.
        let request = unsafe {
            let connection = self.connection;
            let is_first = (*connection).request == 0;
            let is_more =
                !is_http && !is_first && ((*connection).is_http != 0 || (*connection).is_answered == 0);
            if is_more {
                self.append(buffer, length);
            } else {
                if !is_first && (*connection).is_answered == 0 {
                    (*connection).overlaps = 1;
                }
                (*connection).is_answered = 0;
                (*connection).is_emitted = 0;
                (*connection).is_http |= u32::from(is_http);
                (*connection).request = work::unique_id(self.tid, now);
                self.store(buffer, length, now);
            }
            (*connection).request
        };
        // SAFETY: as above.
        let inode = unsafe { (*self.connection).inode };
        let origin = Origin { request, inode, fd: self.fd, reserved: 0 };
        work::switch_to(self.tid, &Work { origin, ..work::current(self.tid) }, now);
    }

    /// Stores the beginning of the connection's latest request.
    ///
    /// # Safety
    /// `self.connection` points to a live map value.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, buffer: u64, length: u64, now: u64) {
        // SAFETY: by contract; the entry is a live map value of this CPU.
        unsafe {
            let id = (*self.connection).request;
            let Some(next) = NEXT_HEAD.get_ptr_mut(0) else { return };
            let head = bpf_get_smp_processor_id() * HEADS_PER_CPU + *next % HEADS_PER_CPU;
            *next = next.read().wrapping_add(1);
            (*self.connection).head = head;
            let Some(request) = HEADS.get_ptr_mut(head) else { return };
            (*request).id = id;
            (*request).at_ns = now;
            (*request).answered_ns = 0;
            (*request).inode = (*self.connection).inode;
            (*request).tgid = self.tgid;
            (*request).fd = self.fd;
            (*request).received = self.received;
            (*request).kept = self.copy(buffer, length, (&raw mut (*request).bytes).cast(), MAX_COPY);
        }
    }

    /// Appends to the connection's latest request, if its beginning came in small pieces.
    ///
    /// # Safety
    /// `self.connection` points to a live map value.
    #[inline(always)]
    pub(crate) unsafe fn append(&self, buffer: u64, length: u64) {
        // SAFETY: by contract; at most half of the buffer is used, and at most half of it is copied.
        unsafe {
            let Some(request) = HEADS.get_ptr_mut((*self.connection).head) else { return };
            let kept = (&raw const (*request).kept).read_volatile() as usize;
            if (*request).id == (*self.connection).request {
                (*request).received = (*request).received.saturating_add(self.received);
                if kept < HEAD / 2 {
                    let end = (&raw mut (*request).bytes).cast::<u8>().add(kept);
                    (*request).kept += self.copy(buffer, length, end, MAX_COPY / 2);
                }
            }
        }
    }

    /// Copies received data to `to`. Returns the number of bytes copied.
    ///
    /// # Safety
    /// `to` has space for `max` bytes.
    #[inline(always)]
    pub(crate) unsafe fn copy(&self, buffer: u64, length: u64, to: *mut u8, max: u32) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "no more than was received, which has 32 bits")]
        let length = length.min(u64::from(self.received)) as u32;
        // SAFETY: reads a local. The read is volatile so that the verifier sees the bound that the compiler can prove.
        let length = unsafe { core::ptr::read_volatile(&raw const length) };
        let kept = if length < max { length } else { max };
        if kept == 0 {
            return 0;
        }
        // SAFETY: by contract; the helper checks the other address.
        let outcome = unsafe {
            let bytes = core::slice::from_raw_parts_mut(to, kept as usize);
            bpf_probe_read_user_buf(buffer as *const u8, bytes)
        };
        if outcome.is_ok() { kept } else { 0 }
    }
}

/// Whether data starts like an HTTP/1 request: at least three capital letters and a space.
#[inline(always)]
fn starts_request(bytes: [u8; 8]) -> bool {
    for (n, byte) in bytes.into_iter().enumerate() {
        if byte == b' ' {
            return n >= 3;
        }
        if !byte.is_ascii_uppercase() {
            return false;
        }
    }
    false
}
