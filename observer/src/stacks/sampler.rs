//! Native stacks of one thread while it computes: the kernel's clock interrupts it and copies registers and stack. On only
//! while somebody wants to know, so that nobody pays at any other time.

use std::{io, time::Duration};

use perf_event::{
    Builder, SampleFlag, Sampler as Samples,
    data::{Record, Sample},
    events::Software,
};

use super::{memory::Copied, unwind::Registers};

/// How much of a stack is copied, in bytes.
const STACK: u32 = 32 * 1024;
/// Room for samples that nobody has fetched yet, in bytes: three of the largest.
const ROOM: usize = 128 * 1024;

/// Numbers of registers, as the kernel counts them for samples, in ascending order.
#[cfg(target_arch = "x86_64")]
const REGISTERS: [u32; 3] = [6, 7, 8];
#[cfg(target_arch = "aarch64")]
const REGISTERS: [u32; 4] = [29, 30, 31, 32];

/// Markers in a chain of addresses, for what kind the next ones are of; no code is there.
const MARKERS: u64 = u64::MAX - 4095;

/// A thread under the clock. Dropping it ends that.
pub(super) struct Sampler(Samples);

impl Sampler {
    /// Interrupts a thread whenever it has computed for so long.
    pub(super) fn of(tid: u32, period: Duration) -> io::Result<Self> {
        let period = u64::try_from(period.as_nanos()).map_err(io::Error::other)?;
        let mask = REGISTERS.iter().fold(0, |mask, register| mask | 1 << register);
        let counter = Builder::new(Software::CPU_CLOCK)
            .observe_pid(i32::try_from(tid).map_err(io::Error::other)?)
            .any_cpu()
            .include_kernel()
            .sample_period(period)
            .sample(SampleFlag::CALLCHAIN | SampleFlag::REGS_USER | SampleFlag::STACK_USER)
            .exclude_callchain_user(true)
            .sample_regs_user(mask)
            .sample_stack_user(STACK)
            .enabled(true)
            .build()?;
        counter.sampled(ROOM).map(Self)
    }

    /// The latest sample since the last time: registers, stack, and functions of the kernel it was in, by address,
    /// innermost first.
    pub(super) fn latest<T>(
        &mut self,
        mut see: impl FnMut(Registers, &Copied<'_>, &[u64]) -> T,
    ) -> Option<T> {
        let mut latest = None;
        while let Some(record) = self.0.next_record() {
            if let Ok(Record::Sample(sample)) = record.parse_record() {
                latest = seen(&sample, &mut see).or(latest);
            }
        }
        latest
    }
}

fn seen<T>(sample: &Sample<'_>, see: &mut impl FnMut(Registers, &Copied<'_>, &[u64]) -> T) -> Option<T> {
    let registers = &sample.regs_user()?.regs;
    #[cfg(target_arch = "x86_64")]
    let registers = match registers[..] {
        [bp, sp, ip] => Registers { ip, sp, bp },
        _ => return None,
    };
    #[cfg(target_arch = "aarch64")]
    let registers = match registers[..] {
        [bp, lr, sp, ip] => Registers { ip, sp, bp, lr },
        _ => return None,
    };
    let kernel: Vec<u64> = sample.callchain()?.iter().copied().filter(|&address| address < MARKERS).collect();
    Some(see(registers, &Copied { start: registers.sp, bytes: sample.stack_user()? }, &kernel))
}
