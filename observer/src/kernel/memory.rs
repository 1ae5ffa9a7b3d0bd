//! What observer takes of the kernel's memory, as the kernel itself says.

use std::{
    collections::BTreeMap,
    fs::{self, DirEntry},
    io,
};

/// Bytes of all maps that this process holds open.
pub(crate) fn of_maps() -> io::Result<u64> {
    let descriptors = fs::read_dir("/proc/self/fdinfo")?.flatten();
    // One that was closed meanwhile is none of ours.
    let maps = descriptors.filter_map(|entry: DirEntry| map(&fs::read_to_string(entry.path()).ok()?));
    // Several descriptors may mean the same map.
    Ok(maps.collect::<BTreeMap<_, _>>().values().sum())
}

/// Number and size of the map that this describes, if it describes one.
fn map(description: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        description.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
    };
    Some((field("map_id")?, field("memlock")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_a_number_and_a_size() {
        let text = "pos:\t0\nflags:\t02000002\nmap_type:\t1\nkey_size:\t4\nmax_entries:\t4096\nmemlock:\t430416\nmap_id:\t18\nfrozen:\t0\n";
        assert_eq!(map(text), Some((18, 430_416)));
        assert_eq!(map("pos:\t0\nprog_type:\t5\nmemlock:\t4096\nprog_id:\t7\n"), None);
    }
}
