//! What a blocked thread waits for, and how its system call tells.

/// What a blocked thread waits for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// None of the others, or not known.
    Other = 0,
    /// Another thread or process: a futex, a file lock, a semaphore, the lock of an address space.
    Lock = 1,
    /// A file system.
    Disk = 2,
    /// A socket.
    Network = 3,
    /// Time alone.
    Sleep = 4,
    /// Memory that is not there: to be read from a file or from swap.
    PageFault = 5,
}

/// Number of [`Block`]s.
pub const BLOCKS: usize = 6;

impl Block {
    /// All of them, in index order.
    pub const ALL: [Self; BLOCKS] =
        [Self::Other, Self::Lock, Self::Disk, Self::Network, Self::Sleep, Self::PageFault];

    /// The one with this index; [`Block::Other`] if there is none.
    pub const fn of(index: u32) -> Self {
        if (index as usize) < BLOCKS { Self::ALL[index as usize] } else { Self::Other }
    }
}

/// How a system call tells what a thread inside it waits for: by itself, or by its arguments.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallClass {
    /// [`Block::Other`].
    Other = Block::Other as u8,
    /// [`Block::Lock`].
    Lock = Block::Lock as u8,
    /// [`Block::Disk`].
    Disk = Block::Disk as u8,
    /// [`Block::Network`].
    Network = Block::Network as u8,
    /// [`Block::Sleep`].
    Sleep = Block::Sleep as u8,
    /// By what its first argument, a descriptor, stands for.
    File = 16,
    /// By the first of the descriptors that its first argument points to (`poll`); it sleeps if the second says that
    /// there are none. Where that is no file but an event (`eventfd`), as runtimes use to wake a thread, it sleeps if the
    /// third argument tells for how long, and else waits for another thread.
    Poll = 17,
    /// By the lowest descriptor in the sets that its second and third argument point to (`select`); it sleeps if the
    /// first says that there are none.
    Select = 18,
    /// A futex: a [`Block::Lock`], or where a thread is parked that has nothing to do, which its third argument may tell.
    Futex = 19,
}

/// The value of a futex that a thread waits for a mutex at, in glibc, Rust's standard library and Go: held, and others wait.
/// Whoever parks waits at another value, or where another has been.
pub const CONTENDED: u32 = 2;

/// System calls told apart, by number; higher ones are [`SyscallClass::Other`].
pub const CALLS: usize = 512;

/// Stands for a block outside of any system call, or in one that is not known.
pub const NO_CALL: u32 = u32::MAX;
