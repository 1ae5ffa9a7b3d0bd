//! Selects targets by the criteria of `criteria.rs` (name, executable, port, cgroup), besides those given by process id:
//! inclusion, and exclusion, which takes precedence.

use std::collections::BTreeSet;

use super::{criteria::Criteria, info::is_there};

/// Criteria for inclusion and exclusion. A process that meets both is not observed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// A process that meets any of these is observed,
    pub(crate) include: Criteria,
    /// unless it meets any of these. Children of targets that meet these are not observed either.
    pub(crate) exclude: Criteria,
    /// Whether a later configuration may set criteria.
    pub(crate) may_change: bool,
}

impl Choice {
    /// Whether no process is ever selected by criteria: all targets are given by process id.
    pub(crate) fn is_none(&self) -> bool {
        self.include.is_none() && !self.may_change
    }

    /// Selected processes that exist now.
    pub(crate) fn present(&self) -> BTreeSet<u32> {
        self.not_excluded(self.include.present())
    }

    /// Splits candidates, which listen or wait for events, into selected processes and all others.
    pub(crate) fn divide(&self, candidates: BTreeSet<u32>) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let there = candidates.iter().copied().filter(|&pid| is_there(pid));
        let chosen = self.not_excluded(self.include.met_by(there));
        let others = &candidates - &chosen;
        (chosen, others)
    }

    /// Processes that are not observed even if an ancestor is.
    pub(crate) fn excluded(&self, pids: impl Iterator<Item = u32>) -> BTreeSet<u32> {
        self.exclude.met_by(pids)
    }

    fn not_excluded(&self, pids: BTreeSet<u32>) -> BTreeSet<u32> {
        let excluded = self.excluded(pids.iter().copied());
        &pids - &excluded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusion_takes_precedence() {
        let all = Criteria { all: true, ..Criteria::default() };
        let pid = std::os::unix::process::parent_id();
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim().to_owned();
        let exclude = Criteria { names: vec![name], ..Criteria::default() };
        let everybody = Choice { include: all.clone(), ..Choice::default() };
        assert!(everybody.divide(BTreeSet::from([pid])).0.contains(&pid));
        let others = Choice { include: all, exclude, ..Choice::default() };
        assert_eq!(others.divide(BTreeSet::from([pid])), (BTreeSet::new(), BTreeSet::from([pid])));
    }

    #[test]
    fn criteria_that_may_change_count_as_selection() {
        assert!(Choice::default().is_none());
        assert!(!Choice { may_change: true, ..Choice::default() }.is_none());
    }
}
