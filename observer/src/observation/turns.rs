//! Whose turn it is to have the runtime attached to: a crowd that starts at once is not stopped all at once for that.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Bound::{Excluded, Unbounded},
    time::{Duration, Instant},
};

/// Processes that had their turn, and those that wait for it, oldest first.
pub(super) struct Turns {
    per_second: u32,
    /// With how many programs they had started by then.
    had: HashMap<u32, u32>,
    waiting: VecDeque<u32>,
    /// When the next may have its turn, if many have had theirs just now.
    next: Instant,
}

impl Turns {
    pub(super) fn at(per_second: u32) -> Self {
        Self {
            per_second: per_second.max(1),
            had: HashMap::new(),
            waiting: VecDeque::new(),
            next: a_second_before(Instant::now()),
        }
    }

    /// Those of the live ones, each with how many programs it has started, that have or had their turn. Nobody waits who
    /// was asked for by its id, and nobody at all where others are not chosen.
    pub(super) fn of(
        &mut self,
        live: Vec<(u32, u32)>,
        at_once: &BTreeSet<u32>,
        some_are_chosen: bool,
    ) -> Vec<(u32, u32)> {
        if !some_are_chosen {
            return live;
        }
        let by_pid: HashMap<u32, u32> = live.iter().copied().collect();
        self.had.retain(|pid, execs| by_pid.get(pid) == Some(execs));
        self.waiting.retain(|pid| by_pid.contains_key(pid));
        for (pid, _) in live {
            if !self.had.contains_key(&pid) && !self.waiting.contains(&pid) {
                self.waiting.push_back(pid);
            }
        }
        let now = Instant::now();
        let pause = Duration::from_secs(1) / self.per_second;
        // What nobody took for a while is not saved up for longer than a second.
        self.next = self.next.max(a_second_before(now));
        let mut later = VecDeque::new();
        while let Some(pid) = self.waiting.pop_front() {
            if at_once.contains(&pid) {
                self.had.insert(pid, by_pid[&pid]);
            } else if self.next <= now {
                self.next += pause;
                self.had.insert(pid, by_pid[&pid]);
            } else {
                later.push_back(pid);
            }
        }
        self.waiting = later;
        self.had.iter().map(|(&pid, &execs)| (pid, execs)).collect()
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len().try_into().unwrap_or(u64::MAX)
    }
}

/// How many are asked again at a time, of those whom asking hardly ever tells anything new.
pub(super) const ASKED: usize = 128;

/// Whose turn it is to be asked again.
#[derive(Default)]
pub(super) struct Round {
    /// Who was asked last.
    last: u32,
}

impl Round {
    /// The next of them, all if they are few.
    pub(super) fn next<V>(&mut self, all: &BTreeMap<u32, V>) -> Vec<u32> {
        let after = all.range((Excluded(self.last), Unbounded));
        let next: Vec<u32> = after.chain(all.range(..=self.last)).take(ASKED).map(|(&id, _)| id).collect();
        self.last = next.last().copied().unwrap_or(0);
        next
    }
}

fn a_second_before(now: Instant) -> Instant {
    now.checked_sub(Duration::from_secs(1)).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crowd(size: u32) -> Vec<(u32, u32)> {
        (1..=size).map(|pid| (pid, 0)).collect()
    }

    #[test]
    fn a_crowd_waits_its_turn() {
        let mut turns = Turns::at(10);
        let first = turns.of(crowd(300), &BTreeSet::from([299]), true);
        // A second's worth at most, and the one that was asked for.
        assert!((2..=13).contains(&first.len()), "{}", first.len());
        assert!(first.contains(&(299, 0)));
        assert_eq!(turns.waiting(), 300 - first.len() as u64);
        // The longest waiting comes first, and those who had their turn keep it.
        std::thread::sleep(Duration::from_millis(250));
        let second = turns.of(crowd(300), &BTreeSet::new(), true);
        assert!(first.iter().all(|process| second.contains(process)));
        assert!(second.len() > first.len());
        assert!(second.contains(&(1, 0)) && !second.contains(&(300, 0)));
    }

    #[test]
    fn a_new_program_takes_a_new_turn() {
        let mut turns = Turns::at(1);
        turns.next = Instant::now();
        assert_eq!(turns.of(vec![(7, 0)], &BTreeSet::new(), true), [(7, 0)]);
        assert!(turns.of(vec![(7, 1)], &BTreeSet::new(), true).is_empty());
        assert_eq!(turns.waiting(), 1);
        assert!(turns.of(vec![], &BTreeSet::new(), true).is_empty());
        assert_eq!(turns.waiting(), 0);
    }

    #[test]
    fn nobody_waits_who_was_asked_for() {
        let mut turns = Turns::at(1);
        assert_eq!(turns.of(crowd(300), &BTreeSet::new(), false).len(), 300);
    }

    #[test]
    fn all_are_asked_in_turn_and_each_once_a_round() {
        let mut round = Round::default();
        let few: BTreeMap<u32, ()> = (1..=5).map(|id| (id, ())).collect();
        assert_eq!(round.next(&few), [1, 2, 3, 4, 5]);
        assert_eq!(round.next(&few), [1, 2, 3, 4, 5]);
        let many: BTreeMap<u32, ()> = (1..=1000).map(|id| (id, ())).collect();
        let asked: Vec<u32> = (0..8).flat_map(|_| round.next(&many)).collect();
        assert_eq!(asked.len(), 8 * ASKED);
        assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), 1000);
        assert!(round.next(&BTreeMap::<u32, ()>::new()).is_empty());
    }
}
