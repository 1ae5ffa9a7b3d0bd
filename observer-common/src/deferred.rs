//! Shared types of the *deferred* probe: work that is put off, what it is put off for, and how the programs find that
//! out in a runtime they know nothing of.

use crate::{histogram::Histogram, origin::Origin};

/// Most pieces of deferred work in flight, of all targets together.
pub const TASKS: u32 = 32_768;

/// Most kinds of deferred work, of all targets together.
pub const CLASSES: u32 = 512;

/// Most places that are watched, of all targets together.
pub const HOOKS: u32 = 4096;

/// Most ways to read a place, of all targets together.
pub const EXTRACTORS: u32 = 1024;

/// Most steps that lead to a key, conditions included.
pub const KEY_STEPS: usize = 12;

/// Most steps that lead to a class.
pub const CLASS_STEPS: usize = 48;

/// Most steps that lead to a request id, conditions included.
pub const REQUEST_ID_STEPS: usize = 24;

/// Longest request id that is kept, in bytes, with the zero that ends it and one more: what fills all of this was cut.
pub const REQUEST_ID: usize = 48;

/// What a place in a runtime means.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// The current origin is kept under the key: work is put off.
    Snapshot = 1,
    /// What is kept under the key is the current origin from now on: the work goes on.
    Restore = 2,
    /// The work pauses, or has ended: what was current before is so again.
    Leave = 3,
    /// The key is dead.
    Forget = 4,
    /// The thread works for nobody now.
    Clear = 5,
    /// The work outlives its key, which may be another's soon: it ends where its thread forgets it without one.
    Detach = 6,
}

/// Key of `HOOKS`: an instruction of a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Address of the instruction in the process.
    pub address: u64,
    /// Process.
    pub tgid: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
}
crate::shared::shared!(Place, 16);

/// Value of `HOOKS`: what it means that a process comes to a place.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// A [`Verb`].
    pub verb: u32,
    /// Which keys these are: those of different spaces never meet.
    pub space: u32,
    /// [`Hook::ONCE`] and [`Hook::TAKES_OVER`].
    pub flags: u32,
    /// Index into `EXTRACTORS`.
    pub extractor: u32,
    /// How often it was come to, and meant.
    pub hits: u64,
    /// How often that meant something: a key could be read and, but for a snapshot, was known.
    pub matches: u64,
}
crate::shared::shared!(Hook, 32);

impl Hook {
    /// Work ends where its thread turns to something else, because nothing else tells.
    pub const ONCE: u32 = 1;
    /// Work of unknown origin goes on for what its thread has read while it worked on nothing.
    pub const TAKES_OVER: u32 = 2;
}

/// What a [`Op`] does with the value at hand.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing more follows.
    End = 0,
    /// Another case begins; it is tried if those before have failed.
    Case = 1,
    /// The value is a register's, whose number is `value`.
    Register = 2,
    /// The value is the word at it and `offset`.
    Load = 3,
    /// The case fails unless the value, as far as `mask` goes, is `value`.
    Test = 4,
    /// The value is the answer, to be understood as `value` says.
    Take = 5,
    /// The value is that and `offset`.
    Add = 6,
}

/// A step on the way to a key or a class.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// An [`Action`].
    pub action: u32,
    /// See there.
    pub offset: i32,
    /// See there.
    pub mask: u64,
    /// See there.
    pub value: u64,
}
crate::shared::shared!(Op, 24);

impl Op {
    /// The end.
    pub const END: Self = Self { action: Action::End as u32, offset: 0, mask: 0, value: 0 };
}

/// Numbers of registers: the first six arguments, in order, are 0 to 5.
pub mod register {
    /// What a function returns.
    pub const RESULT: u64 = 6;
    /// `rbx`, `rbp`, `rsp`, and `r10` to `r15`, from this number on in that order.
    pub const OTHERS: u64 = 7;
    /// Names of the others.
    pub const NAMES: [&str; 9] = ["rbx", "rbp", "rsp", "r10", "r11", "r12", "r13", "r14", "r15"];
}

/// Value of `EXTRACTORS`: how to read a place.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extractor {
    /// Steps to the key; none if there is none to read. A place where a test fails means nothing.
    pub key: [Op; KEY_STEPS],
    /// Steps to the class; none if it is not told there.
    pub class: [Op; CLASS_STEPS],
    /// Steps to the address of the request id, a C string; none if it is not told there.
    pub request_id: [Op; REQUEST_ID_STEPS],
    /// Where the process keeps the pointer to a thread's trace context.
    pub context: ThreadLocal,
}
crate::shared::shared!(Extractor, 24 * (KEY_STEPS + CLASS_STEPS + REQUEST_ID_STEPS) + 8);

/// A variable of which each thread has its own. One word, so that nobody ever sees half of it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadLocal(u64);
crate::shared::shared!(ThreadLocal, 8);

impl ThreadLocal {
    /// None.
    pub const NONE: Self = Self(0);

    /// In the variables of the module that the C library knows by this number, from 1 on; of number 0, from the thread
    /// pointer.
    #[must_use]
    pub const fn new(module: u32, offset: i32) -> Self {
        Self((module as u64) << 32 | offset.cast_unsigned() as u64)
    }

    /// The module, as in [`ThreadLocal::new`].
    #[must_use]
    pub const fn module(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Where it is there, in bytes.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    pub const fn offset(self) -> i32 {
        (self.0 as u32).cast_signed()
    }
}

/// What a thread publishes as the trace that it works for, as OTEP 4947 has it; zeroes if it publishes none. The bytes
/// are in the order in which they are written, which is big-endian.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace_id: [u64; 2],
    /// The span in it.
    pub span_id: u64,
}
crate::shared::shared!(Context, 24);

/// What deferred work is known by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TaskKey {
    /// What the runtime knows it by.
    pub key: u64,
    /// Process.
    pub tgid: u32,
    /// As in [`Hook`].
    pub space: u32,
}
crate::shared::shared!(TaskKey, 16);

/// What a thread is working for, and on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// What it is for.
    pub origin: Origin,
    /// The piece of deferred work; 0 if it is none.
    pub task: u64,
    /// What that is known by.
    pub key: TaskKey,
    /// Since when, monotonic nanoseconds.
    pub since_ns: u64,
}
crate::shared::shared!(Work, 56);

impl Work {
    /// Nothing that anybody knows of.
    pub const NONE: Self =
        Self { origin: Origin::NONE, task: 0, key: TaskKey { key: 0, tgid: 0, space: 0 }, since_ns: 0 };
}

/// Key of `CLASSES`: a kind of deferred work.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClassKey {
    /// What stands for it in the process; of work whose class is not told, its space.
    pub value: u64,
    /// Process.
    pub tgid: u32,
    /// How to make a name of `value`; 0 if the class is not told, [`ClassKey::OTHERS`] for those without room.
    pub naming: u32,
}
crate::shared::shared!(ClassKey, 16);

impl ClassKey {
    /// What `naming` is for the classes that found no room.
    pub const OTHERS: u32 = u32::MAX;
    /// What it is for what is no piece of work of its own: what put it off goes on in it.
    pub const SAME_WORK: u32 = 8;
}

/// Value of `CLASSES`: figures of a kind of deferred work.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Pieces put off; where only their start tells the class, those that have started.
    pub enqueued: u64,
    /// Of these, the ones that have started.
    pub started: u64,
    /// Of these, the ones that have ended.
    pub finished: u64,
    /// Pieces forgotten before they started.
    pub orphaned: u64,
    /// Pieces that have not started and are not forgotten, now.
    pub pending: u64,
    /// Put off -> started.
    pub wait: Histogram,
    /// Started -> worked on for the last time, of those that have ended.
    pub run: Histogram,
}
crate::shared::shared!(Class, 40 + 2 * size_of::<Histogram>());

impl Class {
    /// One of which there has been none.
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

/// Value of `TASKS`, whose key is its [`TaskKey`]: a piece of deferred work in flight.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeferredTask {
    /// Tells it from all others.
    pub id: u64,
    /// The piece that put it off, if that is for the same request; 0 if none did.
    pub parent: u64,
    /// What it is for.
    pub origin: Origin,
    /// Its kind.
    pub class: ClassKey,
    /// When it was put off, monotonic nanoseconds.
    pub queued_ns: u64,
    /// When it started, likewise; 0 if it has not.
    pub started_ns: u64,
    /// When it was worked on for the last time, likewise.
    pub left_ns: u64,
    /// 1 if it ends where its thread turns to something else.
    pub once: u32,
    /// Zero; keeps the size free of padding.
    pub reserved: u32,
    /// The piece of work that its thread worked on before it; of what is no piece of its own, what goes on in it.
    pub outer: Work,
    /// What the thread that put it off published.
    pub context: Context,
    /// What the runtime calls the request, up to the first zero; nothing if that is not told.
    pub request_id: [u8; REQUEST_ID],
}
crate::shared::shared!(DeferredTask, 168 + REQUEST_ID);

impl DeferredTask {
    /// One that nothing is known of.
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

/// A piece of deferred work that is over, as `LINKS` passes it on: of those whose request is known.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// As in [`DeferredTask`].
    pub id: u64,
    /// As in [`DeferredTask`].
    pub parent: u64,
    /// The request it was done for.
    pub request: u64,
    /// Its kind.
    pub class: ClassKey,
    /// As in [`DeferredTask`].
    pub queued_ns: u64,
    /// As in [`DeferredTask`]; 0 if it never started.
    pub started_ns: u64,
    /// When it was worked on for the last time or, if it never started, forgotten; monotonic nanoseconds.
    pub ended_ns: u64,
    /// As in [`DeferredTask`].
    pub context: Context,
    /// As in [`DeferredTask`].
    pub request_id: [u8; REQUEST_ID],
}
crate::shared::shared!(Link, 88 + REQUEST_ID);
