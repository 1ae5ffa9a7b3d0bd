//! Slices that took too long: why, in which code, and how much of the lag each such place accounts for.

use std::{collections::VecDeque, sync::Arc};

use serde::Serialize;

use super::{
    busy::{Cause, Split},
    frame::Look,
    request::Request,
};

/// Places in the code that are told apart, for each reactor; beyond that they are one, without frames.
const SITES: usize = 64;

/// The latest stalls that are kept one by one, for each reactor.
const RECENT: usize = 64;

/// One stall.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Stall {
    /// Wall time at which the slice began, RFC 3339.
    pub(crate) start: String,
    /// How long it was.
    pub(crate) seconds: f64,
    /// What took most of that.
    pub(crate) cause: Cause,
    /// The system call it was blocked in for longest; `None` if it did not block, or for its memory.
    pub(crate) syscall: Option<String>,
    /// The thread that had the CPU before it after its longest wait for one: `stress (thread 4242)`; `None` if there was
    /// none.
    pub(crate) behind: Option<String>,
    /// Where the time went.
    pub(crate) split_seconds: Split,
    /// The request that it worked for, longest at once; `None` if none is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<Arc<Request>>,
    /// Which of the sites it belongs to.
    pub(crate) site: usize,
}

/// Stalls in the same code; of those that nobody saw, the ones of the same cause.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Site {
    /// How many.
    pub(crate) count: u64,
    /// How long they were together.
    pub(crate) seconds: f64,
    /// Their share of the mean lag: with this place mended, so much of it would be gone.
    pub(crate) lag_share: f64,
    /// What took most of their time.
    pub(crate) cause: Cause,
    /// The system call that the latest of them was blocked in for longest.
    pub(crate) syscall: Option<String>,
    /// The thread that had the CPU before the latest of them after its longest wait for one.
    pub(crate) behind: Option<String>,
    /// Where their time went.
    pub(crate) split_seconds: Split,
    /// What was seen of them: the code, or why it is not known.
    #[serde(flatten)]
    pub(crate) look: Look,
    /// Half the sum of the squares of their lengths, in seconds squared: lag met by all instants in them.
    #[serde(skip)]
    pub(crate) weight: f64,
}

impl Site {
    fn is_of(&self, stall: &Stall, look: &Look) -> bool {
        let is_seen = !look.frames.is_empty();
        self.look.is_alike(look) && (is_seen || (self.cause == stall.cause && self.syscall == stall.syscall))
    }
}

/// All stalls of one reactor.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Stalls {
    /// A slice of this length or more is one.
    pub(crate) threshold_seconds: f64,
    /// How many have ended.
    pub(crate) count: u64,
    /// How long they were together.
    pub(crate) seconds: f64,
    /// How many by [`Cause::all`].
    #[serde(skip)]
    counts: [u64; Cause::PARTS.len() + 1],
    /// The places, the one with the largest share of the lag first. A slice that is still going on counts as well.
    pub(crate) sites: Vec<Site>,
    /// The latest stalls, oldest first.
    pub(crate) recent: VecDeque<Stall>,
}

impl Stalls {
    /// None yet.
    pub(crate) fn over(threshold_seconds: f64) -> Self {
        Self { threshold_seconds, ..Self::default() }
    }

    /// How many had this cause.
    pub(crate) fn count_of(&self, cause: Cause) -> u64 {
        self.counts[cause.index()]
    }

    /// The requests that the latest stalls in this site were for, as far as they are known, oldest first.
    pub(crate) fn requests_of(&self, site: usize) -> Vec<&Request> {
        let of_site = self.recent.iter().filter(|stall| stall.site == site);
        of_site.filter_map(|stall| stall.origin.as_deref()).collect()
    }

    /// Adds a stall that has ended.
    pub(crate) fn add(&mut self, mut stall: Stall, look: Look) {
        self.count += 1;
        self.seconds += stall.seconds;
        self.counts[stall.cause.index()] += 1;
        stall.site = self.add_to_site(&stall, look);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(stall);
    }

    /// Adds one that has not ended to its site alone.
    pub(crate) fn add_in_progress(&mut self, stall: &Stall, look: Look) {
        self.add_to_site(stall, look);
    }

    fn add_to_site(&mut self, stall: &Stall, look: Look) -> usize {
        let known = self.sites.iter().position(|site| site.is_of(stall, &look));
        let place = known.unwrap_or_else(|| {
            let is_last = self.sites.len() >= SITES - 1;
            let look = if is_last { Look::missing("there are too many places to tell apart") } else { look };
            if self.sites.len() < SITES {
                let (cause, syscall) = (stall.cause, stall.syscall.clone());
                self.sites.push(Site {
                    count: 0,
                    seconds: 0.0,
                    lag_share: 0.0,
                    cause,
                    syscall,
                    behind: None,
                    split_seconds: Split::default(),
                    look,
                    weight: 0.0,
                });
            }
            self.sites.len() - 1
        });
        let site = &mut self.sites[place];
        site.count += 1;
        site.seconds += stall.seconds;
        site.weight += stall.seconds * stall.seconds / 2.0;
        site.split_seconds.add(&stall.split_seconds);
        site.cause = Cause::of(&site.split_seconds);
        if matches!(stall.cause, Cause::Blocked(_)) {
            site.syscall.clone_from(&stall.syscall);
        }
        if stall.behind.is_some() {
            site.behind.clone_from(&stall.behind);
        }
        place
    }

    /// The same with shares of a lag of so many seconds squared in all, and the largest share first.
    pub(crate) fn ranked(&self, lag_weight: f64) -> Self {
        let mut ranked = self.clone();
        for site in &mut ranked.sites {
            site.lag_share = if lag_weight > 0.0 { (site.weight / lag_weight).min(1.0) } else { 0.0 };
        }
        let mut order: Vec<usize> = (0..ranked.sites.len()).collect();
        order.sort_by(|a, b| self.sites[*b].weight.total_cmp(&self.sites[*a].weight));
        ranked.sites = order.iter().map(|&place| ranked.sites[place].clone()).collect();
        for stall in &mut ranked.recent {
            stall.site =
                order.iter().position(|&place| place == stall.site).expect("each place is in the order");
        }
        ranked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frame::Frame;

    fn stall(seconds: f64, split_seconds: Split) -> Stall {
        let cause = Cause::of(&split_seconds);
        Stall {
            start: String::new(),
            seconds,
            cause,
            syscall: None,
            behind: None,
            split_seconds,
            origin: None,
            site: 0,
        }
    }

    fn look(function: &str, line: u32) -> Look {
        let frame = Frame { function: function.into(), module: None, file: None, line: Some(line) };
        Look { frames: vec![frame], kernel: Vec::new(), missing: None, is_on_cpu: false }
    }

    #[test]
    fn the_largest_part_is_the_cause() {
        let mut split = Split { cpu: 0.3, runqueue: 0.2, ..Split::default() };
        assert_eq!(Cause::of(&split), Cause::Cpu);
        split.blocked.disk = 0.4;
        assert_eq!(Cause::of(&split).name(), "disk");
        split.gc = 0.5;
        assert_eq!(Cause::of(&split), Cause::Gc);
    }

    #[test]
    fn sites_are_ranked_by_the_lag_they_cause() {
        let mut stalls = Stalls::over(0.05);
        let cpu = |seconds| stall(seconds, Split { cpu: seconds, ..Split::default() });
        // Ten of 60 ms last longer than two of 200 ms, and hurt less.
        for line in 0..10 {
            stalls.add(cpu(0.06), look("often", line));
        }
        for _ in 0..2 {
            stalls.add(cpu(0.2), look("long", 7));
        }
        assert_eq!((stalls.count, stalls.sites.len(), stalls.count_of(Cause::Cpu)), (12, 2, 12));
        let ranked = stalls.ranked(0.1);
        assert_eq!(ranked.sites[0].look.frames[0].function, "long");
        assert!((ranked.sites[0].lag_share - 0.4).abs() < 1e-9);
        assert!((ranked.sites[1].lag_share - 0.18).abs() < 1e-9);
        assert_eq!((ranked.recent[0].site, ranked.recent[11].site), (1, 0));
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_lost_of_the_sums() {
        let mut stalls = Stalls::over(0.05);
        for n in 0..1000 {
            stalls.add(stall(0.1, Split { cpu: 0.1, ..Split::default() }), look(&format!("f{n}"), 1));
        }
        assert_eq!((stalls.sites.len(), stalls.recent.len(), stalls.count), (SITES, RECENT, 1000));
        assert_eq!(stalls.sites.iter().map(|site| site.count).sum::<u64>(), 1000);
        assert!(stalls.sites[SITES - 1].look.missing.is_some());
    }
}
