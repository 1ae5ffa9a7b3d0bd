//! What the programs could not keep, by cause: nothing is dropped without being counted here.

/// Index into the `LOSSES` map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// A forked child of a target found no room in `TARGETS`.
    TargetsFull,
    /// A thread that waits for events found no room in `REACTORS`.
    ReactorsFull,
    /// A listener found no room in `LISTENERS`.
    ListenersFull,
    /// A queued connection found no room in `QUEUED`: its wait will be unknown.
    QueuedFull,
    /// A thread that entered accept found no room in `ACCEPTING`: its accept cannot be attributed.
    AcceptingFull,
    /// A connection was accepted by a call whose entry nobody saw: its listener is unknown.
    AcceptUnattributed,
    /// A stall found no room in `STALLS`.
    StallsFull,
    /// A thread that began a collection found no room in `GC_BEGUN`: its pause is not counted.
    GcBegunFull,
    /// A runtime's totals were not where they had been: what a slice spent in collections is not known.
    GcTotalsUnread,
    /// A connection that a target accepted found no room in `CONNECTIONS`: its requests are nobody's.
    ConnectionsFull,
    /// A request found no room in `REQUESTS`, or a newer one had its place: what it asked for is not known.
    RequestsFull,
    /// Requests of one connection overlapped: which of them is worked on is not known.
    RequestsOverlap,
    /// A thread that began to work for something found no room in `WORK`: what it puts off is nobody's.
    WorkFull,
    /// A piece of deferred work found no room in `TASKS`: it is not seen to start.
    TasksFull,
    /// A piece of deferred work that was over found no room in `LINKS`.
    LinksFull,
    /// A kind of deferred work found no room in `CLASSES`: it is counted with others.
    ClassesFull,
    /// A request's answer found no room in `ANSWERS`: when it was answered is not known.
    AnswersFull,
    /// A thread was gone and its id another's before the loader came for its figures.
    ReactorsReplaced,
}

/// Number of causes, the size of the `LOSSES` map.
pub const LOSSES: u32 = 18;

impl Loss {
    /// Every cause, in index order, with the name used in metrics and reports.
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
        (Self::ReactorsReplaced, "reactors_replaced"),
    ];
}
