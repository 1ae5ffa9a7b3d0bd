//! Kernel timestamps are monotonic; people want wall time. One offset between the two, sampled anew when asked.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of the monotonic clock, the one `bpf_ktime_get_ns` reads.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years of uptime")
}

/// Wall time of a monotonic timestamp, as the clocks stand now.
pub(crate) fn wall_time(monotonic: u64) -> SystemTime {
    let (now, wall) = (monotonic_ns(), SystemTime::now());
    if monotonic <= now {
        wall - Duration::from_nanos(now - monotonic)
    } else {
        wall + Duration::from_nanos(monotonic - now)
    }
}

/// Wall time of a moment so long after the machine's start, time asleep included, as `/proc` counts it.
pub(crate) fn wall_time_after_boot(elapsed: Duration) -> SystemTime {
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel has this clock");
    SystemTime::now() - Duration::from(up).saturating_sub(elapsed)
}

/// The same as people and programs read it: RFC 3339, in milliseconds.
pub(crate) fn written(monotonic: u64) -> String {
    humantime::format_rfc3339_millis(wall_time(monotonic)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_time_moves_with_the_monotonic_clock() {
        let now = monotonic_ns();
        let second = wall_time(now + 1_000_000_000).duration_since(wall_time(now)).unwrap();
        // Both clocks are read anew in between: allow for being interrupted there.
        assert!((0.9..1.1).contains(&second.as_secs_f64()), "{second:?}");
    }
}
