//! *deferred*: deferred tasks of targets, from enqueue to drop. Attached per process, to the functions that the profile
//! of its runtime names.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Arc, Weak},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{Ebpf, programs::UProbe};
use observer_common::{
    deferred::{
        Class as RawClass, ClassKey, Context as RawContext, DeferredTask, Extractor, Hook as RawHook,
        HookAddress, Link as RawLink, REQUEST_ID, TaskKey, ThreadLocal, Verb,
    },
    histogram::Histogram as RawHistogram,
};

use super::{
    attach::{Types, attach},
    origin,
    probe::{Events, Hook, Probe, When},
};
use crate::{
    binary::mappings::FileId,
    kernel::{
        clock,
        uprobe::{self, Site, Uprobe},
    },
    model::{
        deferred::{Deferred, HookCounters, TraceContext},
        histogram::{Histogram, seconds},
    },
    process::hooks::Found,
    read::maps::Maps,
};

const PROGRAM: &str = "deferred";

pub(super) const PROBE: Probe = Probe {
    name: "deferred",
    purpose: "deferred tasks: how many, how long they wait and run, and which request each comes from",
    since: "5.10",
    when: When::Deferring,
    cost: "a trap into the kernel, about 2 us (700 ns of it in the program), each time a target reaches a hook of its runtime's profile, 8 to 10 times for a small request; no cost for other processes",
    hooks: &[Hook {
        program: PROGRAM,
        events: Events::Runtime("the functions that the profile of a target's runtime names"),
    }],
};

/// Loads the programs, and attaches those that do not depend on a runtime.
pub(crate) fn load(ebpf: &mut Ebpf) -> Result<()> {
    uprobe::probe().map_err(|why| anyhow!(why))?;
    attach(ebpf, &Types::default(), [&origin::PROBE, &PROBE].into_iter(), &[])?;
    Ok(())
}

/// State shared by all hooks.
#[derive(Default)]
pub(crate) struct Shared {
    /// Free indices of `EXTRACTORS`.
    extractors: Vec<u32>,
    /// Uprobes by process, file and offset. One uprobe covers all copies of the file that the process has loaded.
    probes: HashMap<(u32, FileId, u64), Weak<Uprobe>>,
}

impl Shared {
    /// All of these extractors are free.
    pub(crate) fn with_extractors(count: u32) -> Self {
        Self { extractors: (0..count).rev().collect(), probes: HashMap::new() }
    }

    /// Removes the detached uprobes of a process.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.probes.retain(|(of, ..), probe| *of != pid || probe.strong_count() > 0);
    }

    /// Returns the uprobe at an offset in a file; attaches it if there is none yet.
    fn probe(
        &mut self,
        program: BorrowedFd<'_>,
        found: &Found<'_>,
        offset: u64,
        pid: u32,
    ) -> Result<Arc<Uprobe>> {
        let entry = self.probes.entry((pid, found.file, offset)).or_default();
        if let Some(probe) = entry.upgrade() {
            return Ok(probe);
        }
        let site = Site { instruction: offset, counter: 0 };
        let probe = Arc::new(Uprobe::attach(program, &found.image.file, site, pid)?);
        *entry = Arc::downgrade(&probe);
        Ok(probe)
    }
}

/// A hook of a profile that is attached to a process. Dropping it detaches it.
pub(crate) struct Attached {
    profile: String,
    verb: Verb,
    verb_name: &'static str,
    name: String,
    extractors: Vec<u32>,
    places: Vec<HookAddress>,
    /// Kept so that they stay attached.
    probes: Vec<Arc<Uprobe>>,
}

impl Attached {
    /// Attaches to all attach points of a hook. `space` is the key space of the hook. Detaches all of them on failure.
    pub(crate) fn to(
        ebpf: &Ebpf,
        maps: &mut Maps,
        shared: &mut Shared,
        pid: u32,
        profile: &str,
        found: &Found<'_>,
        space: u32,
    ) -> Result<Self> {
        let program = ebpf.program(PROGRAM).context("the eBPF object has no program deferred")?;
        let program: &UProbe = program.try_into()?;
        let program = program.fd()?.as_fd();
        let hook = found.hook;
        let once = if hook.once { RawHook::ONCE } else { 0 };
        let flags = once | if hook.takes_over { RawHook::TAKES_OVER } else { 0 };
        let mut attached = Self {
            profile: profile.to_owned(),
            verb: hook.verb,
            verb_name: hook.verb_name(),
            name: found.name.clone(),
            extractors: Vec::new(),
            places: Vec::new(),
            probes: Vec::new(),
        };
        // One extractor for each register that a return value is in.
        let mut by_result = HashMap::new();
        let outcome = found.points.iter().try_for_each(|point| {
            let extractor = match by_result.entry(point.result) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(vacant) => {
                    let extractor = shared.extractors.pop().context("too many hooks (see --capacity)")?;
                    attached.extractors.push(extractor);
                    maps.extractors.set(extractor, point.extractor(&found.extractor), 0)?;
                    *vacant.insert(extractor)
                }
            };
            let entry = RawHook { verb: hook.verb as u32, space, flags, extractor, hits: 0, matches: 0 };
            let place = HookAddress { address: point.address, tgid: pid, reserved: 0 };
            if maps.hooks.get(&place, 0).is_ok() {
                bail!("another hook is attached to the same instruction");
            }
            maps.hooks.insert(place, entry, 0).context("too many hooks (see --capacity)")?;
            attached.places.push(place);
            let probe = shared.probe(program, found, point.offset, pid);
            attached.probes.push(probe.context("the kernel refuses to attach the uprobe")?);
            Ok(())
        });
        match outcome {
            Ok(()) => Ok(attached),
            Err(error) => {
                attached.detach(maps, shared);
                Err(error)
            }
        }
    }

    /// From now on, tasks enqueued here also take the trace context that `pointer` locates.
    pub(crate) fn attach_context(&self, maps: &mut Maps, pointer: ThreadLocal) -> Result<()> {
        for &number in &self.extractors {
            let extractor = maps.extractors.get(&number, 0)?;
            maps.extractors.set(number, Extractor { context: pointer, ..extractor }, 0)?;
        }
        Ok(())
    }

    /// Whether the hook enqueues tasks.
    pub(crate) fn is_snapshot(&self) -> bool {
        self.verb == Verb::Snapshot
    }

    /// Detaches the hook and removes its map entries.
    pub(crate) fn detach(self, maps: &mut Maps, shared: &mut Shared) {
        for place in &self.places {
            let _present = maps.hooks.remove(place);
        }
        shared.extractors.extend(self.extractors);
        drop(self.probes);
        shared.probes.retain(|_, probe| probe.strong_count() > 0);
    }

    /// How often the hook fired, and how often it matched.
    pub(crate) fn figures(&self, maps: &Maps) -> HookCounters {
        let (mut hits, mut matches) = (0, 0);
        for hook in self.places.iter().filter_map(|place| maps.hooks.get(place, 0).ok()) {
            hits += hook.hits;
            matches += hook.matches;
        }
        HookCounters {
            profile: self.profile.clone(),
            verb: self.verb_name,
            place: self.name.clone(),
            hits,
            matches,
        }
    }

    /// Name of the profile.
    pub(crate) fn profile(&self) -> &str {
        &self.profile
    }

    /// Whether the hook starts or resumes tasks.
    pub(crate) fn is_restore(&self) -> bool {
        self.verb == Verb::Restore
    }
}

/// Decodes the metrics of a kind of task, whose oldest pending task was enqueued at `oldest_ns`.
pub(crate) fn decode(task: &str, is_kind_known: bool, raw: &RawClass, oldest_ns: Option<u64>) -> Deferred {
    let now = clock::monotonic_ns();
    Deferred {
        task: task.to_owned(),
        is_kind_known,
        enqueued: raw.enqueued,
        started: raw.started,
        finished: raw.finished,
        orphaned: raw.orphaned,
        pending: raw.pending,
        oldest_seconds: oldest_ns.map(|queued| seconds(now.saturating_sub(queued))),
        wait: Histogram::from(&raw.wait),
        run: Histogram::from(&raw.run),
        links: Vec::new(),
    }
}

/// Adds the counters of the same kind under another key.
pub(crate) fn add(sum: &mut RawClass, more: &RawClass) {
    sum.enqueued += more.enqueued;
    sum.started += more.started;
    sum.finished += more.finished;
    sum.orphaned += more.orphaned;
    sum.pending = sum.pending.wrapping_add(more.pending);
    add_durations(&mut sum.wait, &more.wait);
    add_durations(&mut sum.run, &more.run);
}

fn add_durations(sum: &mut RawHistogram, more: &RawHistogram) {
    for (sum, more) in sum.buckets.iter_mut().zip(&more.buckets) {
        sum.count += more.count;
        sum.sum_ns += more.sum_ns;
    }
    sum.max_ns = sum.max_ns.max(more.max_ns);
    sum.min_ns = match (sum.min_ns, more.min_ns) {
        (0, min) | (min, 0) => min,
        (one, other) => one.min(other),
    };
}

/// The link of a task whose process is gone as of `now`, if the task had not started: it was dropped.
pub(crate) fn orphan(task: &DeferredTask, now: u64) -> Option<RawLink> {
    is_pending(task).then_some(RawLink {
        id: task.id,
        parent: task.parent,
        request: task.origin.request,
        class: task.class,
        queued_ns: task.queued_ns,
        started_ns: 0,
        ended_ns: now,
        context: task.context,
        request_id: task.request_id,
    })
}

/// The runtime's id of a request: complete text of visible ASCII characters. Anything else is not an id.
pub(crate) fn request_id(raw: [u8; REQUEST_ID]) -> Option<String> {
    let length =
        raw.iter().position(|&byte| byte == 0).filter(|length| (1..REQUEST_ID - 1).contains(length))?;
    let text = raw[..length].iter().all(u8::is_ascii_graphic).then(|| raw[..length].to_vec())?;
    String::from_utf8(text).ok()
}

/// The trace context that the process published, if any.
pub(crate) fn context(raw: &RawContext) -> Option<TraceContext> {
    let [high, low] = raw.trace_id.map(u64::from_be);
    (high | low != 0).then(|| TraceContext {
        trace_id: format!("{high:016x}{low:016x}"),
        span_id: format!("{:016x}", u64::from_be(raw.span_id)),
    })
}

/// The class that counts tasks of all kinds for which the map has no space.
pub(crate) const fn others(pid: u32) -> ClassKey {
    ClassKey { value: 0, tgid: pid, naming: ClassKey::OTHERS }
}

/// Whether a task of this process is waiting to start.
pub(crate) fn waits((key, task): &(TaskKey, DeferredTask), pid: u32) -> bool {
    key.tgid == pid && is_pending(task)
}

/// Whether the task has not started. Entries in which the enqueuing task itself continues do not count.
const fn is_pending(task: &DeferredTask) -> bool {
    task.started_ns == 0 && task.class.naming != ClassKey::SAME_WORK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_complete_visible_text() {
        let parsed = |text: &[u8]| {
            let mut raw = [0; REQUEST_ID];
            raw[..text.len()].copy_from_slice(text);
            request_id(raw)
        };
        assert_eq!(parsed(b"0a1b").as_deref(), Some("0a1b"));
        // Bytes behind the terminator are ignored.
        assert_eq!(parsed(b"0a1b\0more").as_deref(), Some("0a1b"));
        assert_eq!(parsed(&[b'a'; REQUEST_ID - 2]).map(|id| id.len()), Some(46));
        for wrong in
            [&b""[..], b"a b", b"a\x01", "\u{e4}".as_bytes(), &[b'a'; REQUEST_ID - 1], &[b'a'; REQUEST_ID]]
        {
            assert_eq!(parsed(wrong), None, "{wrong:?}");
        }
    }
}
