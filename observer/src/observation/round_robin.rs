//! Iterates over a large map in batches, to check again what rarely changes.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

/// Maximum size of a batch.
pub(super) const BATCH: usize = 128;

/// Where the next batch begins.
#[derive(Default)]
pub(super) struct RoundRobin<K> {
    /// The last key of the previous batch.
    last: K,
}

impl<K: Copy + Default + Ord> RoundRobin<K> {
    /// The keys of the next batch; all keys if there are few.
    pub(super) fn next<V>(&mut self, all: &BTreeMap<K, V>) -> Vec<K> {
        let after = all.range((Excluded(self.last), Unbounded));
        let next: Vec<K> = after.chain(all.range(..=self.last)).take(BATCH).map(|(&id, _)| id).collect();
        self.last = next.last().copied().unwrap_or_default();
        next
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_member_comes_once_a_round() {
        let mut round = RoundRobin::default();
        let few: BTreeMap<u32, ()> = (1..=5).map(|id| (id, ())).collect();
        assert_eq!(round.next(&few), [1, 2, 3, 4, 5]);
        assert_eq!(round.next(&few), [1, 2, 3, 4, 5]);
        let many: BTreeMap<u32, ()> = (1..=1000).map(|id| (id, ())).collect();
        let asked: Vec<u32> = (0..8).flat_map(|_| round.next(&many)).collect();
        assert_eq!(asked.len(), 8 * BATCH);
        assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), 1000);
        assert!(round.next(&BTreeMap::<u32, ()>::new()).is_empty());
    }
}
