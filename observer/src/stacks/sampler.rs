//! Samples the native stack of one running thread: a `perf_event` CPU clock interrupts it and copies its registers and
//! stack. A sampler exists only while a slow slice lasts, so that threads cost nothing at other times.

use std::{io, time::Duration};

use perf_event::{
    Builder, SampleFlag, Sampler as Samples,
    data::{Record, Sample},
    events::Software,
};

use crate::{
    arch::registers::{Registers, SAMPLED},
    binary::memory::StackCopy,
};

/// How much of the stack each sample copies, in bytes.
const STACK_SIZE: u32 = 32 * 1024;
/// Size of the ring buffer, in bytes: it holds three of the largest samples.
const BUFFER_SIZE: usize = 128 * 1024;

/// First value of a call chain that is no address but a context marker (`PERF_CONTEXT_*`), which says whether the next
/// addresses are the kernel's or the user's.
const CONTEXT_MARKERS: u64 = u64::MAX - 4095;

/// Samples of one thread. Dropping it stops the sampling.
pub(super) struct Sampler(Samples);

impl Sampler {
    /// Samples a thread each time it has run on a CPU for `period`.
    pub(super) fn of(tid: u32, period: Duration) -> io::Result<Self> {
        let period = u64::try_from(period.as_nanos()).map_err(io::Error::other)?;
        let mask = SAMPLED.iter().fold(0, |mask, register| mask | 1 << register);
        let counter = Builder::new(Software::CPU_CLOCK)
            .observe_pid(i32::try_from(tid).map_err(io::Error::other)?)
            .any_cpu()
            .include_kernel()
            .sample_period(period)
            .sample(SampleFlag::CALLCHAIN | SampleFlag::REGS_USER | SampleFlag::STACK_USER)
            .exclude_callchain_user(true)
            .sample_regs_user(mask)
            .sample_stack_user(STACK_SIZE)
            .enabled(true)
            .build()?;
        counter.sampled(BUFFER_SIZE).map(Self)
    }

    /// Takes all samples since the last call and returns what `visit` made of the latest. `visit` gets the registers, the
    /// copied stack, and the addresses of the kernel functions that the thread was in, innermost first.
    pub(super) fn latest<T>(
        &mut self,
        mut visit: impl FnMut(Registers, &StackCopy<'_>, &[u64]) -> T,
    ) -> Option<T> {
        let mut latest = None;
        while let Some(record) = self.0.next_record() {
            if let Ok(Record::Sample(sample)) = record.parse_record() {
                latest = decode(&sample, &mut visit).or(latest);
            }
        }
        latest
    }
}

/// Decodes a sample for `visit`; `None` if it has no user registers or no stack.
fn decode<T>(
    sample: &Sample<'_>,
    visit: &mut impl FnMut(Registers, &StackCopy<'_>, &[u64]) -> T,
) -> Option<T> {
    let registers = Registers::of_sample(&sample.regs_user()?.regs)?;
    let is_address = |address: &u64| *address < CONTEXT_MARKERS;
    let kernel: Vec<u64> = sample.callchain()?.iter().copied().filter(is_address).collect();
    Some(visit(registers, &StackCopy { start: registers.sp, bytes: sample.stack_user()? }, &kernel))
}
