//! *deferred*: work that targets put off, followed to where it is done. Attached to one process at a time, at the places
//! that the profile of its runtime names.

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
        Link as RawLink, Place, REQUEST_ID, TaskKey, ThreadLocal, Verb,
    },
    histogram::Histogram as RawHistogram,
};

use super::{
    attach::{Types, attach},
    origin,
    probe::{Events, Hook, Probe, When},
};
use crate::{
    kernel::{
        clock,
        uprobe::{self, Site, Uprobe},
    },
    model::{
        deferred::{Deferred, HookFigures, TraceContext},
        histogram::{Histogram, seconds},
    },
    process::hooks::Found,
    read::maps::Maps,
    stacks::mappings::FileId,
};

const PROGRAM: &str = "deferred";

pub(super) const PROBE: Probe = Probe {
    name: "deferred",
    purpose: "work that is put off: how much, how long it waits and runs, and which request it is due to",
    since: "5.10",
    when: When::Deferring,
    cost: "a trap into the kernel, about 2 us (700 ns of it in the program), each time a target comes to a place that its runtime's profile names, 8 to 10 times for a small request; nobody else pays",
    hooks: &[Hook {
        program: PROGRAM,
        events: Events::Runtime("the places that the profile of a target's runtime names"),
    }],
};

/// Loads the programs, and attaches those that do not wait for a runtime.
pub(crate) fn load(ebpf: &mut Ebpf) -> Result<()> {
    uprobe::probe().map_err(|why| anyhow!(why))?;
    attach(ebpf, &Types::default(), [&origin::PROBE, &PROBE].into_iter(), &[])?;
    Ok(())
}

/// What hooks take from one another.
#[derive(Default)]
pub(crate) struct Shared {
    /// Numbers of extractors that nobody uses.
    extractors: Vec<u32>,
    /// Probes, by process, file and place in it: one stands in all copies of the file that the process has loaded.
    probes: HashMap<(u32, FileId, u64), Weak<Uprobe>>,
}

impl Shared {
    /// None of these is used yet.
    pub(crate) fn with_extractors(count: u32) -> Self {
        Self { extractors: (0..count).rev().collect(), probes: HashMap::new() }
    }

    /// Forgets the probes of a process that are gone.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.probes.retain(|(of, ..), probe| *of != pid || probe.strong_count() > 0);
    }

    /// The probe at a place in a file, attached unless it is already.
    fn probe(
        &mut self,
        program: BorrowedFd<'_>,
        found: &Found<'_>,
        offset: u64,
        pid: u32,
    ) -> Result<Arc<Uprobe>> {
        let standing = self.probes.entry((pid, found.file, offset)).or_default();
        if let Some(probe) = standing.upgrade() {
            return Ok(probe);
        }
        let site = Site { instruction: offset, counter: 0 };
        let probe = Arc::new(Uprobe::attach(program, &found.image.file, site, pid)?);
        *standing = Arc::downgrade(&probe);
        Ok(probe)
    }
}

/// A hook of a profile in a process. Dropping it detaches it.
pub(crate) struct Attached {
    profile: String,
    verb: Verb,
    verb_name: &'static str,
    name: String,
    extractors: Vec<u32>,
    places: Vec<Place>,
    /// They stay attached while these are kept.
    probes: Vec<Arc<Uprobe>>,
}

impl Attached {
    /// Attaches to all places of a hook. `space` is that of its keys.
    pub(crate) fn to(
        ebpf: &Ebpf,
        maps: &mut Maps,
        shared: &mut Shared,
        pid: u32,
        profile: &str,
        found: &Found<'_>,
        space: u32,
    ) -> Result<Self> {
        let program: &UProbe = ebpf.program(PROGRAM).context("no such program")?.try_into()?;
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
        // One for each register that an answer is in.
        let mut by_result = HashMap::new();
        let outcome = found.points.iter().try_for_each(|at| {
            let extractor = match by_result.entry(at.result) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(place) => {
                    let extractor = shared.extractors.pop().context("there are too many hooks already")?;
                    attached.extractors.push(extractor);
                    maps.extractors.set(extractor, at.extractor(&found.extractor), 0)?;
                    *place.insert(extractor)
                }
            };
            let entry = RawHook { verb: hook.verb as u32, space, flags, extractor, hits: 0, matches: 0 };
            let place = Place { address: at.address, tgid: pid, reserved: 0 };
            if maps.hooks.get(&place, 0).is_ok() {
                bail!("two hooks meet at one place");
            }
            maps.hooks.insert(place, entry, 0).context("there are too many hooks already")?;
            attached.places.push(place);
            let probe = shared.probe(program, found, at.offset, pid);
            attached.probes.push(probe.context("the kernel does not attach to it")?);
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

    /// From now on, what is put off here is put off with the trace context that a pointer leads to.
    pub(crate) fn take_context(&self, maps: &mut Maps, pointer: ThreadLocal) -> Result<()> {
        for &number in &self.extractors {
            let extractor = maps.extractors.get(&number, 0)?;
            maps.extractors.set(number, Extractor { context: pointer, ..extractor }, 0)?;
        }
        Ok(())
    }

    /// Whether work is put off here.
    pub(crate) fn is_snapshot(&self) -> bool {
        self.verb == Verb::Snapshot
    }

    /// Takes it out of the kernel, and what the programs know of it.
    pub(crate) fn detach(self, maps: &mut Maps, shared: &mut Shared) {
        for place in &self.places {
            let _present = maps.hooks.remove(place);
        }
        shared.extractors.extend(self.extractors);
        drop(self.probes);
        shared.probes.retain(|_, probe| probe.strong_count() > 0);
    }

    /// How often the process came there, and how often that meant something.
    pub(crate) fn figures(&self, maps: &Maps) -> HookFigures {
        let (mut hits, mut matches) = (0, 0);
        for hook in self.places.iter().filter_map(|place| maps.hooks.get(place, 0).ok()) {
            hits += hook.hits;
            matches += hook.matches;
        }
        HookFigures {
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

    /// Whether work goes on here.
    pub(crate) fn is_restore(&self) -> bool {
        self.verb == Verb::Restore
    }
}

/// Figures of a kind of work, of which the oldest piece that waits was put off at `oldest_ns`.
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

/// Adds what was counted of a kind of work under another key.
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

/// What becomes of a piece of work whose process is gone at `now`: what had not started never will.
pub(crate) fn orphan(task: &DeferredTask, now: u64) -> Option<RawLink> {
    is_ahead(task).then_some(RawLink {
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

/// What a runtime calls a request: text without blanks, and whole. Anything else is something else.
pub(crate) fn request_id(raw: [u8; REQUEST_ID]) -> Option<String> {
    let length =
        raw.iter().position(|&byte| byte == 0).filter(|length| (1..REQUEST_ID - 1).contains(length))?;
    let text = raw[..length].iter().all(u8::is_ascii_graphic).then(|| raw[..length].to_vec())?;
    String::from_utf8(text).ok()
}

/// What a process published, if it published anything.
pub(crate) fn context(raw: &RawContext) -> Option<TraceContext> {
    let [high, low] = raw.trace_id.map(u64::from_be);
    (high | low != 0).then(|| TraceContext {
        trace_id: format!("{high:016x}{low:016x}"),
        span_id: format!("{:016x}", u64::from_be(raw.span_id)),
    })
}

/// The class of those that find no room.
pub(crate) const fn others(pid: u32) -> ClassKey {
    ClassKey { value: 0, tgid: pid, naming: ClassKey::OTHERS }
}

/// Whether a piece of work waits to be started.
pub(crate) fn waits((key, task): &(TaskKey, DeferredTask), pid: u32) -> bool {
    key.tgid == pid && is_ahead(task)
}

/// Whether this is a piece of work of its own that has not started.
const fn is_ahead(task: &DeferredTask) -> bool {
    task.started_ns == 0 && task.class.naming != ClassKey::SAME_WORK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_whole_visible_text_or_none() {
        let told = |text: &[u8]| {
            let mut raw = [0; REQUEST_ID];
            raw[..text.len()].copy_from_slice(text);
            request_id(raw)
        };
        assert_eq!(told(b"0a1b").as_deref(), Some("0a1b"));
        // What comes after the end is of something else.
        assert_eq!(told(b"0a1b\0more").as_deref(), Some("0a1b"));
        assert_eq!(told(&[b'a'; REQUEST_ID - 2]).map(|id| id.len()), Some(46));
        for wrong in
            [&b""[..], b"a b", b"a\x01", "\u{e4}".as_bytes(), &[b'a'; REQUEST_ID - 1], &[b'a'; REQUEST_ID]]
        {
            assert_eq!(told(wrong), None, "{wrong:?}");
        }
    }
}
