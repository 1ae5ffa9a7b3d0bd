//! Kernel memory that observer's maps use, as reported by the kernel.

use std::{
    collections::BTreeMap,
    fs::{self, DirEntry},
    io,
};

/// Sum of the sizes in bytes of all maps that this process has open.
pub(crate) fn of_maps() -> io::Result<u64> {
    let descriptors = fs::read_dir("/proc/self/fdinfo")?.flatten();
    // A descriptor that was closed meanwhile is not counted.
    let maps = descriptors.filter_map(|entry: DirEntry| map(&fs::read_to_string(entry.path()).ok()?));
    // Several descriptors can refer to the same map.
    Ok(maps.collect::<BTreeMap<_, _>>().values().sum())
}

/// Id and size of the map that this `fdinfo` describes; `None` if it is not a map's.
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
    fn id_and_size_of_a_map_are_parsed() {
        let text = "pos:\t0\nflags:\t02000002\nmap_type:\t1\nkey_size:\t4\nmax_entries:\t4096\nmemlock:\t430416\nmap_id:\t18\nfrozen:\t0\n";
        assert_eq!(map(text), Some((18, 430_416)));
        assert_eq!(map("pos:\t0\nprog_type:\t5\nmemlock:\t4096\nprog_id:\t7\n"), None);
    }
}
