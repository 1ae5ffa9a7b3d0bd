//! Watches long slices while they last: decides when their stacks are read, by `reader.rs`, and which stack a stall
//! reports, and asks whether events wait for their end. The code that caused a stall has left the stack when it has ended.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::{
    interpreter::is_incomplete,
    reader::{StackReader, ThreadState},
    readiness,
    sampler::Sampler,
};
use crate::{model::frame::StackSample, read::reactors::InSlice};

/// Share of the stall threshold after which the stack of a slice is read, as (numerator, denominator): early enough to
/// read it before the threshold, late enough to skip ordinary slices.
const READ_AFTER: (u64, u64) = (3, 5);
/// How often the slices are checked within a stall threshold: often enough for one check between [`READ_AFTER`] and the
/// threshold.
const CHECKS: u32 = 3;
/// Bounds of the time between two checks.
const PERIOD_MIN: Duration = Duration::from_millis(2);
const PERIOD_MAX: Duration = Duration::from_millis(250);
/// Minimum pause between two reads of a slice's stack, as a multiple of the duration of the last read, so that observer
/// does not cause stalls itself.
const PAUSE_FACTOR: u32 = 20;
/// Stacks of a longer slice are read less often: the next time when its age has grown by this fraction (1/8) of itself.
const BACKOFF_DIVISOR: u64 = 8;
/// Maximum number of different stacks that are kept of one slice.
const STACKS_MAX: usize = 16;
/// Number of checks in a row after which events count as waiting. At a single check, a connection of a listener that is
/// shared with other processes may be about to be accepted by another one.
const CHECKS_WITH_EVENTS: u32 = 2;
/// How long a thread runs on a CPU between two samples.
const SAMPLE_PERIOD: Duration = Duration::from_millis(1);

/// Watches the slices of all event loops.
pub(crate) struct Watcher {
    reader: StackReader,
    /// By thread.
    slow_slices: HashMap<u32, SlowSlice>,
    /// Age from which the stack of a slice is read.
    read_after_ns: u64,
    period: Duration,
    /// Whether the kernel has refused to tell whether events wait.
    may_not_ask: bool,
}

/// A slice that has lasted long enough for its stack to be read.
struct SlowSlice {
    slice: InSlice,
    /// The stacks that were read, each with how often.
    stacks: Vec<(StackSample, u32)>,
    /// Samples its thread, if that was found running native code.
    sampler: Option<Sampler>,
    /// Why samples have native frames only although the process has an interpreter.
    interpreter_error: Option<String>,
    /// When to read the stack again, monotonic nanoseconds.
    next_ns: u64,
    /// At how many checks in a row events were seen to wait for its end, up to [`CHECKS_WITH_EVENTS`].
    checks_with_events: u32,
    /// When to ask again, monotonic nanoseconds.
    next_events_ns: u64,
    /// Whether it was not in progress at the last check, so that its end may still be reported.
    has_ended: bool,
}

impl Watcher {
    /// Watches for stalls of `threshold` or longer.
    pub(crate) fn new(threshold: Duration) -> Self {
        let threshold_ns = u64::try_from(threshold.as_nanos()).unwrap_or(u64::MAX);
        Self {
            reader: StackReader::default(),
            slow_slices: HashMap::new(),
            read_after_ns: threshold_ns / READ_AFTER.1 * READ_AFTER.0,
            period: (threshold / CHECKS).clamp(PERIOD_MIN, PERIOD_MAX),
            may_not_ask: false,
        }
    }

    /// The time between two calls of [`check`](Self::check).
    pub(crate) const fn period(&self) -> Duration {
        self.period
    }

    /// Whether the kernel has refused to tell whether events wait for a stalled loop.
    pub(crate) const fn may_not_ask(&self) -> bool {
        self.may_not_ask
    }

    /// Whether [`check`](Self::check) has something to do.
    pub(crate) fn has_long_slices(
        &self,
        mut in_progress: impl Iterator<Item = InSlice>,
        now_ns: u64,
    ) -> bool {
        !self.slow_slices.is_empty() || in_progress.any(|slice| self.is_long(&slice, now_ns))
    }

    const fn is_long(&self, slice: &InSlice, now_ns: u64) -> bool {
        now_ns.saturating_sub(slice.since_ns) >= self.read_after_ns
    }

    /// Reads the stacks of the long ones among the slices in progress, and asks whether events wait for them.
    /// `is_still` says whether a slice is still in progress: what was read after the end of its slice belongs to what
    /// the thread did next, and is discarded.
    pub(crate) fn check(
        &mut self,
        in_progress: impl Iterator<Item = InSlice>,
        now_ns: u64,
        is_still: impl Fn(&InSlice) -> bool,
    ) {
        // A slice that had ended by the previous check has been reported by now, or was too short to be a stall.
        self.slow_slices.retain(|_, slow| !std::mem::replace(&mut slow.has_ended, true));
        for slice in in_progress {
            if !self.is_long(&slice, now_ns) {
                continue;
            }
            let slow = self.slow_slices.entry(slice.tid).or_insert_with(|| SlowSlice::of(slice));
            if !slow.slice.is(&slice) {
                // The thread's previous slice ended between two checks. It was no stall, or `seen` would have removed it.
                *slow = SlowSlice::of(slice);
            }
            slow.slice = slice;
            slow.has_ended = false;
            self.may_not_ask |= slow.check_events(now_ns, &is_still).is_err();
            if now_ns >= slow.next_ns {
                let began = Instant::now();
                slow.read(&mut self.reader, &is_still);
                if slow.stacks.is_empty() {
                    // The thread runs native code. At the next check it may be blocked, or there is a sample.
                    continue;
                }
                let pause = began.elapsed() * PAUSE_FACTOR;
                let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
                slow.next_ns = now_ns + pause_ns.max((now_ns - slice.since_ns) / BACKOFF_DIVISOR);
            }
        }
    }

    /// Whether events were seen to wait for the end of a slice that has ended.
    pub(crate) fn events_waited(&self, tid: u32, since_ns: u64) -> bool {
        self.slow_slices.get(&tid).is_some_and(|slow| {
            slow.slice.since_ns == since_ns && slow.checks_with_events == CHECKS_WITH_EVENTS
        })
    }

    /// The stack that was read most often of a slice that has ended, which is forgotten. `was_blocked` says whether it
    /// was blocked most of the time.
    pub(crate) fn seen(&mut self, tid: u32, since_ns: u64, was_blocked: bool) -> StackSample {
        match self.slow_slices.remove(&tid) {
            Some(mut slow) if slow.slice.since_ns == since_ns => {
                slow.take_sample(&mut self.reader);
                slow.most_frequent(was_blocked)
            }
            Some(other) => {
                self.slow_slices.insert(tid, other);
                not_read()
            }
            None => not_read(),
        }
    }

    /// Reads the stack of a slice in progress unless one has been read already, and takes the latest sample.
    pub(crate) fn ensure_read(&mut self, slice: InSlice, is_still: impl Fn(&InSlice) -> bool) {
        let slow = self.slow_slices.entry(slice.tid).or_insert_with(|| SlowSlice::of(slice));
        if !slow.slice.is(&slice) {
            *slow = SlowSlice::of(slice);
        }
        if slow.stacks.is_empty() {
            slow.read(&mut self.reader, &is_still);
        }
        slow.take_sample(&mut self.reader);
    }

    /// The stack that was read most often of a slice in progress.
    pub(crate) fn stack_so_far(&self, slice: InSlice, was_blocked: bool) -> StackSample {
        let slow = self.slow_slices.get(&slice.tid).filter(|slow| slow.slice.is(&slice));
        slow.map_or_else(
            || StackSample::missing("its stack has not been read yet"),
            |slow| slow.most_frequent(was_blocked),
        )
    }
}

impl SlowSlice {
    const fn of(slice: InSlice) -> Self {
        Self {
            slice,
            stacks: Vec::new(),
            sampler: None,
            interpreter_error: None,
            next_ns: 0,
            checks_with_events: 0,
            next_events_ns: 0,
            has_ended: false,
        }
    }

    /// Asks whether events wait for the end of the slice, unless that is known already. An error means that observer may
    /// not ask.
    fn check_events(&mut self, now_ns: u64, is_still: &impl Fn(&InSlice) -> bool) -> Result<(), Errno> {
        let InSlice { pid, epoll_set, since_ns, .. } = self.slice;
        if self.checks_with_events == CHECKS_WITH_EVENTS || now_ns < self.next_events_ns {
            return Ok(());
        }
        self.next_events_ns = now_ns + (now_ns - since_ns) / BACKOFF_DIVISOR;
        if let Some(set) = epoll_set
            && let Some(has_events) = readiness::has_events(pid, set)?
            && is_still(&self.slice)
        {
            self.checks_with_events = if has_events { self.checks_with_events + 1 } else { 0 };
        }
        Ok(())
    }

    /// Reads the stack of the thread, or starts to sample it if it runs native code.
    fn read(&mut self, reader: &mut StackReader, is_still: &impl Fn(&InSlice) -> bool) {
        self.take_sample(reader);
        let tid = self.slice.tid;
        match reader.read(self.slice) {
            ThreadState::Stack(sample) if is_still(&self.slice) => self.add(sample),
            ThreadState::Stack(_) => {}
            ThreadState::Running(interpreter_error) => {
                self.interpreter_error = interpreter_error;
                if self.sampler.is_none() {
                    match Sampler::of(tid, SAMPLE_PERIOD) {
                        Ok(sampler) => self.sampler = Some(sampler),
                        Err(why) => {
                            self.add(StackSample::missing(format!(
                                "the thread runs native code and cannot be sampled: {why}"
                            )));
                        }
                    }
                }
            }
        }
    }

    /// Adds the stack of the latest sample, if there is a new one.
    fn take_sample(&mut self, reader: &mut StackReader) {
        let pid = self.slice.pid;
        let latest = self.sampler.as_mut().and_then(|sampler| reader.sampled(pid, sampler));
        if let Some(mut sample) = latest {
            let applies = |why: &&String| is_incomplete(why, &sample.frames);
            sample.missing = sample.missing.or(self.interpreter_error.as_ref().filter(applies).cloned());
            self.add(sample);
        }
    }

    /// Counts a stack.
    fn add(&mut self, sample: StackSample) {
        if let Some((_, count)) = self.stacks.iter_mut().find(|(known, _)| known.has_same_functions(&sample))
        {
            *count += 1;
        } else if self.stacks.len() < STACKS_MAX {
            self.stacks.push((sample, 1));
        }
    }

    /// The stack that was read most often. Stacks with frames come first; of a slice that was blocked most of the time,
    /// then those that were read while it was blocked; then complete ones. Among equals it is the stack that appeared
    /// last, when the slice was longest.
    fn most_frequent(&self, was_blocked: bool) -> StackSample {
        let rank = |(sample, count): &&(StackSample, u32)| {
            let is_wrong_state = was_blocked && sample.is_on_cpu;
            (!sample.frames.is_empty(), !is_wrong_state, sample.missing.is_none(), *count)
        };
        let Some((sample, _)) = self.stacks.iter().max_by_key(rank) else { return not_read() };
        if was_blocked { sample.clone().for_blocked_stall() } else { sample.clone() }
    }
}

/// The missing stack of a slice that ended before a stack was read.
fn not_read() -> StackSample {
    StackSample::missing("the slice ended before observer read its stack")
}
