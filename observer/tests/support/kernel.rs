//! What observer holds in the kernel, told apart from what other observers hold: tests run beside each other.

use std::{collections::BTreeSet, fs, process::Command};

use serde_json::Value;

use super::{observer::Observer, wait_for};

/// Programs that every observer attaches.
const PROGRAMS: &[&str] = &["sched_switch", "sched_wakeup", "sock_state", "accept_enter", "accept_exit"];

/// What bpftool lists of a kind of object. It fails when one goes while it lists them, so it is asked again.
fn listed(kind: &str) -> Vec<Value> {
    wait_for(&format!("bpftool {kind} show"), || {
        let output =
            Command::new("bpftool").args(["-j", kind, "show"]).output().expect("bpftool is installed");
        if !output.status.success() {
            return None;
        }
        // It prints nothing where there is nothing.
        let is_empty = output.stdout.trim_ascii().is_empty();
        if is_empty { Some(Vec::new()) } else { serde_json::from_slice(&output.stdout).ok() }
    })
}

/// Ids of objects that a process holds, by the key that `fdinfo` has for their kind.
fn held_by(pid: &str, key: &str) -> BTreeSet<u64> {
    // A descriptor, or the whole process, may be gone by the time it is read.
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = descriptors.filter_map(|descriptor| fs::read_to_string(descriptor.path()).ok());
    let id = |text: String| text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    texts.filter_map(id).collect()
}

/// The same of all processes.
fn held(key: &str) -> BTreeSet<u64> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|process| process.file_name().into_string().ok());
    let pids = pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.flat_map(|pid| held_by(&pid, key)).collect()
}

fn id(object: &Value) -> u64 {
    object["id"].as_u64().unwrap()
}

/// Programs of ours and links to them that are in the kernel though no process holds them.
fn leftovers() -> Vec<Value> {
    // Before and after: what comes and goes in between is held by somebody who came or went.
    let mut programs = listed("prog");
    programs.retain(|program| PROGRAMS.iter().any(|&name| program["name"] == name));
    let mut links = listed("link");
    links.retain(|link| programs.iter().any(|program| link["prog_id"] == program["id"]));
    let (held_programs, held_links) = (held("prog_id:"), held("link_id:"));
    programs.retain(|program| !held_programs.contains(&id(program)));
    links.retain(|link| !held_links.contains(&id(link)));
    let (still_programs, still_links) = (listed("prog"), listed("link"));
    let is_still = |list: &[Value], object: &Value| list.iter().any(|other| id(other) == id(object));
    programs.retain(|program| is_still(&still_programs, program));
    links.retain(|link| is_still(&still_links, link));
    programs.into_iter().chain(links).collect()
}

/// Waits until nothing is in the kernel of an observer that has ended: programs are freed a grace period after their last
/// descriptor.
pub(crate) fn wait_until_clean() {
    let mut left = Vec::new();
    wait_for("the kernel to free what ended observers had in it", || {
        left = leftovers();
        left.is_empty().then_some(())
    });
}

/// Names of the programs that an observer holds.
pub(crate) fn programs_of(observer: &Observer) -> BTreeSet<String> {
    let held = held_by(&observer.pid().to_string(), "prog_id:");
    let programs = listed("prog").into_iter().filter(|program| held.contains(&id(program)));
    programs.filter_map(|program| program["name"].as_str().map(str::to_owned)).collect()
}

impl Observer {
    /// How many of the programs that every observer attaches this one holds.
    pub(crate) fn programs(&self) -> usize {
        let held = programs_of(self);
        PROGRAMS.iter().filter(|&&name| held.contains(name)).count()
    }

    pub(crate) fn has_all_programs(&self) -> bool {
        self.programs() == PROGRAMS.len()
    }

    /// What its maps take of the kernel's memory.
    pub(crate) fn map_bytes(&self) -> u64 {
        let held = held_by(&self.pid().to_string(), "map_id:");
        let maps = listed("map");
        let bytes = |map: &Value| map["bytes_memlock"].as_u64().unwrap();
        maps.iter().filter(|map| held.contains(&id(map))).map(bytes).sum()
    }

    /// Connections that its programs remember as waiting.
    pub(crate) fn in_flight(&self) -> usize {
        self.entries_of("QUEUED")
    }

    /// How many entries a map of its programs has.
    pub(crate) fn entries_of(&self, map: &str) -> usize {
        let held = held_by(&self.pid().to_string(), "map_id:");
        let maps = listed("map");
        let mut named = maps.iter().filter(|listed| listed["name"] == map && held.contains(&id(listed)));
        let (found, more) = (named.next().unwrap_or_else(|| panic!("no map {map}")), named.next());
        assert!(more.is_none(), "two maps {map}");
        let output =
            Command::new("bpftool").args(["-j", "map", "dump", "id", &id(found).to_string()]).output();
        let entries: Vec<Value> = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        entries.len()
    }
}
