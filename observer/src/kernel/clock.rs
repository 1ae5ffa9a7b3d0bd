//! Kernel timestamps are monotonic; people want wall time. One offset between the two for the whole program, so that what
//! belongs together does not drift apart, and sampled anew now and then, because wall time is set and steered.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of the monotonic clock, the one `bpf_ktime_get_ns` reads.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years of uptime")
}

/// How long an offset is good for, in nanoseconds.
const GOOD_FOR: u64 = 10_000_000_000;

/// By how much the wall clock may be elsewhere than an offset says before it must have been set.
const STEP: Duration = Duration::from_millis(100);

/// How often the clocks are read for one: the quickest reading, which nothing came in between of, is the best.
const READINGS: usize = 5;

/// When the offset was sampled, and what it is: wall time when the monotonic clock began.
static OFFSET: Mutex<Option<(u64, Duration)>> = Mutex::new(None);

/// Wall time of a monotonic timestamp, as the clocks stood a few seconds ago at most, and never by a clock that has been set
/// or slept since.
pub(crate) fn wall_time(monotonic: u64) -> SystemTime {
    let now = monotonic_ns();
    let mut known = OFFSET.lock().unwrap_or_else(PoisonError::into_inner);
    let offset = match *known {
        Some((sampled, offset)) if is_good(sampled, offset, now, SystemTime::now()) => offset,
        _ => {
            let offset = sample();
            *known = Some((now, offset));
            offset
        }
    };
    UNIX_EPOCH + offset + Duration::from_nanos(monotonic)
}

/// Whether an offset that was sampled then still holds at this moment, by both clocks.
fn is_good(sampled: u64, offset: Duration, now: u64, wall: SystemTime) -> bool {
    let here = offset + Duration::from_nanos(now);
    let wall = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(sampled) < GOOD_FOR && here.abs_diff(wall) < STEP
}

/// Wall time when the monotonic clock began, as the clocks stand now.
fn sample() -> Duration {
    let readings = (0..READINGS).map(|_| {
        let (before, wall, after) = (monotonic_ns(), SystemTime::now(), monotonic_ns());
        let wall = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        (after - before, wall.saturating_sub(Duration::from_nanos(before.midpoint(after))))
    });
    readings.min().map(|(_, offset)| offset).unwrap_or_default()
}

/// Wall time of a moment so many ticks after the machine's start, time asleep included, as `/proc` counts it.
pub(crate) fn wall_time_of_ticks(ticks: u64) -> SystemTime {
    let elapsed = Duration::from_millis(ticks * 1000 / procfs::ticks_per_second().max(1));
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
    fn an_offset_is_good_until_it_is_old_or_the_clock_is_set() {
        let (sampled, offset) = (5_000_000_000, Duration::from_secs(1_000));
        let at = |seconds: u64| UNIX_EPOCH + offset + Duration::from_secs(seconds);
        let is_good = |now, wall| is_good(sampled, offset, now, wall);
        assert!(is_good(6_000_000_000, at(6)));
        assert!(!is_good(16_000_000_000, at(16)));
        // Set forward, set back, and asleep: only the wall clock goes on then.
        assert!(!is_good(6_000_000_000, at(3_600)));
        assert!(!is_good(6_000_000_000, UNIX_EPOCH));
        assert!(!is_good(6_000_000_000, at(7)));
    }

    #[test]
    fn wall_time_moves_with_the_monotonic_clock() {
        let now = monotonic_ns();
        let second = wall_time(now + 1_000_000_000).duration_since(wall_time(now)).unwrap();
        // It may be sampled anew in between.
        assert!((0.999..1.001).contains(&second.as_secs_f64()), "{second:?}");
        let late = SystemTime::now().duration_since(wall_time(monotonic_ns())).unwrap_or_default();
        assert!(late < Duration::from_millis(100), "{late:?}");
    }
}
