//! Whom to observe besides those that are given by their ids, and whom not to, whatever else speaks for it.

use std::collections::BTreeSet;

use super::criteria::Criteria;

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
        let mut present = self.include.present();
        present.retain(|&pid| !self.excludes(pid));
        present
    }

    /// Divides processes that listen or wait for events into those that are chosen and all others.
    pub(crate) fn divide(&self, candidates: impl Iterator<Item = u32>) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let (mut wanted, mut others) = self.include.divide(candidates);
        let (excluded, chosen) = wanted.into_iter().partition(|&pid| self.excludes(pid));
        wanted = chosen;
        others.extend::<BTreeSet<u32>>(excluded);
        (wanted, others)
    }

    /// Whether a process is left alone even if one that started it is observed.
    pub(crate) fn excludes(&self, pid: u32) -> bool {
        !self.exclude.is_none() && self.exclude.is_met_by(pid)
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
        assert!(everybody.divide([pid].into_iter()).0.contains(&pid));
        let others = Choice { include: all, exclude, ..Choice::default() };
        assert_eq!(others.divide([pid].into_iter()), (BTreeSet::new(), BTreeSet::from([pid])));
    }

    #[test]
    fn a_choice_that_may_change_is_one() {
        assert!(Choice::default().is_none());
        assert!(!Choice { may_change: true, ..Choice::default() }.is_none());
    }
}
