//! *deferred*: work that is put off, followed from where it is put off to where it is done. One program stands at all
//! places that profiles name; what a place means, and how to read it, the loader has written into maps.

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
        Action, ClassKey, DeferredTask, EXTRACTORS as MOST_RECIPES, Extractor, HOOKS as MOST_HOOKS, Hook, Op,
        Place, REQUEST_ID_STEPS, TaskKey, ThreadLocal, Verb, Work,
    },
    loss::Loss,
    origin::Origin,
};

use crate::{
    emit::{add, lost, record},
    kernel,
    state::{
        requests,
        tasks::{NEW_TASK, TASKS, end, end_if_once, figures, parent, turn_from},
        work,
    },
    trace_context,
};

/// What it means to come to a place, by process and address; kept by the loader.
#[map]
static HOOKS: HashMap<Place, Hook> = HashMap::with_max_entries(MOST_HOOKS, 0);

/// How to read places; kept by the loader.
#[map]
static EXTRACTORS: Array<Extractor> = Array::with_max_entries(MOST_RECIPES, 0);

#[uprobe]
fn deferred(ctx: ProbeContext) -> u32 {
    let (tgid, tid) = kernel::current();
    let place = Place { address: kernel::instruction(&ctx), tgid, reserved: 0 };
    // One that has run another program since has other things there.
    let Some(hook) = HOOKS.get_ptr_mut(place) else { return 0 };
    // SAFETY: a live map value, that only the loader writes but for its counters.
    let (verb, space, flags, extractor) =
        unsafe { ((*hook).verb, (*hook).space, (*hook).flags, (*hook).extractor) };
    let Some(extractor) = EXTRACTORS.get_ptr(extractor) else { return 0 };
    // SAFETY: a live map value.
    let key = unsafe { follow((&raw const (*extractor).key).cast(), KEY, &ctx) };
    if matches!(key, Found::Excluded) {
        return 0;
    }
    // SAFETY: as above.
    unsafe { add(&raw mut (*hook).hits, 1) };
    let key = key.value().map(|(key, _)| TaskKey { key, tgid, space });
    // SAFETY: has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let at = At { tid, flags, extractor, ctx: &ctx, now };
    if at.comes_to(verb, key).is_some() {
        // SAFETY: as above.
        unsafe { add(&raw mut (*hook).matches, 1) };
    }
    0
}

/// The space of keys that are numbers of tasks; those of profiles begin at 1.
const DETACHED: u32 = 0;

const KEY: usize = observer_common::deferred::KEY_STEPS;
const CLASS: usize = observer_common::deferred::CLASS_STEPS;

/// Where steps have led.
enum Found {
    /// To a value, to be understood as the number says.
    Value(u64, u32),
    /// Nowhere.
    Nothing,
    /// To a condition that does not hold.
    Excluded,
}

impl Found {
    #[inline(always)]
    fn value(self) -> Option<(u64, u32)> {
        match self {
            Self::Value(value, naming) => Some((value, naming)),
            Self::Nothing | Self::Excluded => None,
        }
    }
}

/// The current thread at one of the places.
struct At<'a> {
    tid: u32,
    flags: u32,
    extractor: *const Extractor,
    ctx: &'a ProbeContext,
    /// When that is: the clock is looked at once, for it takes a tenth of what a place does.
    now: u64,
}

impl At<'_> {
    /// Does what the place means. `None` if that came to nothing.
    #[inline(always)]
    fn comes_to(&self, verb: u32, key: Option<TaskKey>) -> Option<()> {
        if verb == Verb::Snapshot as u32 {
            self.snapshot(key?)
        } else if verb == Verb::Restore as u32 {
            self.restore(key?)
        } else if verb == Verb::Leave as u32 {
            self.leave(key)
        } else if verb == Verb::Forget as u32 {
            self.forget(key)
        } else if verb == Verb::Detach as u32 {
            self.detach()
        } else {
            turn_from(self.tid, self.now);
            Some(())
        }
    }

    #[inline(always)]
    #[expect(
        clippy::needless_borrows_for_generic_args,
        reason = "by value it would be copied to the stack first"
    )]
    fn snapshot(&self, key: TaskKey) -> Option<()> {
        // Nothing can be put off twice: another has its place in memory.
        if let Some(before) = TASKS.get_ptr_mut(key) {
            end(before, &key, self.now);
        }
        if TASKS.insert(key, &NEW_TASK, u64::from(BPF_ANY)).is_err() {
            lost(Loss::TasksFull);
            return None;
        }
        let task = TASKS.get_ptr_mut(key)?;
        let current = work::current(self.tid);
        let origin = requests::origin_for_enqueue(key.tgid, &current.origin);
        let class =
            self.class(key).unwrap_or(ClassKey { value: key.space.into(), tgid: key.tgid, naming: 0 });
        // SAFETY: a live map value that nobody else knows of yet.
        unsafe {
            (*task).id = work::number(self.tid, self.now);
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
        let figures = figures(&class)?;
        // SAFETY: a live map value, counted in atomically.
        unsafe {
            add(&raw mut (*figures).pending, 1);
            if class.naming != 0 {
                add(&raw mut (*figures).enqueued, 1);
            }
            // Last, because the verifier follows what comes behind so many steps once for each way through them.
            self.tell_request_id(task);
        }
        Some(())
    }

    #[inline(always)]
    fn restore(&self, key: TaskKey) -> Option<()> {
        let before = work::current(self.tid);
        end_if_once(&before.key, self.now);
        // Some runtimes read from a connection while they work on nothing, and go on in a context that all connections
        // share: that is for what was read.
        let takes_over = self.flags & Hook::TAKES_OVER != 0 && before.task == 0;
        let has_read = if takes_over { before.origin } else { Origin::NONE };
        let Some(task) = TASKS.get_ptr_mut(key) else {
            // It works for somebody, but nobody knows for whom.
            work::turn_to(self.tid, &Work { origin: has_read, task: 0, key, since_ns: 0 }, self.now);
            // If it was no piece of work of its own, none is missing.
            return self.class(key).filter(|class| class.naming == ClassKey::SAME_WORK).map(|_| ());
        };
        // SAFETY: a live map value; work is done by one thread at a time.
        unsafe {
            if (*task).class.naming == ClassKey::SAME_WORK {
                let origin = requests::resolve_origin(key.tgid, &(*task).origin);
                work::turn_to(self.tid, &Work { origin, ..(*task).outer }, self.now);
                return Some(());
            }
            if (*task).started_ns == 0 {
                self.start(task, &key);
            }
            // Entered again while it is current it would lead back to itself.
            if before.task != (*task).id {
                // What was not a piece of work itself is over: nobody knows what the thread turns to when it leaves this.
                (*task).outer = if before.task == 0 { Work::NONE } else { before };
            }
            (*task).once = self.flags & Hook::ONCE;
            let own = requests::resolve_origin(key.tgid, &(*task).origin);
            let origin = if own.inode == 0 { has_read } else { own };
            work::turn_to(self.tid, &Work { origin, task: (*task).id, key, since_ns: 0 }, self.now);
        }
        Some(())
    }

    /// # Safety
    /// `task` points to a live map value that nobody else writes now.
    #[inline(always)]
    unsafe fn start(&self, task: *mut DeferredTask, key: &TaskKey) {
        // SAFETY: by contract; figures are live map values, counted in atomically.
        unsafe {
            (*task).started_ns = self.now;
            if let Some(class) = figures(&(*task).class) {
                add(&raw mut (*class).pending, u64::MAX);
            }
            let was_told = (*task).class.naming != 0;
            if !was_told && let Some(class) = self.class(*key) {
                (*task).class = class;
            }
            if let Some(class) = figures(&(*task).class) {
                if !was_told {
                    add(&raw mut (*class).enqueued, 1);
                }
                add(&raw mut (*class).started, 1);
                record(&raw mut (*class).wait, self.now.saturating_sub((*task).queued_ns));
            }
        }
    }

    /// What the thread works on pauses, if it has this key.
    #[inline(always)]
    fn leave(&self, key: Option<TaskKey>) -> Option<()> {
        let current = work::current(self.tid);
        let key = key.unwrap_or(current.key);
        if key != current.key {
            return None;
        }
        let Some(task) = TASKS.get_ptr_mut(key) else {
            work::turn_to(self.tid, &Work::NONE, self.now);
            return None;
        };
        // SAFETY: a live map value; work is done by one thread at a time.
        unsafe {
            if (*task).id == current.task {
                (*task).left_ns = self.now;
                work::turn_to(self.tid, &(*task).outer, self.now);
            }
        }
        end_if_once(&key, self.now);
        Some(())
    }

    #[inline(always)]
    fn forget(&self, key: Option<TaskKey>) -> Option<()> {
        let current = work::current(self.tid);
        let has_key = key.is_some();
        let key = key.unwrap_or(current.key);
        let task = TASKS.get_ptr_mut(key)?;
        // SAFETY: a live map value; nobody works on what is forgotten.
        unsafe {
            let is_current = (*task).id == current.task;
            if !is_current && !has_key {
                return None;
            }
            if is_current {
                (*task).left_ns = self.now;
                work::turn_to(self.tid, &(*task).outer, self.now);
            }
        }
        end(task, &key, self.now);
        Some(())
    }

    /// What the thread works on is known by its own number from here on.
    #[inline(always)]
    #[expect(
        clippy::needless_borrows_for_generic_args,
        reason = "by value it would be copied to the stack first"
    )]
    fn detach(&self) -> Option<()> {
        let current = work::current(self.tid);
        let task = TASKS.get_ptr(current.key)?;
        let key = TaskKey { key: current.task, space: DETACHED, ..current.key };
        // SAFETY: a live map value, that only this thread works on.
        unsafe {
            if (*task).id != current.task {
                return None;
            }
            if TASKS.insert(key, &*task, u64::from(BPF_ANY)).is_err() {
                lost(Loss::TasksFull);
                return None;
            }
        }
        let _present = TASKS.remove(current.key);
        work::is_known_by(self.tid, key);
        Some(())
    }

    /// Keeps what the runtime calls the request, if that can be read at this place.
    ///
    /// # Safety
    /// `task` points to a live map value that nobody else knows of yet.
    #[inline(always)]
    unsafe fn tell_request_id(&self, task: *mut DeferredTask) {
        // SAFETY: by contract, and the extractor is a live map value.
        unsafe {
            let steps: *const Op = (&raw const (*self.extractor).request_id).cast();
            if let Found::Value(address, _) = follow(steps, REQUEST_ID_STEPS, self.ctx) {
                // What is not there now stays unknown.
                let _read = bpf_probe_read_user_str_bytes(address as *const u8, &mut (*task).request_id);
            }
        }
    }

    /// The class that can be read at this place.
    #[inline(always)]
    fn class(&self, key: TaskKey) -> Option<ClassKey> {
        // SAFETY: a live map value.
        let found = unsafe { follow((&raw const (*self.extractor).class).cast(), CLASS, self.ctx) };
        found.value().map(|(value, naming)| ClassKey { value, tgid: key.tgid, naming })
    }
}

/// Takes steps from the registers of the current thread on.
///
/// # Safety
/// `steps` points to so many in a live map value.
#[inline(always)]
unsafe fn follow(steps: *const Op, count: usize, ctx: &ProbeContext) -> Found {
    let mut value = 0;
    let mut has_failed = false;
    let mut outcome = Found::Nothing;
    for n in 0..count {
        // SAFETY: by contract.
        let step = unsafe { &*steps.add(n) };
        if step.action == Action::End as u32 {
            break;
        }
        if step.action == Action::Case as u32 {
            has_failed = false;
        } else if has_failed {
            continue;
        } else if step.action == Action::Register as u32 {
            value = kernel::register(ctx, step.value);
        } else if step.action == Action::Add as u32 {
            value = value.wrapping_add_signed(step.offset.into());
        } else if step.action == Action::Load as u32 {
            match kernel::read_user::<u64>(value.wrapping_add_signed(step.offset.into())) {
                Some(word) => value = word,
                None => has_failed = true,
            }
        } else if step.action == Action::Test as u32 {
            if value & step.mask != step.value {
                has_failed = true;
                outcome = Found::Excluded;
            }
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "the loader writes small numbers there")]
            return Found::Value(value, step.value as u32);
        }
    }
    outcome
}
