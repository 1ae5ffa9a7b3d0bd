//! Whom to observe besides those that are given by their ids, and whom not to, whatever else speaks for it.

use std::collections::BTreeSet;

use super::{criteria::Criteria, info::is_there};

/// What is wanted and what is not. Whoever meets both is left alone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// One that meets any of these is observed,
    pub(crate) include: Criteria,
    /// unless it meets any of these; nor are children that do.
    pub(crate) exclude: Criteria,
    /// Whether others may be chosen later.
    pub(crate) may_change: bool,
}

impl Choice {
    /// Whether nobody is ever chosen: processes are given by their ids alone.
    pub(crate) fn is_none(&self) -> bool {
        self.include.is_none() && !self.may_change
    }

    /// Those that are there now and are chosen.
    pub(crate) fn present(&self) -> BTreeSet<u32> {
        self.not_excluded(self.include.present())
    }

    /// Divides processes that listen or wait for events into those that are chosen and all others.
    pub(crate) fn divide(&self, candidates: BTreeSet<u32>) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let there = candidates.iter().copied().filter(|&pid| is_there(pid));
        let chosen = self.not_excluded(self.include.met_by(there));
        let others = &candidates - &chosen;
        (chosen, others)
    }

    /// Those who are left alone even if one that started them is observed.
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
    fn whoever_is_excluded_is_not_chosen() {
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
    fn a_choice_that_may_change_is_one() {
        assert!(Choice::default().is_none());
        assert!(!Choice { may_change: true, ..Choice::default() }.is_none());
    }
}
