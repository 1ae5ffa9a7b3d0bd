//! Shared types of the *deferred* probe: deferred tasks, their origins, and the extractors, which describe to the
//! programs how to read both in any runtime.

use crate::{histogram::Histogram, origin::Origin};

/// Maximum number of deferred tasks in flight, over all targets.
pub const TASKS: u32 = 32_768;

/// Maximum number of kinds of deferred tasks, over all targets.
pub const CLASSES: u32 = 512;

/// Maximum number of hooks, over all targets.
pub const HOOKS: u32 = 4096;

/// Maximum number of extractors, over all targets.
pub const EXTRACTORS: u32 = 1024;

/// Maximum number of operations that extract a key, tests included.
pub const KEY_STEPS: usize = 12;

/// Maximum number of operations that extract a class.
pub const CLASS_STEPS: usize = 48;

/// Maximum number of operations that extract a request ID, tests included.
pub const REQUEST_ID_STEPS: usize = 24;

/// Size of the buffer for a request ID, in bytes: the longest ID that is kept, its terminating zero, and one more byte.
/// An ID that fills the buffer is treated as truncated.
pub const REQUEST_ID: usize = 48;

/// What a hook does when a process reaches it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Enqueue: stores the current origin under the key.
    Snapshot = 1,
    /// Start or resume: makes the origin that is stored under the key the current one.
    Restore = 2,
    /// Pause or finish: makes the thread's previous task and origin current again.
    Leave = 3,
    /// Destroy: the key is no longer valid.
    Forget = 4,
    /// The thread works for no request from now on.
    Clear = 5,
    /// The task outlives its key, which the runtime may reuse. It ends when its thread reaches a `Forget` hook without
    /// a key.
    Detach = 6,
}

/// Key of `HOOKS`: an instruction in a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HookAddress {
    /// Address of the instruction in the process.
    pub address: u64,
    /// Process.
    pub tgid: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
}
crate::shared::shared!(HookAddress, 16);

/// Value of `HOOKS`: what to do when a process reaches the instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// A [`Verb`].
    pub verb: u32,
    /// Namespace of the keys: keys of different spaces never match.
    pub space: u32,
    /// [`Hook::ONCE`] and [`Hook::TAKES_OVER`].
    pub flags: u32,
    /// Index into `EXTRACTORS`.
    pub extractor: u32,
    /// Number of times that the hook was reached, except when a test excluded it.
    pub hits: u64,
    /// Number of those that had an effect: the key could be read and, except for a snapshot, belonged to a known task.
    pub matches: u64,
}
crate::shared::shared!(Hook, 32);

impl Hook {
    /// A task ends at its thread's next `Leave`, `Clear` or `Restore` hook, or at the end of the slice, because the
    /// runtime has no function that marks its end.
    pub const ONCE: u32 = 1;
    /// A task of unknown origin inherits the origin of what its thread read from a connection while it ran no task.
    pub const TAKES_OVER: u32 = 2;
}

/// What an [`Op`] does. Operations run in sequence and share one current value.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpCode {
    /// Ends the sequence.
    End = 0,
    /// Starts an alternative, which runs only if those before it have failed.
    Case = 1,
    /// Sets the value to that of the register with the number `value`.
    Register = 2,
    /// Replaces the value by the word at the address value + `offset`.
    Load = 3,
    /// Fails the alternative unless the value, masked with `mask`, equals `value`.
    Test = 4,
    /// Returns the value as the result; `value` says how to interpret it.
    Take = 5,
    /// Adds `offset` to the value.
    Add = 6,
}

/// One operation of an [`Extractor`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// An [`OpCode`].
    pub action: u32,
    /// Operand; its meaning depends on the action.
    pub offset: i32,
    /// Operand; its meaning depends on the action.
    pub mask: u64,
    /// Operand; its meaning depends on the action.
    pub value: u64,
}
crate::shared::shared!(Op, 24);

impl Op {
    /// Ends the sequence.
    pub const END: Self = Self { action: OpCode::End as u32, offset: 0, mask: 0, value: 0 };
}

/// Register numbers. Numbers 0 to 5 are the first six arguments, in order.
pub mod register {
    /// The return value.
    pub const RESULT: u64 = 6;
    /// First of the other registers: `rbx`, `rbp`, `rsp`, and `r10` to `r15`, in this order.
    pub const OTHERS: u64 = 7;
    /// Names of the other registers, in order.
    pub const NAMES: [&str; 9] = ["rbx", "rbp", "rsp", "r10", "r11", "r12", "r13", "r14", "r15"];
}

/// Value of `EXTRACTORS`: how to read a task at a hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extractor {
    /// Operations that yield the key; empty if the hook has none. If a test fails, the hook has no effect.
    pub key: [Op; KEY_STEPS],
    /// Operations that yield the class; empty if the hook does not show it.
    pub class: [Op; CLASS_STEPS],
    /// Operations that yield the address of the request ID, a C string; empty if the hook does not show it.
    pub request_id: [Op; REQUEST_ID_STEPS],
    /// The variable that holds the pointer to a thread's trace context.
    pub context: ThreadLocal,
}
crate::shared::shared!(Extractor, 24 * (KEY_STEPS + CLASS_STEPS + REQUEST_ID_STEPS) + 8);

/// Location of a thread-local variable. A single word, so that reads and writes of it are atomic.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadLocal(u64);
crate::shared::shared!(ThreadLocal, 8);

impl ThreadLocal {
    /// No variable.
    pub const NONE: Self = Self(0);

    /// `module` is the C library's number of the module, from 1 on, and `offset` is relative to that module's
    /// thread-local storage. With `module` 0, `offset` is relative to the thread pointer.
    #[must_use]
    pub const fn new(module: u32, offset: i32) -> Self {
        Self((module as u64) << 32 | offset.cast_unsigned() as u64)
    }

    /// The module, as in [`ThreadLocal::new`].
    #[must_use]
    pub const fn module(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The offset in bytes, as in [`ThreadLocal::new`].
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub const fn offset(self) -> i32 {
        (self.0 as u32).cast_signed()
    }
}

/// Trace context that a thread publishes according to OTEP 4947; all zeroes if it publishes none. The bytes are in the
/// order in which the IDs are written, which is big-endian.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The trace ID.
    pub trace_id: [u64; 2],
    /// The span ID.
    pub span_id: u64,
}
crate::shared::shared!(Context, 24);

/// Identifies a deferred task while it is in flight.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TaskKey {
    /// Identifies the task within the runtime.
    pub key: u64,
    /// Process.
    pub tgid: u32,
    /// Namespace of `key`, as in [`Hook`].
    pub space: u32,
}
crate::shared::shared!(TaskKey, 16);

/// The deferred task that a thread runs, if any, and the origin that the thread works for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The request or connection that the thread works for.
    pub origin: Origin,
    /// ID of the deferred task; 0 outside of any task.
    pub task: u64,
    /// Key of that task.
    pub key: TaskKey,
    /// Start of the work, in monotonic nanoseconds.
    pub since_ns: u64,
}
crate::shared::shared!(Work, 56);

impl Work {
    /// No known work.
    pub const NONE: Self =
        Self { origin: Origin::NONE, task: 0, key: TaskKey { key: 0, tgid: 0, space: 0 }, since_ns: 0 };
}

/// Key of `CLASSES`: a kind of deferred task.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClassKey {
    /// Value that identifies the kind in the process; the key space for a task of unknown kind.
    pub value: u64,
    /// Process.
    pub tgid: u32,
    /// How to derive a name from `value`; 0 if the kind is unknown, [`ClassKey::OTHERS`] for kinds beyond the capacity
    /// of `CLASSES`.
    pub naming: u32,
}
crate::shared::shared!(ClassKey, 16);

impl ClassKey {
    /// `naming` of the entry that collects the kinds beyond the capacity of `CLASSES`.
    pub const OTHERS: u32 = u32::MAX;
    /// `naming` of a context that is not a separate task: the work that enqueued it continues in it.
    pub const SAME_WORK: u32 = 8;
}

/// Value of `CLASSES`: counters of a kind of deferred task.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Tasks enqueued. If the kind is known only when a task starts, tasks started.
    pub enqueued: u64,
    /// Of those, tasks that have started.
    pub started: u64,
    /// Of those, tasks that have finished.
    pub finished: u64,
    /// Tasks dropped before they started.
    pub orphaned: u64,
    /// Tasks that are enqueued now: neither started nor dropped.
    pub pending: u64,
    /// Time from enqueue to start.
    pub wait: Histogram,
    /// Time from start until the task last ran, of finished tasks.
    pub run: Histogram,
}
crate::shared::shared!(Class, 40 + 2 * size_of::<Histogram>());

impl Class {
    /// A kind without tasks.
    pub const EMPTY: Self = Self {
        enqueued: 0,
        started: 0,
        finished: 0,
        orphaned: 0,
        pending: 0,
        wait: Histogram::EMPTY,
        run: Histogram::EMPTY,
    };
}

/// Value of `TASKS`, whose key is the [`TaskKey`]: a deferred task in flight.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeferredTask {
    /// Unique ID.
    pub id: u64,
    /// ID of the task that enqueued this one, if both are for the same request; otherwise 0.
    pub parent: u64,
    /// The request or connection that the task is for.
    pub origin: Origin,
    /// Its kind.
    pub class: ClassKey,
    /// When the task was enqueued, in monotonic nanoseconds.
    pub queued_ns: u64,
    /// When the task started, likewise; 0 if it has not.
    pub started_ns: u64,
    /// When the task last ran, likewise.
    pub left_ns: u64,
    /// 1 if the task ends as soon as its thread switches to other work.
    pub once: u32,
    /// Always zero: explicit padding.
    pub reserved: u32,
    /// Work that the thread resumes when it leaves this task. For [`ClassKey::SAME_WORK`]: the work that continues.
    pub outer: Work,
    /// Trace context that the thread that enqueued the task published.
    pub context: Context,
    /// The runtime's ID of the request, terminated by a zero; empty if unknown.
    pub request_id: [u8; REQUEST_ID],
}
crate::shared::shared!(DeferredTask, 168 + REQUEST_ID);

impl DeferredTask {
    /// An empty task.
    pub const EMPTY: Self = Self {
        id: 0,
        parent: 0,
        origin: Origin::NONE,
        class: ClassKey { value: 0, tgid: 0, naming: 0 },
        queued_ns: 0,
        started_ns: 0,
        left_ns: 0,
        once: 0,
        reserved: 0,
        outer: Work::NONE,
        context: Context { trace_id: [0; 2], span_id: 0 },
        request_id: [0; REQUEST_ID],
    };
}

/// A deferred task that has finished or was dropped and whose request is known, as sent through `LINKS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// As in [`DeferredTask`].
    pub id: u64,
    /// As in [`DeferredTask`].
    pub parent: u64,
    /// ID of the request that the task was for.
    pub request: u64,
    /// Its kind.
    pub class: ClassKey,
    /// As in [`DeferredTask`].
    pub queued_ns: u64,
    /// As in [`DeferredTask`]; 0 if it never started.
    pub started_ns: u64,
    /// When the task last ran or, if it never started, when it was dropped, in monotonic nanoseconds.
    pub ended_ns: u64,
    /// As in [`DeferredTask`].
    pub context: Context,
    /// As in [`DeferredTask`].
    pub request_id: [u8; REQUEST_ID],
}
crate::shared::shared!(Link, 88 + REQUEST_ID);
