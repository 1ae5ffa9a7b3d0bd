//! Events for traces: deferred tasks that have ended, with their origins, and stalls, with or without an origin.

use std::{collections::VecDeque, mem, sync::Arc};

use super::{
    deferred::TraceContext,
    delivery::{DropReason, ExportStats},
    request::Request,
    stall::Stall,
};

/// Maximum number of events that wait to be taken.
const EVENTS: usize = 32_768;

/// An event of a process.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Process id.
    pub(crate) pid: u32,
    /// What has happened.
    pub(crate) what: EventKind,
}

/// Kinds of events.
#[derive(Clone, Debug)]
pub(crate) enum EventKind {
    /// A deferred task with this request as its origin has ended.
    Task(Arc<Request>, FinishedTask),
    /// An event loop stalled.
    Stall {
        /// Id of the loop in its process.
        reactor: Arc<str>,
        /// The thread.
        tid: u32,
        /// Start of the slice, in monotonic nanoseconds.
        start_ns: u64,
        stall: Box<Stall>,
    },
}

/// A deferred task that has ended. Times are monotonic nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct FinishedTask {
    /// Id of the task.
    pub(crate) id: u64,
    /// Id of the task that enqueued it; `None` if the request itself did.
    pub(crate) parent: Option<u64>,
    /// The span that it was enqueued in, if the process published it.
    pub(crate) context: Option<TraceContext>,
    /// The runtime's own id of the request.
    pub(crate) request_id: Option<String>,
    /// Name of the kind of task.
    pub(crate) task: Arc<str>,
    /// Time of the enqueue.
    pub(crate) queued_ns: u64,
    /// Time of the start; `None` if it never started.
    pub(crate) started_ns: Option<u64>,
    /// Time at which it last ran or, if it never started, was dropped.
    pub(crate) ended_ns: u64,
}

/// Events that were not taken yet.
#[derive(Debug)]
pub(crate) struct Events {
    waiting: VecDeque<Event>,
    stats: Arc<ExportStats>,
}

impl Events {
    /// No events yet. Events that exceed the limit are counted in `stats`.
    pub(crate) fn counted_in(stats: Arc<ExportStats>) -> Self {
        Self { waiting: VecDeque::new(), stats }
    }

    /// Adds an event. At the limit the new event is dropped, because earlier ones may be its cause.
    pub(crate) fn add(&mut self, event: Event) {
        if self.waiting.len() < EVENTS {
            self.waiting.push_back(event);
        } else {
            self.stats.dropped(DropReason::BufferFull, 1);
        }
    }

    /// Removes and returns all events.
    pub(crate) fn take(&mut self) -> VecDeque<Event> {
        mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_beyond_the_limit_are_counted() {
        let stats = Arc::new(ExportStats::of("traces"));
        let mut events = Events::counted_in(Arc::clone(&stats));
        let work = FinishedTask {
            id: 1,
            parent: None,
            context: None,
            request_id: None,
            task: "task".into(),
            queued_ns: 1,
            started_ns: Some(2),
            ended_ns: 3,
        };
        for _ in 0..EVENTS + 3 {
            let what = EventKind::Task(Arc::default(), work.clone());
            events.add(Event { pid: 1, what });
        }
        assert_eq!(events.take().len(), EVENTS);
        assert_eq!(stats.read().dropped[0].count, 3);
        assert!(events.take().is_empty());
    }
}
