//! What is handed on to whoever traces: work that is over and stalls, with the requests they are due to. Stalls are told
//! without one as well.

use std::{collections::VecDeque, mem, sync::Arc};

use super::{
    deferred::TraceContext,
    delivery::{ExportStats, Reason},
    request::Request,
    stall::Stall,
};

/// Most events that wait to be fetched.
const EVENTS: usize = 32_768;

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Process.
    pub(crate) pid: u32,
    /// What happened.
    pub(crate) what: What,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A piece of deferred work is over that was put off for this request.
    Work(Arc<Request>, Work),
    /// A thread stalled: since when, monotonic nanoseconds, and all else that is known.
    Stall(u32, u64, Box<Stall>),
}

/// A piece of deferred work that is over; times are monotonic nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// Its number.
    pub(crate) id: u64,
    /// The number of the piece that put it off, `None` if the request itself did.
    pub(crate) parent: Option<u64>,
    /// The span that the process itself says it was put off in.
    pub(crate) context: Option<TraceContext>,
    /// What the runtime itself calls the request.
    pub(crate) request_id: Option<String>,
    /// What its kind is called.
    pub(crate) task: Arc<str>,
    /// When it was put off.
    pub(crate) queued_ns: u64,
    /// When it started; `None` if it never did.
    pub(crate) started_ns: Option<u64>,
    /// When it was worked on for the last time or, if it never started, forgotten.
    pub(crate) ended_ns: u64,
}

/// Events that have not been fetched.
#[derive(Debug)]
pub(crate) struct Events {
    waiting: VecDeque<Event>,
    stats: Arc<ExportStats>,
}

impl Events {
    /// None yet. What finds no room will be counted there.
    pub(crate) fn counted_in(stats: Arc<ExportStats>) -> Self {
        Self { waiting: VecDeque::new(), stats }
    }

    /// Adds one. If there is no room it is dropped: those before it may be what it is due to.
    pub(crate) fn add(&mut self, event: Event) {
        if self.waiting.len() < EVENTS {
            self.waiting.push_back(event);
        } else {
            self.stats.dropped(Reason::BufferFull, 1);
        }
    }

    /// All of them.
    pub(crate) fn take(&mut self) -> VecDeque<Event> {
        mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_counted() {
        let stats = Arc::new(ExportStats::of("traces"));
        let mut events = Events::counted_in(Arc::clone(&stats));
        let work = Work {
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
            let what = What::Work(Arc::default(), work.clone());
            events.add(Event { pid: 1, what });
        }
        assert_eq!(events.take().len(), EVENTS);
        assert_eq!(stats.read().dropped[0].count, 3);
        assert!(events.take().is_empty());
    }
}
