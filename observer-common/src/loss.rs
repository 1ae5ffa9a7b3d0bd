//! What the programs could not record, by cause. Nothing is discarded without being counted here.

/// Index into the `LOSSES` map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// `TARGETS` was full: a child of a target, or a candidate, is not observed.
    TargetsFull,
    /// `REACTORS` was full: a thread that waits for events is not observed.
    ReactorsFull,
    /// `LISTENERS` was full: a listener is not observed.
    ListenersFull,
    /// `QUEUED` or `CONNECTING` was full: the wait of a connection is unknown.
    QueuedFull,
    /// `ACCEPTING` or `RING_ACCEPTS` was full: an accept cannot be attributed to its listener.
    AcceptingFull,
    /// The start of an accept call was not observed, or does not identify its listener: the listener is unknown.
    AcceptUnattributed,
    /// `STALLS` was full: a stall is not reported.
    StallsFull,
    /// `GC_BEGUN` was full: the pause of a collection is not counted.
    GcBegunFull,
    /// A runtime's totals could not be read where they had been: the time that a slice spent in collections is unknown.
    GcTotalsUnread,
    /// `CONNECTIONS` was full: the requests of a connection are not followed.
    ConnectionsFull,
    /// `REQUESTS` was full, or a newer request had overwritten this one: its content is unknown.
    RequestsFull,
    /// Requests of one connection overlapped: it is unknown which one is worked on.
    RequestsOverlap,
    /// `WORK` was full: the tasks that a thread enqueues have no origin.
    WorkFull,
    /// `TASKS` was full: a task is not followed.
    TasksFull,
    /// `LINKS` was full: the link of a task that has ended is not reported.
    LinksFull,
    /// `CLASSES` was full: a kind of task is counted together with others.
    ClassesFull,
    /// `ANSWERS` was full: it is unknown when a request was answered.
    AnswersFull,
}

/// Number of causes: the size of the `LOSSES` map.
pub const LOSSES: u32 = 17;

impl Loss {
    /// Every cause, in index order, with its name in metrics and reports.
    pub const ALL: [(Self, &'static str); LOSSES as usize] = [
        (Self::TargetsFull, "targets_full"),
        (Self::ReactorsFull, "reactors_full"),
        (Self::ListenersFull, "listeners_full"),
        (Self::QueuedFull, "queued_full"),
        (Self::AcceptingFull, "accepting_full"),
        (Self::AcceptUnattributed, "accept_unattributed"),
        (Self::StallsFull, "stalls_full"),
        (Self::GcBegunFull, "gc_begun_full"),
        (Self::GcTotalsUnread, "gc_totals_unread"),
        (Self::ConnectionsFull, "connections_full"),
        (Self::RequestsFull, "requests_full"),
        (Self::RequestsOverlap, "requests_overlap"),
        (Self::WorkFull, "work_full"),
        (Self::TasksFull, "units_full"),
        (Self::LinksFull, "links_full"),
        (Self::ClassesFull, "classes_full"),
        (Self::AnswersFull, "answers_full"),
    ];
}
