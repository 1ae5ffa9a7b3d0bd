//! Reads many entries of a map with one system call, where the kernel has that (Linux 5.6) and lets observer: one for each
//! key and one for each value would be most of what a scrape of a thousand targets takes.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::{HashMap, IterableMap as _, MapData};
use nix::libc;

/// The command of `bpf()`.
const LOOKUP_BATCH: libc::c_int = 24;

/// Entries asked for at once, at first. The kernel wants room for all that share a place in its table.
const FIRST: u32 = 64;

/// Entries asked for at once, at most: so many share a place in no map of ours.
const MOST: u32 = 8192;

/// Calls for one map, at most: in each the kernel gets ahead.
const CALLS: usize = 1 << 16;

/// What `bpf()` is told, as in `union bpf_attr`.
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

/// All entries of a hash map, as they are read place by place: one that is moved meanwhile may be left out, but none is
/// there twice. An error means that they have to be read one by one.
pub(super) fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> io::Result<Vec<(K, V)>> {
    let descriptor = u32::try_from(map.map().fd().as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut all = Vec::new();
    let mut size = FIRST;
    let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
    // Where the kernel has got to; at first there is no such place.
    let (mut place, mut next, mut has_begun) = (0_u32, 0_u32, false);
    for _ in 0..CALLS {
        keys.reserve(size as usize);
        values.reserve(size as usize);
        let mut request = Request {
            from: if has_begun { (&raw const place) as u64 } else { 0 },
            next: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: size,
            map: descriptor,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: there is room for `count` keys and values of the map's own sizes, which its type has checked, and for
        // the places; all of them outlive the call.
        let returned =
            unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut request, size_of::<Request>()) };
        let failure = if returned == 0 { None } else { Some(io::Error::last_os_error()) };
        let is_over = match failure {
            None => false,
            Some(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::ENOSPC) if size < MOST => {
                    size *= 2;
                    continue;
                }
                _ => return Err(error),
            },
        };
        // SAFETY: the kernel has written so many, and any bytes are one of these.
        unsafe {
            keys.set_len(request.count.min(size) as usize);
            values.set_len(request.count.min(size) as usize);
        }
        all.extend(keys.drain(..).zip(values.drain(..)));
        if is_over {
            return Ok(all);
        }
        (place, has_begun) = (next, true);
    }
    Err(io::Error::other("a map without an end"))
}
