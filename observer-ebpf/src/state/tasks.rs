//! Deferred tasks in flight, and their metrics by kind.

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    macros::map,
    maps::{HashMap, RingBuf},
};
use observer_common::{
    deferred::{
        CLASSES as MAX_CLASSES, Class, ClassKey, DeferredTask, Link, TASKS as MAX_TASKS, TaskKey, Work,
    },
    loss::Loss,
    origin::Origin,
};

use super::work;
use crate::{
    emit::{add, count_loss, record},
    words,
};

/// Deferred tasks in flight.
#[map]
pub(crate) static TASKS: HashMap<TaskKey, DeferredTask> = HashMap::with_max_entries(MAX_TASKS, 0);

/// Counters by kind of task. For each process the loader makes an entry for kinds that exceed the capacity.
#[map]
static CLASSES: HashMap<ClassKey, Class> = HashMap::with_max_entries(MAX_CLASSES, 0);

/// Links of deferred tasks that have ended.
#[map]
static LINKS: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);

/// Kinds of tasks that are new. User space must find their names at once, because the memory that holds them may soon
/// be reused. If this ring is full, the name is read later.
#[map]
static KINDS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// Initial value of an entry, which is too large for the stack.
static NEW: Class = Class::EMPTY;

pub(crate) static NEW_TASK: DeferredTask = DeferredTask::EMPTY;

/// ID of the current task if that is the parent of a task with this origin, otherwise 0. A parent has the same
/// request. A task that serves a connection, and so many requests, is no parent.
#[inline(always)]
pub(crate) fn parent(current: &Work, origin: &Origin) -> u64 {
    match TASKS.get_ptr(current.key) {
        // SAFETY: a live map value; the fields read never change.
        Some(task) if unsafe { (*task).id == current.task && (*task).origin.request == origin.request } => {
            current.task
        }
        _ => 0,
    }
}

/// Clears the work of the current thread: its slice has ended, or the runtime has switched to no task.
#[inline(always)]
pub(crate) fn clear_work(tid: u32, now: u64) {
    global_clear_work(tid, now);
}

// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn global_clear_work(tid: u32, now: u64) -> u32 {
    let current = work::current(tid);
    if current.task != 0
        && let Some(task) = TASKS.get_ptr_mut(current.key)
    {
        // SAFETY: a live map value; only this thread runs the task.
        unsafe {
            if (*task).id == current.task {
                (*task).left_ns = now;
            }
        }
    }
    work::switch_to(tid, &Work::NONE, now);
    end_if_once(&current.key, now);
    0
}

/// Ends a task whose end no hook marks.
#[inline(always)]
pub(crate) fn end_if_once(key: &TaskKey, now: u64) {
    if let Some(task) = TASKS.get_ptr_mut(*key) {
        // SAFETY: a live map value; only this thread runs the task.
        let is_over = unsafe { (*task).once != 0 && (*task).started_ns != 0 };
        if is_over {
            end(key, now);
        }
    }
}

/// Ends the task with this key, if there is one: it has finished or was dropped.
#[inline(always)]
pub(crate) fn end(key: &TaskKey, now: u64) {
    global_end_task(key.key, key.tgid, key.space, now);
}

// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn global_end_task(key: u64, tgid: u32, space: u32, now: u64) -> u32 {
    let key = TaskKey { key, tgid, space };
    if let Some(task) = TASKS.get_ptr_mut(key) {
        // SAFETY: a live map value that no thread works on any more.
        unsafe { record_end(task, now) };
        let _present = TASKS.remove(key);
    }
    0
}

/// Counts a task that ends, and emits its link.
///
/// # Safety
/// `task` points to a live map value that no thread works on any more.
#[inline(always)]
unsafe fn record_end(task: *mut DeferredTask, now: u64) {
    // SAFETY: by contract; counters are updated atomically.
    unsafe {
        if (*task).class.naming == ClassKey::SAME_WORK {
            return;
        }
        let has_started = (*task).started_ns != 0;
        if let Some(class) = counters(&(*task).class) {
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
                words::copy(&raw const (*task).class, &raw mut (*link).class);
                (*link).queued_ns = (*task).queued_ns;
                (*link).started_ns = (*task).started_ns;
                (*link).ended_ns = if has_started { (*task).left_ns } else { now };
                words::copy(&raw const (*task).context, &raw mut (*link).context);
                words::copy(&raw const (*task).request_id, &raw mut (*link).request_id);
                entry.submit(u64::from(BPF_RB_NO_WAKEUP));
            } else {
                count_loss(Loss::LinksFull);
            }
        }
    }
}

/// Counters of a class, which are created if there are none. If there is no space, those for all other kinds.
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the stack first"
)]
pub(crate) fn counters(key: &ClassKey) -> Option<*mut Class> {
    if let Some(class) = CLASSES.get_ptr_mut(*key) {
        return Some(class);
    }
    if CLASSES.insert(*key, &NEW, u64::from(BPF_NOEXIST)).is_ok() {
        let _retried_later = KINDS.output::<ClassKey>(key, u64::from(BPF_RB_FORCE_WAKEUP));
    }
    CLASSES.get_ptr_mut(*key).or_else(|| {
        count_loss(Loss::ClassesFull);
        CLASSES.get_ptr_mut(ClassKey { value: 0, naming: ClassKey::OTHERS, ..*key })
    })
}
