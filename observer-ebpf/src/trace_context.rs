//! The trace context that a thread publishes as OpenTelemetry's OTEP 4947 has it: a pointer among its variables, to a
//! record. The user side has found out where that pointer is.

use observer_common::deferred::{Context, ThreadLocal};

use crate::kernel;

/// Size of an entry in the table that the C library keeps of a thread's variables, in bytes.
const ENTRY: u64 = 16;

/// Where a record says whether it is valid, behind its ids; in bytes.
const VALID: u64 = 24;

/// What the current thread publishes now; `None` if that is nothing.
#[inline(always)]
pub(crate) fn published(pointer: ThreadLocal) -> Option<Context> {
    let thread = kernel::thread_pointer()?;
    let variables = match u64::from(pointer.module()) {
        0 => thread,
        module => {
            let table = kernel::read_user::<u64>(thread.wrapping_add(8))?;
            // In front of the table is its length: a thread gets a longer one when it needs it.
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
