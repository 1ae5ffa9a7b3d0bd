//! eBPF objects in the kernel. Objects of other observers are left out, because tests run concurrently.

use std::{collections::BTreeSet, fs, process::Command};

use serde_json::Value;

use super::{observer::Observer, wait_for};

/// Programs that every observer attaches.
const PROGRAMS: &[&str] = &["sched_switch", "sched_wakeup", "sock_state", "accept_enter", "accept_exit"];

/// Objects of a kind according to bpftool. bpftool fails if an object disappears while it lists them, so this retries.
fn bpftool_show(kind: &str) -> Vec<Value> {
    wait_for(&format!("bpftool {kind} show"), || {
        let output =
            Command::new("bpftool").args(["-j", kind, "show"]).output().expect("bpftool is installed");
        if !output.status.success() {
            return None;
        }
        // bpftool prints nothing if there are no objects.
        let is_empty = output.stdout.trim_ascii().is_empty();
        if is_empty { Some(Vec::new()) } else { serde_json::from_slice(&output.stdout).ok() }
    })
}

/// Ids of the objects that a process holds. `key` is the field in `fdinfo` for their kind.
fn object_ids(pid: &str, key: &str) -> BTreeSet<u64> {
    // A descriptor or the process may disappear while this reads.
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = descriptors.filter_map(|descriptor| fs::read_to_string(descriptor.path()).ok());
    let id = |text: String| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    texts.filter_map(id).collect()
}

/// Ids of the objects that any process holds.
fn all_object_ids(key: &str) -> BTreeSet<u64> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|process| process.file_name().into_string().ok());
    let pids = pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.flat_map(|pid| object_ids(&pid, key)).collect()
}

fn id(object: &Value) -> u64 {
    object["id"].as_u64().unwrap()
}

/// Programs of observer, and links to them, that no process holds.
fn orphaned_objects() -> Vec<Value> {
    // Listed before and after: objects that appear or disappear in between belong to a process that started or ended.
    let mut programs = bpftool_show("prog");
    programs.retain(|program| PROGRAMS.iter().any(|&name| program["name"] == name));
    let mut links = bpftool_show("link");
    links.retain(|link| programs.iter().any(|program| link["prog_id"] == program["id"]));
    let (held_programs, held_links) = (all_object_ids("prog_id:"), all_object_ids("link_id:"));
    programs.retain(|program| !held_programs.contains(&id(program)));
    links.retain(|link| !held_links.contains(&id(link)));
    let (still_programs, still_links) = (bpftool_show("prog"), bpftool_show("link"));
    let is_still = |list: &[Value], object: &Value| list.iter().any(|other| id(other) == id(object));
    programs.retain(|program| is_still(&still_programs, program));
    links.retain(|link| is_still(&still_links, link));
    programs.into_iter().chain(links).collect()
}

/// Waits until the kernel has freed all objects of observers that have ended: programs are freed an RCU grace period
/// after their last descriptor was closed.
pub(crate) fn wait_until_clean() {
    let mut orphaned = Vec::new();
    wait_for("the kernel to free the objects of ended observers", || {
        orphaned = orphaned_objects();
        orphaned.is_empty().then_some(())
    });
}

/// Names of the programs that an observer holds.
pub(crate) fn programs_of(observer: &Observer) -> BTreeSet<String> {
    let held = object_ids(&observer.pid().to_string(), "prog_id:");
    let programs = bpftool_show("prog").into_iter().filter(|program| held.contains(&id(program)));
    programs.filter_map(|program| program["name"].as_str().map(str::to_owned)).collect()
}

impl Observer {
    /// Number of held programs, of those that every observer attaches.
    pub(crate) fn programs(&self) -> usize {
        let held = programs_of(self);
        PROGRAMS.iter().filter(|&&name| held.contains(name)).count()
    }

    pub(crate) fn has_all_programs(&self) -> bool {
        self.programs() == PROGRAMS.len()
    }

    /// Kernel memory of its maps, in bytes.
    pub(crate) fn map_bytes(&self) -> u64 {
        let held = object_ids(&self.pid().to_string(), "map_id:");
        let maps = bpftool_show("map");
        let bytes = |map: &Value| map["bytes_memlock"].as_u64().unwrap();
        maps.iter().filter(|map| held.contains(&id(map))).map(bytes).sum()
    }

    /// Number of connections in its map of queued connections.
    pub(crate) fn queued_connections(&self) -> usize {
        self.map_entries("QUEUED")
    }

    /// Number of entries of one of its maps.
    pub(crate) fn map_entries(&self, map: &str) -> usize {
        let held = object_ids(&self.pid().to_string(), "map_id:");
        let maps = bpftool_show("map");
        let mut named = maps.iter().filter(|found| found["name"] == map && held.contains(&id(found)));
        let (found, more) = (named.next().unwrap_or_else(|| panic!("no map {map}")), named.next());
        assert!(more.is_none(), "two maps {map}");
        let output =
            Command::new("bpftool").args(["-j", "map", "dump", "id", &id(found).to_string()]).output();
        let entries: Vec<Value> = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        entries.len()
    }
}
