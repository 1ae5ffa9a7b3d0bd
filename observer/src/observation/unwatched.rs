//! Targets whose waits for events are not watched, because they wait in calls that the user has not selected. Their lag is
//! unknown, which must not look like good news.

use std::collections::{BTreeMap, BTreeSet};

use super::{round_robin::RoundRobin, targets::Targets};
use crate::process::wait_call::{self, Call, WaitCall};

/// What the main threads of targets without an event loop wait in.
pub(super) struct UnwatchedWaits {
    /// The calls that are watched.
    watched: Vec<WaitCall>,
    /// By process, what is not watched.
    found: BTreeMap<u32, WaitCall>,
    to_check: RoundRobin<u32>,
}

impl UnwatchedWaits {
    pub(super) fn besides(watched: &[WaitCall]) -> Self {
        Self { watched: watched.to_vec(), found: BTreeMap::new(), to_check: RoundRobin::default() }
    }

    /// Checks what some of the targets wait in. `with_loops` are those whose waits are watched. What an exited process
    /// waited in remains known.
    pub(super) fn refresh(&mut self, targets: &Targets, with_loops: &BTreeSet<u32>) {
        self.found.retain(|&pid, _| targets.get(pid).is_some() && !with_loops.contains(&pid));
        for pid in self.to_check.next(targets.live()) {
            if !with_loops.contains(&pid)
                && let Some(Call::Unwatched(call)) = wait_call::call_of(pid, pid, &self.watched)
            {
                self.found.insert(pid, call);
            }
        }
    }

    /// The call that a process waits in unwatched: `poll` or `select`.
    pub(super) fn of(&self, pid: u32) -> Option<&'static str> {
        self.found.get(&pid).map(|call| call.as_str())
    }
}
