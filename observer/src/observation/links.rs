//! Collects the requests of tracked processes, the finished tasks and the events for traces. The programs make the
//! links between them: see the *deferred* probe.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use observer_common::deferred::Link as RawLink;

use crate::{
    model::{
        deferred::{Deferred, Link},
        histogram::seconds,
        request::Request,
        trace::{Event, EventKind, Events, FinishedTask},
    },
    probes::{deferred, origin},
    read::maps::Maps,
};

/// Maximum number of requests, and of links, that are kept for the report. The oldest are dropped.
const LIMIT: usize = 32_768;

/// The latest requests, and the latest tasks that have ended.
#[derive(Default)]
pub(super) struct Links {
    /// Requests by id.
    requests: HashMap<u64, Arc<Request>>,
    /// Their ids, oldest first.
    order: VecDeque<u64>,
    /// Links of tasks that have ended, oldest first, each with the process and the name of the task's kind.
    links: VecDeque<(u32, Arc<str>, Link)>,
    /// Events for traces; `None` if traces are not exported.
    events: Option<Events>,
}

impl Links {
    /// Reads requests and their answers. Returns the tasks that have ended, to be added once their kinds are named.
    pub(super) fn collect(&mut self, maps: &mut Maps) -> Vec<RawLink> {
        // Requests are read last. The programs emit a request before its answer and its links, so the requests of all
        // answers and links read above are among those read here.
        let (answers, links) = (maps.answers(), maps.links());
        for raw in maps.requests() {
            self.add_request(raw.id, origin::decode(&raw));
        }
        for raw in answers {
            if let Some(request) = self.requests.get(&raw.request) {
                // It may have been emitted with the request as well.
                let _the_same = request.answered.set(raw.answered_ns);
            }
        }
        links
    }

    fn add_request(&mut self, id: u64, request: Request) {
        if self.requests.insert(id, Arc::new(request)).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > LIMIT
            && let Some(oldest) = self.order.pop_front()
        {
            self.requests.remove(&oldest);
        }
    }

    /// The request with this id, if it is known.
    pub(super) fn request(&self, id: u64) -> Option<Arc<Request>> {
        self.requests.get(&id).cloned()
    }

    /// Adds a task that has ended, unless its request is unknown. `task` is the name of its kind.
    pub(super) fn add(&mut self, raw: &RawLink, task: Arc<str>) {
        let pid = raw.class.tgid;
        // A request that could not be emitted was counted as lost.
        let Some(request) = self.request(raw.request) else { return };
        let has_started = raw.started_ns != 0;
        let waited_until = if has_started { raw.started_ns } else { raw.ended_ns };
        let parent = (raw.parent != 0).then_some(raw.parent);
        self.record_event(pid, || {
            let work = FinishedTask {
                id: raw.id,
                parent,
                context: deferred::context(&raw.context),
                request_id: deferred::request_id(raw.request_id),
                task: Arc::clone(&task),
                queued_ns: raw.queued_ns,
                started_ns: has_started.then_some(raw.started_ns),
                ended_ns: raw.ended_ns,
            };
            EventKind::Task(Arc::clone(&request), work)
        });
        let link = Link {
            id: raw.id,
            parent,
            origin: request,
            context: deferred::context(&raw.context),
            request_id: deferred::request_id(raw.request_id),
            queued_ns: raw.queued_ns,
            wait_seconds: seconds(waited_until.saturating_sub(raw.queued_ns)),
            run_seconds: has_started.then(|| seconds(raw.ended_ns.saturating_sub(raw.started_ns))),
        };
        self.links.push_back((pid, task, link));
        if self.links.len() > LIMIT {
            self.links.pop_front();
        }
    }

    /// Adds the links of a process to the metrics of its kinds of tasks.
    pub(super) fn add_to(&self, pid: u32, kinds: &mut [Deferred]) {
        for (_, task, link) in self.links.iter().filter(|(of, ..)| *of == pid) {
            if let Some(kind) = kinds.iter_mut().find(|kind| kind.task == **task) {
                kind.links.push(link.clone());
            }
        }
    }

    /// Removes the links of a process.
    pub(super) fn forget(&mut self, pid: u32) {
        self.links.retain(|(of, ..)| *of != pid);
    }

    /// Records events from now on.
    pub(super) fn trace(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// Removes and returns the events since the last call.
    pub(super) fn take_events(&mut self) -> VecDeque<Event> {
        self.events.as_mut().map(Events::take).unwrap_or_default()
    }

    /// Records an event of a process, if traces are exported.
    pub(super) fn record_event(&mut self, pid: u32, what: impl FnOnce() -> EventKind) {
        if let Some(events) = &mut self.events {
            events.add(Event { pid, what: what() });
        }
    }
}
