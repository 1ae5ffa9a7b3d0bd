//! Deferred tasks in flight, and their metrics by kind.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    macros::map,
    maps::{HashMap, RingBuf},
};
use observer_common::{
    deferred::{CLASSES as MOST_CLASSES, Class, ClassKey, Link, UNITS as MOST, Unit, UnitKey, Work},
    loss::Loss,
    origin::Origin,
};

use super::work;
use crate::emit::{add, lost, record};

/// Deferred work in flight.
#[map]
pub(crate) static UNITS: HashMap<UnitKey, Unit> = HashMap::with_max_entries(MOST, 0);

/// Figures by kind of work. For each process the loader makes an entry for those that find no room.
#[map]
static CLASSES: HashMap<ClassKey, Class> = HashMap::with_max_entries(MOST_CLASSES, 0);

/// Deferred work that is over, of requests.
#[map]
static LINKS: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);

/// Kinds of work that were met for the first time. What they are called is to be found out at once: what tells may be
/// elsewhere soon. Where one finds no room here it is asked for later.
#[map]
static KINDS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// What new entries start from: too large for the stack.
static NEW: Class = Class::EMPTY;

pub(crate) static NEW_UNIT: Unit = Unit::EMPTY;

/// The piece that puts off another one for this origin, if it is due to the same request; 0 if it serves a connection,
/// whose requests come and go.
#[inline(always)]
pub(crate) fn parent(current: &Work, origin: &Origin) -> u64 {
    match UNITS.get_ptr(current.key) {
        // SAFETY: a live map value; what is read never changes.
        Some(unit) if unsafe { (*unit).id == current.unit && (*unit).origin.request == origin.request } => {
            current.unit
        }
        _ => 0,
    }
}

/// The current thread works for nobody from here on: its slice has ended, or the runtime says so.
#[inline(always)]
pub(crate) fn turn_from(tid: u32, now: u64) {
    let current = work::current(tid);
    if current.unit != 0
        && let Some(unit) = UNITS.get_ptr_mut(current.key)
    {
        // SAFETY: a live map value; only this thread works on it.
        unsafe {
            if (*unit).id == current.unit {
                (*unit).left_ns = now;
            }
        }
    }
    work::turn_to(tid, &Work::NONE, now);
    end_if_once(&current.key, now);
}

/// Ends work that nothing else ends.
#[inline(always)]
pub(crate) fn end_if_once(key: &UnitKey, now: u64) {
    if let Some(unit) = UNITS.get_ptr_mut(*key) {
        // SAFETY: a live map value; only this thread works on it.
        let is_over = unsafe { (*unit).once != 0 && (*unit).started_ns != 0 };
        if is_over {
            end(unit, key, now);
        }
    }
}

/// A piece of work is over.
#[inline(always)]
pub(crate) fn end(unit: *mut Unit, key: &UnitKey, now: u64) {
    // SAFETY: a live map value, that nobody works on any more; figures are counted in atomically.
    unsafe {
        if (*unit).class.naming == ClassKey::SAME_WORK {
            let _present = UNITS.remove(key);
            return;
        }
        let has_started = (*unit).started_ns != 0;
        if let Some(class) = figures(&(*unit).class) {
            if has_started {
                add(&raw mut (*class).finished, 1);
                record(&raw mut (*class).run, (*unit).left_ns.saturating_sub((*unit).started_ns));
            } else {
                add(&raw mut (*class).orphaned, 1);
                add(&raw mut (*class).pending, u64::MAX);
                if (*unit).class.naming == 0 {
                    add(&raw mut (*class).enqueued, 1);
                }
            }
        }
        if (*unit).origin.request != 0 {
            if let Some(mut entry) = LINKS.reserve::<Link>(0) {
                let link = entry.as_mut_ptr();
                (*link).id = (*unit).id;
                (*link).parent = (*unit).parent;
                (*link).request = (*unit).origin.request;
                (*link).class = (*unit).class;
                (*link).queued_ns = (*unit).queued_ns;
                (*link).started_ns = (*unit).started_ns;
                (*link).ended_ns = if has_started { (*unit).left_ns } else { now };
                (*link).context = (*unit).context;
                (*link).request_id = (*unit).request_id;
                entry.submit(u64::from(BPF_RB_NO_WAKEUP));
            } else {
                lost(Loss::LinksFull);
            }
        }
    }
    let _present = UNITS.remove(key);
}

/// Figures of a class, made if there are none; those of all others if there is no room.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn figures(key: &ClassKey) -> Option<*mut Class> {
    if let Some(class) = CLASSES.get_ptr_mut(*key) {
        return Some(class);
    }
    if CLASSES.insert(*key, &NEW, u64::from(BPF_NOEXIST)).is_ok() {
        let _no_room = KINDS.output::<ClassKey>(key, u64::from(BPF_RB_FORCE_WAKEUP));
    }
    CLASSES.get_ptr_mut(*key).or_else(|| {
        lost(Loss::ClassesFull);
        CLASSES.get_ptr_mut(ClassKey { value: 0, naming: ClassKey::OTHERS, ..*key })
    })
}
