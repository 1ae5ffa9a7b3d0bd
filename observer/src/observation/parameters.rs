//! Everything that an observation is started with: which processes, which profiles and waits, the size of the maps, and
//! the stall threshold.

use std::{collections::BTreeSet, num::NonZero, sync::Arc, time::Duration};

use crate::{
    process::{choice::Choice, wait_call::WaitCall},
    profiles::Profile,
    read::capacity::Capacity,
};

/// What to observe, and how.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    /// Process ids.
    pub(crate) pids: BTreeSet<u32>,
    /// Which other processes are observed, and which are not.
    pub(crate) choice: Choice,
    /// Maximum number of runtimes attached to per second, for processes that `choice` selects.
    pub(crate) attach_per_second: NonZero<u32>,
    /// Whether children are observed as well, those that exist and those that are forked later.
    pub(crate) follow: bool,
    /// System calls that count as waits for events.
    pub(crate) calls: Vec<WaitCall>,
    /// Slices of this length and more are stalls.
    pub(crate) stall_threshold: Duration,
    /// Sizes of the programs' maps.
    pub(crate) capacity: Capacity,
    /// Profiles of the runtimes to recognise.
    pub(crate) profiles: Vec<Arc<Profile>>,
    /// Whether processes whose hooks fire too often are detached, as with `--profile auto`.
    pub(crate) is_limited: bool,
}
