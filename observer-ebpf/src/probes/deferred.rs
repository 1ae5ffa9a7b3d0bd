//! *deferred*: follows deferred tasks from enqueue to finish. A task takes its request when it is enqueued. One program
//! is attached to all hooks of all profiles; what a hook does, and how a task is read there, is in maps that the loader
//! writes.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{bpf_ktime_get_ns, bpf_probe_read_user_str_bytes},
    macros::{map, uprobe},
    maps::{Array, HashMap},
    programs::ProbeContext,
};
use observer_common::{
    deferred::{
        CLASS_STEPS, ClassKey, DeferredTask, EXTRACTORS as MAX_EXTRACTORS, Extractor, HOOKS as MAX_HOOKS,
        Hook, HookAddress, KEY_STEPS, Op, OpCode, REQUEST_ID_STEPS, TaskKey, ThreadLocal, Verb, Work,
    },
    loss::Loss,
    origin::Origin,
};

use crate::{
    emit::{add, count_loss, record},
    kernel,
    state::{
        requests,
        tasks::{NEW_TASK, TASKS, clear_work, counters, end, end_if_once, parent},
        work,
    },
    trace_context, words,
};

/// Maps a hook's process and address to the action to take; written by the loader.
#[map]
static HOOKS: HashMap<HookAddress, Hook> = HashMap::with_max_entries(MAX_HOOKS, 0);

/// How to read tasks at hooks; written by the loader.
#[map]
static EXTRACTORS: Array<Extractor> = Array::with_max_entries(MAX_EXTRACTORS, 0);

#[uprobe]
fn deferred(ctx: ProbeContext) -> u32 {
    let (tgid, tid) = kernel::current();
    let place = HookAddress { address: kernel::instruction(&ctx), tgid, reserved: 0 };
    // There is no entry if the process has executed another program since.
    let Some(hook) = HOOKS.get_ptr_mut(place) else { return 0 };
    // SAFETY: a live map value; only the loader writes these fields.
    let (verb, space, flags, extractor) =
        unsafe { ((*hook).verb, (*hook).space, (*hook).flags, (*hook).extractor) };
    let Some(extractor) = EXTRACTORS.get_ptr(extractor) else { return 0 };
    // SAFETY: a live map value.
    let key = unsafe { extract((&raw const (*extractor).key).cast(), KEY_STEPS, &ctx) };
    if matches!(key, Extracted::Excluded) {
        return 0;
    }
    // SAFETY: as above.
    unsafe { add(&raw mut (*hook).hits, 1) };
    // Not an option: the compiler would read the key of none, which the verifier of 5.10 rejects.
    let (key, has_key) = match key {
        Extracted::Value(key, _) => (key, true),
        Extracted::Missing | Extracted::Excluded => (0, false),
    };
    let key = TaskKey { key, tgid, space };
    // SAFETY: has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let reached = ReachedHook { tid, flags, extractor, ctx: &ctx, now };
    if reached.apply(verb, key, has_key).is_some() {
        // SAFETY: as above.
        unsafe { add(&raw mut (*hook).matches, 1) };
    }
    0
}

/// The space of keys that are task IDs. Spaces of profiles begin at 1.
const DETACHED: u32 = 0;

/// Result of running an extractor's operations.
enum Extracted {
    /// A value, and how to interpret it.
    Value(u64, u32),
    /// No value: no operations, or memory that could not be read.
    Missing,
    /// A test failed.
    Excluded,
}

impl Extracted {
    #[inline(always)]
    fn value(self) -> Option<(u64, u32)> {
        match self {
            Self::Value(value, naming) => Some((value, naming)),
            Self::Missing | Self::Excluded => None,
        }
    }
}

/// A hook that the current thread has reached.
struct ReachedHook<'a> {
    tid: u32,
    flags: u32,
    extractor: *const Extractor,
    ctx: &'a ProbeContext,
    /// When the hook was reached. The clock is read once, because that takes a tenth of the program's run time.
    now: u64,
}

impl ReachedHook<'_> {
    /// Runs the hook's verb. `None` if it had no effect.
    #[inline(always)]
    fn apply(&self, verb: u32, key: TaskKey, has_key: bool) -> Option<()> {
        if verb == Verb::Snapshot as u32 {
            if has_key { self.snapshot(key) } else { None }
        } else if verb == Verb::Restore as u32 {
            if has_key { self.restore(key) } else { None }
        } else if verb == Verb::Leave as u32 {
            self.leave(key, has_key)
        } else if verb == Verb::Forget as u32 {
            self.forget(key, has_key)
        } else if verb == Verb::Detach as u32 {
            self.detach()
        } else {
            clear_work(self.tid, self.now);
            Some(())
        }
    }

    #[inline(always)]
    #[expect(
        clippy::needless_borrows_for_generic_args,
        reason = "by value it would be copied to the stack first"
    )]
    fn snapshot(&self, key: TaskKey) -> Option<()> {
        // A task cannot be enqueued twice: a task with this key is one whose memory has been reused.
        end(&key, self.now);
        if TASKS.insert(key, &NEW_TASK, u64::from(BPF_ANY)).is_err() {
            count_loss(Loss::TasksFull);
            return None;
        }
        let task = TASKS.get_ptr_mut(key)?;
        let current = work::current(self.tid);
        let origin = requests::origin_for_enqueue(key.tgid, &current.origin);
        let class =
            self.class(key).unwrap_or(ClassKey { value: key.space.into(), tgid: key.tgid, naming: 0 });
        // SAFETY: a live map value that no other program refers to yet.
        unsafe {
            (*task).id = work::unique_id(self.tid, self.now);
            (*task).parent = parent(&current, &origin);
            (*task).origin = origin;
            (*task).class = class;
            (*task).queued_ns = self.now;
            (*task).once = self.flags & Hook::ONCE;
            (*task).outer = current;
            let pointer = read_volatile(&raw const (*self.extractor).context);
            if pointer != ThreadLocal::NONE
                && let Some(context) = trace_context::published(pointer)
            {
                (*task).context = context;
            }
        }
        if class.naming == ClassKey::SAME_WORK {
            return Some(());
        }
        let Some(counters) = counters(&class) else {
            // Without its enqueue, its start must not be counted either.
            let _present = TASKS.remove(key);
            return None;
        };
        // SAFETY: a live map value, updated atomically.
        unsafe {
            add(&raw mut (*counters).pending, 1);
            if class.naming != 0 {
                add(&raw mut (*counters).enqueued, 1);
            }
            // This is last because the verifier analyses the code after these operations once for each path through
            // them.
            self.read_request_id(task);
        }
        Some(())
    }

    #[inline(always)]
    fn restore(&self, key: TaskKey) -> Option<()> {
        let before = work::current(self.tid);
        end_if_once(&before.key, self.now);
        // Some runtimes read from a connection outside of any task and continue in a context that all connections
        // share. That context then works for what was read.
        let takes_over = self.flags & Hook::TAKES_OVER != 0 && before.task == 0;
        let read_origin = if takes_over { before.origin } else { Origin::NONE };
        let Some(task) = TASKS.get_ptr_mut(key) else {
            // The task is unknown, and so is its origin.
            work::switch_to(self.tid, &Work { origin: read_origin, task: 0, key, since_ns: 0 }, self.now);
            // If the context is not a separate task, no enqueue has been missed.
            return self.class(key).filter(|class| class.naming == ClassKey::SAME_WORK).map(|_| ());
        };
        // SAFETY: a live map value; a task runs on one thread at a time.
        unsafe {
            if (*task).class.naming == ClassKey::SAME_WORK {
                let origin = requests::resolve_origin(key.tgid, &(*task).origin);
                work::switch_to(self.tid, &Work { origin, ..(*task).outer }, self.now);
                return Some(());
            }
            if (*task).started_ns == 0 {
                self.start(task, &key);
            }
            // If the task is already current, it must not become its own outer work.
            if before.task != (*task).id {
                // Work outside of a task ends here: it is unknown what the thread does when it leaves this task.
                let outer = &raw mut (*task).outer;
                if before.task == 0 {
                    words::clear(outer);
                } else {
                    words::copy(&raw const before, outer);
                }
            }
            (*task).once = self.flags & Hook::ONCE;
            let own = requests::resolve_origin(key.tgid, &(*task).origin);
            let origin = if own.inode == 0 { read_origin } else { own };
            work::switch_to(self.tid, &Work { origin, task: (*task).id, key, since_ns: 0 }, self.now);
        }
        Some(())
    }

    /// Records that a task starts.
    ///
    /// # Safety
    /// `task` points to a live map value that nothing else writes at present.
    #[inline(always)]
    unsafe fn start(&self, task: *mut DeferredTask, key: &TaskKey) {
        // SAFETY: by contract; counters are live map values, updated atomically.
        unsafe {
            (*task).started_ns = self.now;
            if let Some(class) = counters(&(*task).class) {
                add(&raw mut (*class).pending, u64::MAX);
            }
            let is_class_known = (*task).class.naming != 0;
            if !is_class_known && let Some(class) = self.class(*key) {
                (*task).class = class;
            }
            if let Some(class) = counters(&(*task).class) {
                if !is_class_known {
                    add(&raw mut (*class).enqueued, 1);
                }
                add(&raw mut (*class).started, 1);
                record(&raw mut (*class).wait, self.now.saturating_sub((*task).queued_ns));
            }
        }
    }

    /// Leaves the current task, if it has this key.
    #[inline(always)]
    fn leave(&self, key: TaskKey, has_key: bool) -> Option<()> {
        let current = work::current(self.tid);
        let key = if has_key { key } else { current.key };
        if key != current.key {
            return None;
        }
        let Some(task) = TASKS.get_ptr_mut(key) else {
            work::switch_to(self.tid, &Work::NONE, self.now);
            return None;
        };
        // SAFETY: a live map value; a task runs on one thread at a time.
        unsafe {
            if (*task).id == current.task {
                (*task).left_ns = self.now;
                work::switch_to(self.tid, &(*task).outer, self.now);
            }
        }
        end_if_once(&key, self.now);
        Some(())
    }

    #[inline(always)]
    fn forget(&self, key: TaskKey, has_key: bool) -> Option<()> {
        let current = work::current(self.tid);
        let key = if has_key { key } else { current.key };
        let task = TASKS.get_ptr_mut(key)?;
        // SAFETY: a live map value; a destroyed task no longer runs.
        unsafe {
            let is_current = (*task).id == current.task;
            if !is_current && !has_key {
                return None;
            }
            if is_current {
                (*task).left_ns = self.now;
                work::switch_to(self.tid, &(*task).outer, self.now);
            }
        }
        end(&key, self.now);
        Some(())
    }

    /// Makes the current task's ID its key from here on.
    #[inline(always)]
    #[expect(
        clippy::needless_borrows_for_generic_args,
        reason = "by value it would be copied to the stack first"
    )]
    fn detach(&self) -> Option<()> {
        let current = work::current(self.tid);
        let task = TASKS.get_ptr(current.key)?;
        let key = TaskKey { key: current.task, space: DETACHED, ..current.key };
        // SAFETY: a live map value; only this thread runs the task.
        unsafe {
            if (*task).id != current.task {
                return None;
            }
            if TASKS.insert(key, &*task, u64::from(BPF_ANY)).is_err() {
                count_loss(Loss::TasksFull);
                return None;
            }
        }
        let _present = TASKS.remove(current.key);
        work::rekey(self.tid, key);
        Some(())
    }

    /// Stores the runtime's ID of the request, if it can be read at this hook.
    ///
    /// # Safety
    /// `task` points to a live map value that no other program refers to yet.
    #[inline(always)]
    unsafe fn read_request_id(&self, task: *mut DeferredTask) {
        // SAFETY: by contract, and the extractor is a live map value.
        unsafe {
            let ops: *const Op = (&raw const (*self.extractor).request_id).cast();
            if let Extracted::Value(address, _) = extract(ops, REQUEST_ID_STEPS, self.ctx) {
                // An ID that cannot be read now stays unknown.
                let _read = bpf_probe_read_user_str_bytes(address as *const u8, &mut (*task).request_id);
            }
        }
    }

    /// The task's class, if it can be read at this hook.
    #[inline(always)]
    fn class(&self, key: TaskKey) -> Option<ClassKey> {
        // SAFETY: a live map value.
        let found = unsafe { extract((&raw const (*self.extractor).class).cast(), CLASS_STEPS, self.ctx) };
        found.value().map(|(value, naming)| ClassKey { value, tgid: key.tgid, naming })
    }
}

/// Runs an extractor's operations, starting from the registers of the current thread.
///
/// # Safety
/// `ops` points to `count` operations in a live map value.
#[inline(always)]
unsafe fn extract(ops: *const Op, count: usize, ctx: &ProbeContext) -> Extracted {
    let mut value = 0;
    let mut has_failed = false;
    let mut outcome = Extracted::Missing;
    for n in 0..count {
        // SAFETY: by contract.
        let op = unsafe { &*ops.add(n) };
        if op.action == OpCode::End as u32 {
            break;
        }
        if op.action == OpCode::Case as u32 {
            has_failed = false;
        } else if has_failed {
            continue;
        } else if op.action == OpCode::Register as u32 {
            value = kernel::register(ctx, op.value);
        } else if op.action == OpCode::Add as u32 {
            value = value.wrapping_add_signed(op.offset.into());
        } else if op.action == OpCode::Load as u32 {
            match kernel::read_user::<u64>(value.wrapping_add_signed(op.offset.into())) {
                Some(word) => value = word,
                None => has_failed = true,
            }
        } else if op.action == OpCode::Test as u32 {
            if value & op.mask != op.value {
                has_failed = true;
                outcome = Extracted::Excluded;
            }
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "the loader writes small numbers there")]
            return Extracted::Value(value, op.value as u32);
        }
    }
    outcome
}
