//! Finds or mounts tracefs, and reads the offsets of tracepoint fields from its `format` files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

const MOUNT_POINTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Mount point of tracefs; `None` if it is not mounted.
pub(crate) fn mounted() -> Option<PathBuf> {
    MOUNT_POINTS.iter().map(Path::new).find(|path| path.join("events").is_dir()).map(Path::to_path_buf)
}

/// Makes tracefs readable. If it is not mounted, mounts it in a new mount namespace, which disappears with this
/// process. Must run before any other thread is started, because a mount namespace is per thread.
pub(crate) fn ensure_mounted() -> Result<()> {
    if mounted().is_some() {
        return Ok(());
    }
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    // Mounts made later elsewhere (of a container) still propagate here; ours propagate nowhere.
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_SLAVE, nothing)
        .context("cannot make mounts private")?;
    mount(Some("nodev"), MOUNT_POINTS[0], Some("tracefs"), MsFlags::empty(), nothing)
        .context("cannot mount tracefs")
}

/// Whether the kernel has a tracepoint, written as `category/name`.
pub(crate) fn has(event: &str) -> bool {
    mounted().is_some_and(|root| root.join("events").join(event).is_dir())
}

/// Offset in bytes of a field in the record of a tracepoint.
pub(crate) fn offset(event: &str, field: &str) -> Result<u32> {
    let root = mounted().context("tracefs is not mounted")?;
    let path = root.join("events").join(event).join("format");
    let format = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    field_offset(&format, field).with_context(|| format!("{event} has no field {field}"))
}

/// Parses the `N` of `field:TYPE NAME; offset:N;` in a format file.
pub(crate) fn field_offset(format: &str, field: &str) -> Option<u32> {
    format.lines().find_map(|line| {
        let (declaration, rest) = line.trim().strip_prefix("field:")?.split_once(';')?;
        let name = declaration.rsplit([' ', '*']).next()?.split('[').next()?;
        (name == field).then(|| rest.trim().strip_prefix("offset:")?.split(';').next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: &str = "name: sys_enter_accept4\nID: 2234\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:int fd;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:struct sockaddr * upeer_sockaddr;\toffset:24;\tsize:8;\tsigned:0;\n\
        \tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;\n";

    #[test]
    fn fields_are_matched_by_their_whole_name() {
        assert_eq!(field_offset(FORMAT, "fd"), Some(16));
        assert_eq!(field_offset(FORMAT, "upeer_sockaddr"), Some(24));
        assert_eq!(field_offset(FORMAT, "prev_comm"), Some(8));
        assert_eq!(field_offset(FORMAT, "f"), None);
        assert_eq!(field_offset(FORMAT, "ret"), None);
    }
}
