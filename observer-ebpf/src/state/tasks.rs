//! Deferred tasks in flight, and their metrics by kind.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    macros::map,
    maps::{HashMap, RingBuf},
};
use observer_common::{
    deferred::{CLASSES as MOST_CLASSES, Class, ClassKey, DeferredTask, Link, TASKS as MOST, TaskKey, Work},
    loss::Loss,
    origin::Origin,
};

use super::work;
use crate::emit::{add, lost, record};

/// Deferred work in flight.
#[map]
pub(crate) static TASKS: HashMap<TaskKey, DeferredTask> = HashMap::with_max_entries(MOST, 0);

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

pub(crate) static NEW_TASK: DeferredTask = DeferredTask::EMPTY;

/// The piece that puts off another one for this origin, if it is due to the same request; 0 if it serves a connection,
/// whose requests come and go.
#[inline(always)]
pub(crate) fn parent(current: &Work, origin: &Origin) -> u64 {
    match TASKS.get_ptr(current.key) {
        // SAFETY: a live map value; what is read never changes.
        Some(task) if unsafe { (*task).id == current.task && (*task).origin.request == origin.request } => {
            current.task
        }
        _ => 0,
    }
}

/// The current thread works for nobody from here on: its slice has ended, or the runtime says so.
#[inline(always)]
pub(crate) fn turn_from(tid: u32, now: u64) {
    let current = work::current(tid);
    if current.task != 0
        && let Some(task) = TASKS.get_ptr_mut(current.key)
    {
        // SAFETY: a live map value; only this thread works on it.
        unsafe {
            if (*task).id == current.task {
                (*task).left_ns = now;
            }
        }
    }
    work::turn_to(tid, &Work::NONE, now);
    end_if_once(&current.key, now);
}

/// Ends work that nothing else ends.
#[inline(always)]
pub(crate) fn end_if_once(key: &TaskKey, now: u64) {
    if let Some(task) = TASKS.get_ptr_mut(*key) {
        // SAFETY: a live map value; only this thread works on it.
        let is_over = unsafe { (*task).once != 0 && (*task).started_ns != 0 };
        if is_over {
            end(task, key, now);
        }
    }
}

/// A piece of work is over.
#[inline(always)]
pub(crate) fn end(task: *mut DeferredTask, key: &TaskKey, now: u64) {
    // SAFETY: a live map value, that nobody works on any more; figures are counted in atomically.
    unsafe {
        if (*task).class.naming == ClassKey::SAME_WORK {
            let _present = TASKS.remove(key);
            return;
        }
        let has_started = (*task).started_ns != 0;
        if let Some(class) = figures(&(*task).class) {
            if has_started {
                add(&raw mut (*class).finished, 1);
                record(&raw mut (*class).run, (*task).left_ns.saturating_sub((*task).started_ns));
            } else {
                add(&raw mut (*class).orphaned, 1);
                add(&raw mut (*class).pending, u64::MAX);
                if (*task).class.naming == 0 {
                    add(&raw mut (*class).enqueued, 1);
                }
            }
        }
        if (*task).origin.request != 0 {
            if let Some(mut entry) = LINKS.reserve::<Link>(0) {
                let link = entry.as_mut_ptr();
                (*link).id = (*task).id;
                (*link).parent = (*task).parent;
                (*link).request = (*task).origin.request;
                (*link).class = (*task).class;
                (*link).queued_ns = (*task).queued_ns;
                (*link).started_ns = (*task).started_ns;
                (*link).ended_ns = if has_started { (*task).left_ns } else { now };
                (*link).context = (*task).context;
                (*link).request_id = (*task).request_id;
                entry.submit(u64::from(BPF_RB_NO_WAKEUP));
            } else {
                lost(Loss::LinksFull);
            }
        }
    }
    let _present = TASKS.remove(key);
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
