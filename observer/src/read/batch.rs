//! Reads many entries of a map with one system call (`BPF_MAP_LOOKUP_BATCH`, since Linux 5.6) where the kernel permits
//! it. One call per key and one per value would take most of the time of a scrape with a thousand targets.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::{HashMap, IterableMap as _, MapData};
use nix::libc;

/// `BPF_MAP_LOOKUP_BATCH`, a command of `bpf()`.
const LOOKUP_BATCH: libc::c_int = 24;

/// Initial number of entries per call. The kernel needs space for all entries of a hash bucket.
const INITIAL_BATCH: u32 = 64;

/// Maximum number of entries per call: more than a hash bucket of any of our maps has.
const MAX_BATCH: u32 = 8192;

/// Maximum number of calls for one map; each makes progress.
const MAX_CALLS: usize = 1 << 16;

/// The part of `union bpf_attr` for batch operations.
#[repr(C)]
struct Request {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// All entries of a hash map, read bucket by bucket. An entry that is moved meanwhile can be missed, but none is
/// returned twice. After an error, the entries must be read one by one.
pub(super) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> io::Result<Vec<(K, V)>> {
    let descriptor = u32::try_from(map.map().fd().as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut all = Vec::new();
    let mut size = INITIAL_BATCH;
    let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
    // Position of the kernel's iteration; a null pointer starts it.
    let (mut position, mut next, mut has_begun) = (0_u32, 0_u32, false);
    for _ in 0..MAX_CALLS {
        keys.reserve(size as usize);
        values.reserve(size as usize);
        let mut request = Request {
            from: if has_begun { (&raw const position) as u64 } else { 0 },
            next: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: size,
            map: descriptor,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: `keys` and `values` have capacity for `count` entries of the map's key and value sizes, which aya has
        // checked against the types; they and the positions outlive the call.
        let returned =
            unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut request, size_of::<Request>()) };
        let failure = if returned == 0 { None } else { Some(io::Error::last_os_error()) };
        let is_over = match failure {
            None => false,
            Some(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::ENOSPC) if size < MAX_BATCH => {
                    size *= 2;
                    continue;
                }
                _ => return Err(error),
            },
        };
        // SAFETY: the kernel has initialised `count` entries, and any bytes are valid values of these types.
        unsafe {
            keys.set_len(request.count.min(size) as usize);
            values.set_len(request.count.min(size) as usize);
        }
        all.extend(keys.drain(..).zip(values.drain(..)));
        if is_over {
            return Ok(all);
        }
        (position, has_begun) = (next, true);
    }
    Err(io::Error::other("the iteration over the map does not end"))
}
