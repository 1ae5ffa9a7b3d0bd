//! Accepts through io_uring, for the different argument lists of the kernels' tracepoints.

use aya_ebpf::programs::BtfTracePointContext;
use observer_common::{
    layout::ABSENT,
    ring::{RingKey, RingShape},
};

use super::{
    access::{LAYOUT, load, offset, probe},
    file::OpenFile,
};

/// `IORING_OP_ACCEPT`.
const RING_ACCEPT: u8 = 13;
/// `REQ_F_FIXED_FILE`: the request's descriptor is an index into the ring's table of registered files.
const RING_FIXED_FILE: u32 = 1;
/// `IORING_CQE_F_MORE`: more completions of the same request will follow.
const RING_MORE: u32 = 2;

/// Whether the kernel's io_uring tracepoints have this argument list.
#[inline(always)]
fn ring_shape_is(shape: RingShape) -> bool {
    offset(&LAYOUT.ring_shape) == shape as usize
}

/// A `struct io_kiocb` of an accept, passed to a tracepoint.
pub(crate) struct RingAcceptRequest(*const u8);

impl RingAcceptRequest {
    /// The request that has just been submitted; `None` unless it is an accept.
    #[inline(always)]
    pub(crate) fn submitted(ctx: &BtfTracePointContext) -> Option<Self> {
        if ring_shape_is(RingShape::Loose) {
            let operation: u8 = ctx.arg(2);
            if operation == RING_ACCEPT { Some(Self(ctx.arg(1))) } else { None }
        } else {
            Self::typed(ctx)
        }
    }

    /// The first argument, on kernels where that is the request; `None` unless it is an accept.
    #[inline(always)]
    fn typed(ctx: &BtfTracePointContext) -> Option<Self> {
        let request: *const u8 = ctx.arg(0);
        // SAFETY: typed pointer, offset of this field.
        let operation: u8 = unsafe { load(request, offset(&LAYOUT.ring_opcode)) };
        if operation == RING_ACCEPT { Some(Self(request)) } else { None }
    }

    /// The request at this address, which the caller knows to be in flight.
    #[inline(always)]
    pub(crate) fn at(address: u64) -> Self {
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

    /// The file to accept from at submission, when newer kernels have not looked it up yet. `None` for files registered
    /// in the ring's table as well.
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

    /// Whether the connection becomes a direct descriptor in the ring's table, instead of a descriptor of the process.
    #[inline(always)]
    pub(crate) fn is_direct(&self) -> bool {
        probe::<u32>(self.0, offset(&LAYOUT.ring_slot)).is_some_and(|slot| slot != 0)
    }
}

/// An accept in flight whose wait for a connection has ended.
pub(crate) struct RingWakeup {
    pub(crate) key: RingKey,
    /// The file it accepts from; `None` if the tracepoint does not pass it.
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

/// A completed operation of io_uring.
pub(crate) struct RingCompletion {
    pub(crate) key: RingKey,
    /// New descriptor of an accept; negative if it failed.
    pub(crate) result: i32,
    /// Whether no more completions of the request follow.
    pub(crate) is_last: bool,
}

impl RingCompletion {
    #[inline(always)]
    pub(crate) fn of(ctx: &BtfTracePointContext) -> Self {
        let ring: u64 = ctx.arg(0);
        if ring_shape_is(RingShape::Loose) {
            // These kernels have no accept with more than one result.
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
