//! CPU time that other processes use while a test measures time.

use std::{
    thread,
    time::{Duration, Instant},
};

use procfs::{CpuTime, CurrentSI as _, KernelStats, process::Process};

/// Share of the machine's CPU time above which other processes disturb a measurement.
pub(crate) const DISTURBED: f64 = 0.05;

/// How long to wait until other processes are done.
const PATIENCE: Duration = Duration::from_secs(30);

/// A moment, and the CPU time used until then, in ticks.
pub(crate) struct CpuUse {
    since: Instant,
    busy: u64,
    own: u64,
}

impl CpuUse {
    pub(crate) fn now() -> Self {
        let CpuTime { user, nice, system, irq, softirq, steal, .. } = KernelStats::current().unwrap().total;
        let others = [irq, softirq, steal].into_iter().flatten().sum::<u64>();
        let stat = Process::myself().unwrap().stat().unwrap();
        let children = u64::try_from(stat.cutime + stat.cstime).unwrap_or(0);
        Self {
            since: Instant::now(),
            busy: user + nice + system + others,
            own: stat.utime + stat.stime + children,
        }
    }

    /// The share of the machine's CPU time that neither this process nor its children that have exited have used since.
    pub(crate) fn share_of_others(&self) -> f64 {
        let now = Self::now();
        let used = (now.busy - self.busy).saturating_sub(now.own - self.own);
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let ticks = self.since.elapsed().as_secs_f64() * procfs::ticks_per_second() as f64 * cpus as f64;
        used as f64 / ticks.max(1.0)
    }
}

/// Waits until other processes use little CPU time, but not for ever.
pub(crate) fn wait_until_calm() {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let before = CpuUse::now();
        thread::sleep(Duration::from_secs(1));
        if before.share_of_others() < DISTURBED {
            return;
        }
    }
}
