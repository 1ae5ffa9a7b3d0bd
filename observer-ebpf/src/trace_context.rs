//! The trace context that a thread publishes according to OpenTelemetry's OTEP 4947: a thread-local variable points to
//! a record. User space has found the location of that variable.

use observer_common::deferred::{Context, ThreadLocal};

use crate::kernel;

/// Size of an entry in the C library's dynamic thread vector, the table of a thread's TLS blocks, in bytes.
const ENTRY: u64 = 16;

/// Offset in a record of the byte that says whether the record is valid, behind the IDs; in bytes.
const VALID: u64 = 24;

/// The context that the current thread publishes now; `None` if it publishes none.
#[inline(always)]
pub(crate) fn published(pointer: ThreadLocal) -> Option<Context> {
    let thread = kernel::thread_pointer()?;
    let variables = match u64::from(pointer.module()) {
        0 => thread,
        module => {
            let table = kernel::read_user::<u64>(thread.wrapping_add(8))?;
            // The entry before the table holds its length. The table of a thread grows on demand, so it may be too
            // short.
            if kernel::read_user::<u64>(table.wrapping_sub(ENTRY))? < module {
                return None;
            }
            kernel::read_user::<u64>(table.wrapping_add(module * ENTRY))?
        }
    };
    let record = kernel::read_user::<u64>(variables.wrapping_add_signed(pointer.offset().into()))?;
    let context = kernel::read_user::<Context>(record)?;
    let is_valid = kernel::read_user::<u8>(record.wrapping_add(VALID))? == 1;
    if is_valid && context.trace_id[0] | context.trace_id[1] != 0 { Some(context) } else { None }
}
