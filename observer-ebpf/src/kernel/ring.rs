//! Accepts through io_uring, in the shapes that the tracepoints of different kernels have.

use aya_ebpf::programs::BtfTracePointContext;
use observer_common::{
    layout::ABSENT,
    ring::{RingKey, RingShape},
};

use super::{
    access::{LAYOUT, load, offset, probe},
    file::OpenFile,
};

/// An accept, among the operations of io_uring.
const RING_ACCEPT: u8 = 13;
/// The request's descriptor is a place in a table of the ring's own.
const RING_FIXED_FILE: u32 = 1;
/// More completions of the same request will follow.
const RING_MORE: u32 = 2;

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
