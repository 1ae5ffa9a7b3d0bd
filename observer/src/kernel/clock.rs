//! Converts the kernel's monotonic timestamps to wall time. All conversions share one offset, so that related
//! timestamps do not drift apart. It is sampled again from time to time, because the wall clock is set and adjusted.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};

/// The monotonic clock in nanoseconds, as returned by `bpf_ktime_get_ns`.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years of uptime")
}

/// Lifetime of an offset in nanoseconds.
const LIFETIME_NS: u64 = 10_000_000_000;

/// Deviation of the wall clock from which on it must have been set, and the offset is sampled again.
const MAX_DEVIATION: Duration = Duration::from_millis(100);

/// Number of readings for one offset. The quickest one is used, because it was not interrupted.
const READINGS: usize = 5;

/// When the offset was sampled (monotonic), and the offset: wall time at which the monotonic clock was 0.
static OFFSET: Mutex<Option<(u64, Duration)>> = Mutex::new(None);

/// Wall time of a monotonic timestamp. The offset is at most `LIFETIME_NS` old, and sampled again after the wall clock
/// was set or the machine was suspended.
pub(crate) fn wall_time(monotonic: u64) -> SystemTime {
    let now = monotonic_ns();
    let mut known = OFFSET.lock().unwrap_or_else(PoisonError::into_inner);
    let offset = match *known {
        Some((sampled, offset)) if is_valid(sampled, offset, now, SystemTime::now()) => offset,
        _ => {
            let offset = sample();
            *known = Some((now, offset));
            offset
        }
    };
    UNIX_EPOCH + offset + Duration::from_nanos(monotonic)
}

/// Whether an offset is still valid at this time, given by both clocks.
fn is_valid(sampled: u64, offset: Duration, now: u64, wall: SystemTime) -> bool {
    let here = offset + Duration::from_nanos(now);
    let wall = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(sampled) < LIFETIME_NS && here.abs_diff(wall) < MAX_DEVIATION
}

/// Samples the offset: wall time at which the monotonic clock was 0.
fn sample() -> Duration {
    let readings = (0..READINGS).map(|_| {
        let (before, wall, after) = (monotonic_ns(), SystemTime::now(), monotonic_ns());
        let wall = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        (after - before, wall.saturating_sub(Duration::from_nanos(before.midpoint(after))))
    });
    readings.min().map(|(_, offset)| offset).unwrap_or_default()
}

/// Wall time of a moment in clock ticks since boot, time in suspend included, as in `/proc/PID/stat`.
pub(crate) fn wall_time_of_ticks(ticks: u64) -> SystemTime {
    let elapsed = Duration::from_millis(ticks * 1000 / procfs::ticks_per_second().max(1));
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel has this clock");
    SystemTime::now() - Duration::from(up).saturating_sub(elapsed)
}

/// Wall time of a monotonic timestamp in RFC 3339 format, in milliseconds.
pub(crate) fn written(monotonic: u64) -> String {
    humantime::format_rfc3339_millis(wall_time(monotonic)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_valid_until_it_is_old_or_the_clock_is_set() {
        let (sampled, offset) = (5_000_000_000, Duration::from_secs(1_000));
        let at = |seconds: u64| UNIX_EPOCH + offset + Duration::from_secs(seconds);
        let is_valid = |now, wall| is_valid(sampled, offset, now, wall);
        assert!(is_valid(6_000_000_000, at(6)));
        assert!(!is_valid(16_000_000_000, at(16)));
        // The clock was set forward, set back, or the machine was suspended, when only the wall clock advances.
        assert!(!is_valid(6_000_000_000, at(3_600)));
        assert!(!is_valid(6_000_000_000, UNIX_EPOCH));
        assert!(!is_valid(6_000_000_000, at(7)));
    }

    #[test]
    fn wall_time_moves_with_the_monotonic_clock() {
        let now = monotonic_ns();
        let second = wall_time(now + 1_000_000_000).duration_since(wall_time(now)).unwrap();
        // The offset may be sampled again in between.
        assert!((0.999..1.001).contains(&second.as_secs_f64()), "{second:?}");
        let late = SystemTime::now().duration_since(wall_time(monotonic_ns())).unwrap_or_default();
        assert!(late < Duration::from_millis(100), "{late:?}");
    }
}
