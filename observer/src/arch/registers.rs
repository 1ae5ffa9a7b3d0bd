//! The registers from which a stack is unwound.

#[cfg(target_arch = "aarch64")]
pub(crate) use framehop::aarch64::{CacheAarch64 as Rules, UnwinderAarch64 as Unwinder};
#[cfg(target_arch = "x86_64")]
pub(crate) use framehop::x86_64::{CacheX86_64 as Rules, UnwinderX86_64 as Unwinder};

#[cfg(target_arch = "aarch64")]
use framehop::aarch64::UnwindRegsAarch64 as UnwindRegisters;
#[cfg(target_arch = "x86_64")]
use framehop::x86_64::UnwindRegsX86_64 as UnwindRegisters;

/// User registers of a thread at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    /// Instruction pointer.
    pub(crate) ip: u64,
    /// Stack pointer.
    pub(crate) sp: u64,
    /// Frame pointer.
    pub(crate) bp: u64,
    /// Link register.
    #[cfg(target_arch = "aarch64")]
    pub(crate) lr: u64,
}

/// Registers that a `perf_event` sample copies, by their `PERF_REG_*` numbers in ascending order, which is their order in a
/// sample: on x86-64 `bp`, `sp` and `ip`, on aarch64 `x29`, `lr`, `sp` and `pc`.
#[cfg(target_arch = "x86_64")]
pub(crate) const SAMPLED: [u32; 3] = [6, 7, 8];
#[cfg(target_arch = "aarch64")]
pub(crate) const SAMPLED: [u32; 4] = [29, 30, 31, 32];

impl Registers {
    /// The registers of a sample with [`SAMPLED`].
    pub(crate) fn of_sample(registers: &[u64]) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        let &[bp, sp, ip] = registers else { return None };
        #[cfg(target_arch = "x86_64")]
        return Some(Self { ip, sp, bp });
        #[cfg(target_arch = "aarch64")]
        let &[bp, lr, sp, ip] = registers else { return None };
        #[cfg(target_arch = "aarch64")]
        return Some(Self { ip, sp, bp, lr });
    }

    /// The state from which the unwinder starts.
    pub(crate) fn unwind_state(self) -> UnwindRegisters {
        #[cfg(target_arch = "x86_64")]
        return UnwindRegisters::new(self.ip, self.sp, self.bp);
        #[cfg(target_arch = "aarch64")]
        return UnwindRegisters::new(self.lr, self.sp, self.bp);
    }
}
