//! Stalls: slices of the stall threshold or more, with cause, stack and share of the lag.

use std::{collections::VecDeque, sync::Arc};

use observer_common::block::Block;
use serde::Serialize;

use super::{
    busy::{Cause, Split},
    frame::StackSample,
    late::LATE,
    request::Request,
};

/// Maximum number of sites for each event loop. Further stalls share the last site, without frames.
const SITES: usize = 64;

/// Number of latest stalls that are kept individually, for each event loop.
const RECENT: usize = 64;

/// A stall.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Stall {
    /// Wall time at which the slice began, RFC 3339.
    pub(crate) start: String,
    /// Length in seconds.
    pub(crate) seconds: f64,
    /// The cause that took most of it.
    pub(crate) cause: Cause,
    /// The system call that it was blocked in for longest; `None` if it was not blocked, or on page faults only.
    pub(crate) syscall: Option<String>,
    /// The thread that ran on the CPU before this one, at the end of its longest wait in the run queue, such as
    /// `stress (thread 4242)`; `None` if there was none.
    pub(crate) behind: Option<String>,
    /// Whether events were waiting while it lasted; `None` if that is unknown.
    pub(crate) events_waited: Option<bool>,
    /// Its time by state and cause.
    pub(crate) split_seconds: Split,
    /// The request that it worked for longest without interruption; `None` if none is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<Arc<Request>>,
    /// Index of its site.
    pub(crate) site: usize,
}

impl Stall {
    /// Corrects its cause by its stack: a runtime may sleep by waiting for a lock with a timeout.
    pub(crate) fn corrected_by(mut self, sample: &StackSample) -> Self {
        if self.cause == Cause::Blocked(Block::Lock) && sample.is_sleep_of_runtime() {
            let blocked = &mut self.split_seconds.blocked;
            blocked.sleep += std::mem::take(&mut blocked.lock);
            self.cause = Cause::of(&self.split_seconds);
        }
        self
    }
}

/// A site: stalls with the same stack, or for which the same function of the user's own code is to blame. Stalls without a
/// stack are grouped by cause and system call.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Site {
    /// Number of stalls.
    pub(crate) count: u64,
    /// Their total length in seconds.
    pub(crate) seconds: f64,
    /// Their share of the mean lag. Fixing this code removes this share of the lag.
    pub(crate) lag_share: f64,
    /// The cause that took most of their time.
    pub(crate) cause: Cause,
    /// The system call that the latest blocked one of them was in for longest.
    pub(crate) syscall: Option<String>,
    /// The thread that ran before the latest of them that was in the run queue.
    pub(crate) behind: Option<String>,
    /// Their time by state and cause.
    pub(crate) split_seconds: Split,
    /// The stack that was seen in them, or why it is unknown.
    #[serde(flatten)]
    pub(crate) sample: StackSample,
    /// Half the sum of their squared lengths, in seconds squared: their part of the integral of lag over time.
    #[serde(skip)]
    pub(crate) weight: f64,
}

impl Site {
    /// A site without stalls yet.
    fn of(cause: Cause, syscall: Option<String>, sample: StackSample) -> Self {
        Self {
            count: 0,
            seconds: 0.0,
            lag_share: 0.0,
            cause,
            syscall,
            behind: None,
            split_seconds: Split::default(),
            sample,
            weight: 0.0,
        }
    }

    /// Whether a stall belongs to the site: its stack has the same functions, or the same function of the user's own code
    /// is to blame for the same kind of stall.
    fn is_of(&self, cause: Cause, syscall: Option<&str>, sample: &StackSample) -> bool {
        let is_seen = !sample.frames.is_empty();
        let has_same_cause = self.cause == cause && self.syscall.as_deref() == syscall;
        (self.sample.has_same_functions(sample) && (is_seen || has_same_cause))
            || (has_same_cause && self.sample.has_same_culprit(sample))
    }
}

/// All stalls of an event loop.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Stalls {
    /// Length in seconds from which a slice is a stall.
    pub(crate) threshold_seconds: f64,
    /// Number of stalls that have ended.
    pub(crate) count: u64,
    /// Of these, stalls of 50 ms or longer during which events are known to have waited.
    pub(crate) late: u64,
    /// Their total length in seconds.
    pub(crate) seconds: f64,
    /// Their number by cause, in the order of [`Cause::all`].
    #[serde(skip)]
    counts: [u64; Cause::PARTS.len() + 1],
    /// The sites, the one with the largest share of the lag first. A stall in progress counts as well.
    pub(crate) sites: Vec<Site>,
    /// The latest stalls, oldest first.
    pub(crate) recent: VecDeque<Stall>,
}

impl Stalls {
    /// No stalls yet, with a threshold in seconds.
    pub(crate) fn over(threshold_seconds: f64) -> Self {
        Self { threshold_seconds, ..Self::default() }
    }

    /// Number of stalls with this cause.
    pub(crate) fn count_of(&self, cause: Cause) -> u64 {
        self.counts[cause.index()]
    }

    /// Origins of the latest stalls at a site, as far as they are known, oldest first.
    pub(crate) fn requests_of(&self, site: usize) -> Vec<&Request> {
        let of_site = self.recent.iter().filter(|stall| stall.site == site);
        of_site.filter_map(|stall| stall.origin.as_deref()).collect()
    }

    /// Adds a stall that has ended.
    pub(crate) fn add(&mut self, mut stall: Stall, sample: StackSample) {
        self.count += 1;
        self.late += u64::from(stall.events_waited == Some(true) && stall.seconds >= LATE);
        self.seconds += stall.seconds;
        self.counts[stall.cause.index()] += 1;
        stall.site = self.add_to_site(&stall, sample);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(stall);
    }

    /// Adds a stall in progress, only to its site.
    pub(crate) fn add_in_progress(&mut self, stall: &Stall, sample: StackSample) {
        self.add_to_site(stall, sample);
    }

    /// Adds the stalls of another loop. Of the latest stalls, its own come last.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.threshold_seconds = other.threshold_seconds;
        self.count += other.count;
        self.late += other.late;
        self.seconds += other.seconds;
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        let mut places = Vec::new();
        for of_other in &other.sites {
            let place = self.site_of(of_other.cause, of_other.syscall.as_deref(), of_other.sample.clone());
            let site = &mut self.sites[place];
            site.count += of_other.count;
            site.seconds += of_other.seconds;
            site.weight += of_other.weight;
            site.split_seconds.add(&of_other.split_seconds);
            site.cause = Cause::of(&site.split_seconds);
            if of_other.behind.is_some() {
                site.behind.clone_from(&of_other.behind);
            }
            places.push(place);
        }
        self.recent
            .extend(other.recent.iter().map(|stall| Stall { site: places[stall.site], ..stall.clone() }));
        let surplus = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..surplus);
    }

    /// Index of the site with this stack, or of one for too many sites.
    fn site_of(&mut self, cause: Cause, syscall: Option<&str>, sample: StackSample) -> usize {
        let known = self.sites.iter().position(|site| site.is_of(cause, syscall, &sample));
        known.unwrap_or_else(|| {
            let is_last = self.sites.len() >= SITES - 1;
            let sample = if is_last {
                StackSample::missing("too many different stacks to report each")
            } else {
                sample
            };
            if self.sites.len() < SITES {
                self.sites.push(Site::of(cause, syscall.map(Into::into), sample));
            }
            self.sites.len() - 1
        })
    }

    fn add_to_site(&mut self, stall: &Stall, sample: StackSample) -> usize {
        let place = self.site_of(stall.cause, stall.syscall.as_deref(), sample);
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

    /// A copy with the share of each site in a total lag of `lag_weight` seconds squared, largest share first.
    pub(crate) fn ranked(&self, lag_weight: f64) -> Self {
        let mut ranked = self.clone();
        ranked.rank(|site| if lag_weight > 0.0 { (site.weight / lag_weight).min(1.0) } else { 0.0 });
        ranked
    }

    /// Sets the share of each site to its share of the time of all, and sorts them by it.
    pub(crate) fn rank_by_time(&mut self) {
        let total: f64 = self.sites.iter().map(|site| site.seconds).sum();
        self.rank(|site| if total > 0.0 { site.seconds / total } else { 0.0 });
    }

    fn rank(&mut self, share: impl Fn(&Site) -> f64) {
        for site in &mut self.sites {
            site.lag_share = share(site);
        }
        let mut order: Vec<usize> = (0..self.sites.len()).collect();
        order.sort_by(|a, b| self.sites[*b].lag_share.total_cmp(&self.sites[*a].lag_share));
        self.sites = order.iter().map(|&place| self.sites[place].clone()).collect();
        for stall in &mut self.recent {
            stall.site =
                order.iter().position(|&place| place == stall.site).expect("each place is in the order");
        }
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
            events_waited: None,
            split_seconds,
            origin: None,
            site: 0,
        }
    }

    fn sample(function: &str, line: u32) -> StackSample {
        let frame = Frame { function: function.into(), module: None, file: None, line: Some(line) };
        StackSample { frames: vec![frame], ..StackSample::default() }
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
    fn sleeps_of_a_runtime_are_no_locks() {
        let mut split = Split { cpu: 0.1, ..Split::default() };
        split.blocked.lock = 0.4;
        let corrected = |frames: Vec<Frame>| {
            let sample = StackSample { frames, ..StackSample::default() };
            stall(0.5, split.clone()).corrected_by(&sample)
        };
        let jvm = |name: &str| Frame { module: Some("libjvm.so".into()), ..Frame::in_c(name) };
        let user = || Frame { file: Some("/srv/app.rb".into()), ..Frame::in_c("sleep") };
        for frames in [vec![Frame::in_c("sleep"), user()], vec![jvm("0x7f"), jvm("JVM_Sleep")]] {
            let stall = corrected(frames);
            assert_eq!(stall.cause.name(), "sleep");
            let seconds = &stall.split_seconds;
            assert_eq!((seconds.blocked.lock, seconds.blocked.sleep, seconds.cpu), (0.0, 0.4, 0.1));
        }
        for frames in [
            vec![user()],
            vec![Frame::in_c("synchronize"), Frame::in_c("sleep")],
            vec![jvm("JVM_MonitorWait")],
        ] {
            assert_eq!(corrected(frames).cause.name(), "lock");
        }
    }

    #[test]
    fn one_culprit_is_one_site_for_each_kind_of_stall() {
        let mut stalls = Stalls::over(0.05);
        let in_libc = |address| Frame::unknown(address, Some("libc.so.6".into()));
        let user = Frame { module: Some("server".into()), ..Frame::in_c("handle") };
        let cpu = || stall(0.1, Split { cpu: 0.1, ..Split::default() });
        for address in 0..10 {
            let frames = vec![in_libc(address), user.clone()];
            stalls.add(cpu(), StackSample { frames, ..StackSample::default() });
        }
        assert_eq!((stalls.sites.len(), stalls.sites[0].count), (1, 10));
        let blocked = stall(0.1, Split { runqueue: 0.1, ..Split::default() });
        stalls.add(blocked, StackSample { frames: vec![in_libc(77), user], ..StackSample::default() });
        assert_eq!(stalls.sites.len(), 2);
    }

    #[test]
    fn sites_are_ranked_by_the_lag_they_cause() {
        let mut stalls = Stalls::over(0.05);
        let cpu = |seconds| stall(seconds, Split { cpu: seconds, ..Split::default() });
        // Ten of 60 ms take more time than two of 200 ms, and cause less lag.
        for line in 0..10 {
            stalls.add(cpu(0.06), sample("often", line));
        }
        for _ in 0..2 {
            stalls.add(cpu(0.2), sample("long", 7));
        }
        assert_eq!((stalls.count, stalls.sites.len(), stalls.count_of(Cause::Cpu)), (12, 2, 12));
        let ranked = stalls.ranked(0.1);
        assert_eq!(ranked.sites[0].sample.frames[0].function, "long");
        assert!((ranked.sites[0].lag_share - 0.4).abs() < 1e-9);
        assert!((ranked.sites[1].lag_share - 0.18).abs() < 1e-9);
        assert_eq!((ranked.recent[0].site, ranked.recent[11].site), (1, 0));
    }

    #[test]
    fn memory_is_bounded_and_sums_are_complete() {
        let mut stalls = Stalls::over(0.05);
        for n in 0..1000 {
            stalls.add(stall(0.1, Split { cpu: 0.1, ..Split::default() }), sample(&format!("f{n}"), 1));
        }
        assert_eq!((stalls.sites.len(), stalls.recent.len(), stalls.count), (SITES, RECENT, 1000));
        assert_eq!(stalls.sites.iter().map(|site| site.count).sum::<u64>(), 1000);
        assert!(stalls.sites[SITES - 1].sample.missing.is_some());
    }
}
