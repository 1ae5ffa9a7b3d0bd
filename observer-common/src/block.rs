//! What a blocked thread waits for, and how its system call shows that: by its number, which has a class in
//! `observer/src/kernel/syscalls.rs`, or by its arguments (`observer-ebpf/src/state/system_call.rs`). What else a new cause
//! needs is in `observer/src/model/busy.rs`.

/// What a blocked thread waits for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// None of the others, or unknown.
    Other = 0,
    /// Another thread or process: a futex, a file lock, a semaphore, the lock of an address space.
    Lock = 1,
    /// A file system.
    Disk = 2,
    /// A socket.
    Network = 3,
    /// Only for time to pass.
    Sleep = 4,
    /// A page that must be read from a file or from swap.
    PageFault = 5,
}

/// Number of [`Block`] variants.
pub const BLOCKS: usize = 6;

impl Block {
    /// All variants, in index order.
    pub const ALL: [Self; BLOCKS] =
        [Self::Other, Self::Lock, Self::Disk, Self::Network, Self::Sleep, Self::PageFault];

    /// The variant with this index; [`Block::Other`] if there is none.
    pub const fn of(index: u32) -> Self {
        if (index as usize) < BLOCKS { Self::ALL[index as usize] } else { Self::Other }
    }
}

/// How a system call shows what a thread inside it waits for: the call alone determines it, or its arguments do.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallClass {
    /// Always [`Block::Other`].
    Other = Block::Other as u8,
    /// Always [`Block::Lock`].
    Lock = Block::Lock as u8,
    /// Always [`Block::Disk`].
    Disk = Block::Disk as u8,
    /// Always [`Block::Network`].
    Network = Block::Network as u8,
    /// Always [`Block::Sleep`].
    Sleep = Block::Sleep as u8,
    /// Depends on the type of the file behind the first argument, a descriptor.
    File = 16,
    /// Depends on the first descriptor in the array that the first argument points to (`poll`). It is [`Block::Sleep`]
    /// if the second argument says that the array is empty. If the descriptor is an anonymous file such as an
    /// `eventfd`, which runtimes use to wake a thread, it is [`Block::Sleep`] if the third argument is a timeout, and
    /// [`Block::Lock`] otherwise.
    Poll = 17,
    /// Depends on the lowest descriptor in the sets that the second and third argument point to (`select`). It is
    /// [`Block::Sleep`] if the first argument says that the sets are empty.
    Select = 18,
}

/// Number of system calls that are classified; those with higher numbers are [`SyscallClass::Other`].
pub const CALLS: usize = 512;

/// Marks a block outside of any system call, or in an unknown one.
pub const NO_CALL: u32 = u32::MAX;
