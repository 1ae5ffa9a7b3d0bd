//! Looks at slices that have begun to take long, while they last: by the time a stall is over, its culprit has left
//! the stack. A thread is looked at again and again, and what was seen most often is what the stall is put down to.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{
    now::{StackReader, ThreadState},
    sampler::Sampler,
};
use crate::{model::frame::Look, read::reactors::InSlice};

/// Share of a threshold after which a slice is suspected, as (numerator, denominator): early enough for a look before
/// the threshold, late enough to leave ordinary slices alone.
const SUSPICION: (u64, u64) = (3, 5);
/// How often in a threshold the slices are looked at: often enough for a glance between suspicion and threshold.
const GLANCES: u32 = 3;
/// Bounds of the time between two glances.
const FASTEST: Duration = Duration::from_millis(2);
const SLOWEST: Duration = Duration::from_millis(250);
/// A look may cost a share of one in so many of the time it is about: observer itself must not become the stall.
const THRIFT: u32 = 20;
/// Looks at a longer slice become rarer: each comes when its age has grown by one in so many since the last.
const AGEING: u64 = 8;
/// Different stacks kept of one slice.
const STACKS_LIMIT: usize = 16;
/// How often a thread that computes is interrupted while it is watched.
const SAMPLING: Duration = Duration::from_millis(1);

/// Watches the slices of all reactors.
pub(crate) struct Watcher {
    reader: StackReader,
    /// By thread.
    slow_slices: HashMap<u32, SlowSlice>,
    suspicion_ns: u64,
    period: Duration,
}

/// A slice that takes long.
struct SlowSlice {
    slice: InSlice,
    /// What was seen, and how often.
    stacks: Vec<(Look, u32)>,
    /// Under the clock, if it computes in native code.
    sampler: Option<Sampler>,
    /// Why the clock sees native functions alone, if the process has others.
    why_native: Option<String>,
    /// When to look again, monotonic nanoseconds.
    next_ns: u64,
    /// Whether it has ended, and word of that may still come.
    is_over: bool,
}

impl Watcher {
    /// For stalls of this length and more.
    pub(crate) fn new(threshold: Duration) -> Self {
        let threshold_ns = u64::try_from(threshold.as_nanos()).unwrap_or(u64::MAX);
        Self {
            reader: StackReader::default(),
            slow_slices: HashMap::new(),
            suspicion_ns: threshold_ns / SUSPICION.1 * SUSPICION.0,
            period: (threshold / GLANCES).clamp(FASTEST, SLOWEST),
        }
    }

    /// How often to [`glance`](Self::glance).
    pub(crate) const fn period(&self) -> Duration {
        self.period
    }

    /// Goes over the slices in progress, and looks at those that take long. `is_still` says whether one goes on: what is read of a
    /// thread after its slice has ended is of what came next.
    pub(crate) fn glance(
        &mut self,
        in_progress: impl Iterator<Item = InSlice>,
        now_ns: u64,
        is_still: impl Fn(&InSlice) -> bool,
    ) {
        // Of those that had ended before, word has come or never will.
        self.slow_slices.retain(|_, slow| !std::mem::replace(&mut slow.is_over, true));
        for slice in in_progress {
            if now_ns.saturating_sub(slice.since_ns) < self.suspicion_ns {
                continue;
            }
            let slow = self.slow_slices.entry(slice.tid).or_insert_with(|| SlowSlice::of(slice));
            if !slow.slice.is(&slice) {
                // The one before has ended unnoticed, and was too short if nobody has asked for it.
                *slow = SlowSlice::of(slice);
            }
            slow.slice = slice;
            slow.is_over = false;
            if now_ns >= slow.next_ns {
                let began = Instant::now();
                slow.look(&mut self.reader, &is_still);
                if slow.stacks.is_empty() {
                    // It ran, in native code: next time it may stand still, or the clock have seen it.
                    continue;
                }
                let pause = began.elapsed() * THRIFT;
                let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
                slow.next_ns = now_ns + pause_ns.max((now_ns - slice.since_ns) / AGEING);
            }
        }
    }

    /// What was seen most often of a slice that has ended, and that was blocked most of the time or not.
    pub(crate) fn seen(&mut self, tid: u32, since_ns: u64, was_blocked: bool) -> Look {
        match self.slow_slices.remove(&tid) {
            Some(mut slow) if slow.slice.since_ns == since_ns => {
                slow.fetch(&mut self.reader);
                slow.most(was_blocked)
            }
            Some(other) => {
                self.slow_slices.insert(tid, other);
                nobody_looked()
            }
            None => nobody_looked(),
        }
    }

    /// Looks at a slice that goes on, if nobody has yet.
    pub(crate) fn ensure_seen(&mut self, slice: InSlice, is_still: impl Fn(&InSlice) -> bool) {
        let slow = self.slow_slices.entry(slice.tid).or_insert_with(|| SlowSlice::of(slice));
        if !slow.slice.is(&slice) {
            *slow = SlowSlice::of(slice);
        }
        if slow.stacks.is_empty() {
            slow.look(&mut self.reader, &is_still);
        }
        slow.fetch(&mut self.reader);
    }

    /// What was seen most often of a slice that goes on.
    pub(crate) fn seen_so_far(&self, slice: InSlice, was_blocked: bool) -> Look {
        let slow = self.slow_slices.get(&slice.tid).filter(|slow| slow.slice.is(&slice));
        slow.map_or_else(|| Look::missing("its stack has not been read yet"), |slow| slow.most(was_blocked))
    }
}

impl SlowSlice {
    const fn of(slice: InSlice) -> Self {
        Self { slice, stacks: Vec::new(), sampler: None, why_native: None, next_ns: 0, is_over: false }
    }

    fn look(&mut self, reader: &mut StackReader, is_still: &impl Fn(&InSlice) -> bool) {
        self.fetch(reader);
        let tid = self.slice.tid;
        match reader.look(self.slice) {
            ThreadState::Stack(look) if is_still(&self.slice) => self.add(look),
            ThreadState::Stack(_) => {}
            ThreadState::Running(why_native) => {
                self.why_native = why_native;
                if self.sampler.is_none() {
                    match Sampler::of(tid, SAMPLING) {
                        Ok(sampler) => self.sampler = Some(sampler),
                        Err(why) => {
                            self.add(Look::missing(format!("it computes, and cannot be interrupted: {why}")));
                        }
                    }
                }
            }
        }
    }

    /// Takes what the clock has seen meanwhile.
    fn fetch(&mut self, reader: &mut StackReader) {
        let pid = self.slice.pid;
        let latest = self.sampler.as_mut().and_then(|sampler| reader.sampled(pid, sampler));
        if let Some(mut look) = latest {
            look.missing = look.missing.or_else(|| self.why_native.clone());
            self.add(look);
        }
    }

    fn add(&mut self, look: Look) {
        if let Some((_, count)) = self.stacks.iter_mut().find(|(known, _)| known.is_alike(&look)) {
            *count += 1;
        } else if self.stacks.len() < STACKS_LIMIT {
            self.stacks.push((look, 1));
        }
    }

    /// What was seen most often; of equals the latest, for a slice is at its longest in the end. What is whole comes
    /// before what is not, and of one that was blocked, what was seen while it was.
    fn most(&self, was_blocked: bool) -> Look {
        let rank = |(look, count): &&(Look, u32)| {
            let is_of_rest = was_blocked && look.is_on_cpu;
            (!look.frames.is_empty(), !is_of_rest, look.missing.is_none(), *count)
        };
        let Some((look, _)) = self.stacks.iter().max_by_key(rank) else { return nobody_looked() };
        if was_blocked { look.clone().of_blocked() } else { look.clone() }
    }
}

fn nobody_looked() -> Look {
    Look::missing("it was over before observer could look")
}
