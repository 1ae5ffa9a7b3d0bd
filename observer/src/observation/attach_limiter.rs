//! Limits the number of runtimes attached to per second. Attaching stops a process for a moment, so many processes
//! that start together must not be stopped together.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    num::NonZero,
    time::{Duration, Instant},
};

/// Processes that may be attached to, and those that wait for it, oldest first.
pub(super) struct AttachLimiter {
    per_second: NonZero<u32>,
    /// Processes that may be attached to, with the number of execs of each when it was admitted.
    admitted: HashMap<u32, u32>,
    waiting: VecDeque<u32>,
    /// When the next process may be admitted.
    next: Instant,
}

impl AttachLimiter {
    pub(super) fn at(per_second: NonZero<u32>) -> Self {
        Self {
            per_second,
            admitted: HashMap::new(),
            waiting: VecDeque::new(),
            next: a_second_before(Instant::now()),
        }
    }

    /// Returns which of the live targets, given with their numbers of execs, may be attached to. Processes in
    /// `at_once` never wait.
    pub(super) fn admit(&mut self, live: Vec<(u32, u32)>, at_once: &BTreeSet<u32>) -> Vec<(u32, u32)> {
        let by_pid: HashMap<u32, u32> = live.iter().copied().collect();
        self.admitted.retain(|pid, execs| by_pid.get(pid) == Some(execs));
        self.waiting.retain(|pid| by_pid.contains_key(pid));
        for (pid, _) in live {
            if !self.admitted.contains_key(&pid) && !self.waiting.contains(&pid) {
                self.waiting.push_back(pid);
            }
        }
        let now = Instant::now();
        let pause = Duration::from_secs(1) / self.per_second.get();
        // Unused admissions accumulate for a second at most.
        self.next = self.next.max(a_second_before(now));
        let mut later = VecDeque::new();
        while let Some(pid) = self.waiting.pop_front() {
            if at_once.contains(&pid) {
                self.admitted.insert(pid, by_pid[&pid]);
            } else if self.next <= now {
                self.next += pause;
                self.admitted.insert(pid, by_pid[&pid]);
            } else {
                later.push_back(pid);
            }
        }
        self.waiting = later;
        self.admitted.iter().map(|(&pid, &execs)| (pid, execs)).collect()
    }

    /// Number of waiting processes.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len().try_into().unwrap_or(u64::MAX)
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
    fn a_crowd_is_admitted_over_time() {
        let mut limiter = AttachLimiter::at(const { NonZero::new(10).unwrap() });
        let first = limiter.admit(crowd(300), &BTreeSet::from([299]));
        // At most a second's worth, and the one in `at_once`.
        assert!((2..=13).contains(&first.len()), "{}", first.len());
        assert!(first.contains(&(299, 0)));
        assert_eq!(limiter.waiting(), 300 - first.len() as u64);
        // The longest waiting are admitted first, and admitted processes remain admitted.
        std::thread::sleep(Duration::from_millis(250));
        let second = limiter.admit(crowd(300), &BTreeSet::new());
        assert!(first.iter().all(|process| second.contains(process)));
        assert!(second.len() > first.len());
        assert!(second.contains(&(1, 0)) && !second.contains(&(300, 0)));
    }

    #[test]
    fn a_new_program_waits_again() {
        let mut limiter = AttachLimiter::at(NonZero::<u32>::MIN);
        limiter.next = Instant::now();
        assert_eq!(limiter.admit(vec![(7, 0)], &BTreeSet::new()), [(7, 0)]);
        assert!(limiter.admit(vec![(7, 1)], &BTreeSet::new()).is_empty());
        assert_eq!(limiter.waiting(), 1);
        assert!(limiter.admit(vec![], &BTreeSet::new()).is_empty());
        assert_eq!(limiter.waiting(), 0);
    }
}
