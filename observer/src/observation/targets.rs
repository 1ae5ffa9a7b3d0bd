//! The processes under observation: those given by their ids, and those that a selector (`process/choice.rs`) matches
//! once they listen or wait for events.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context as _, Result};
use observer_common::process::Target as RawTarget;

use super::{
    missing::MissingSources,
    parameters::Parameters,
    round_robin::{BATCH, RoundRobin},
};
use crate::{
    process::{self, Process, choice::Choice},
    read::{entries::entries, maps::Maps},
};

/// Maximum number of exited processes that are kept for the report. The oldest are forgotten.
pub(super) const EXITED_LIMIT: usize = 1024;

/// The processes under observation.
pub(super) struct Targets {
    /// Processes given by their ids.
    pids: BTreeSet<u32>,
    choice: Choice,
    /// Whether children are observed as well.
    follow: bool,
    /// Number of execs of each target when it was last checked against the exclusions.
    evaluated_execs: HashMap<u32, u32>,
    /// Ancestors of each live target, with their start times; only if the selection may change.
    ancestors: HashMap<u32, BTreeSet<(u32, u64)>>,
    live: BTreeMap<u32, Process>,
    /// The program of each live target at the last refresh.
    programs: HashMap<u32, Program>,
    exited: Vec<Process>,
    /// Whose names are read again next.
    to_rename: RoundRobin<u32>,
    is_refreshed: bool,
}

/// A program that a process runs.
#[derive(Clone, Copy)]
struct Program {
    /// Start time of the process in clock ticks, which distinguishes processes with the same id. `None` if the process
    /// had exited by then.
    started: Option<u64>,
    /// Number of execs.
    execs: u32,
}

/// Result of a refresh.
#[derive(Default)]
pub(super) struct Changes {
    /// Live targets whose runtimes may be attached to, each with its number of execs.
    pub(super) live: Vec<(u32, u32)>,
    /// Whether targets have appeared or exited.
    pub(super) has_changed: bool,
    /// Targets that have exited.
    pub(super) exited: Vec<u32>,
    /// Targets that now run another program.
    pub(super) execed: Vec<u32>,
}

impl Targets {
    pub(super) fn of(parameters: &Parameters) -> Self {
        Self {
            pids: parameters.pids.clone(),
            choice: parameters.choice.clone(),
            follow: parameters.follow,
            evaluated_execs: HashMap::new(),
            ancestors: HashMap::new(),
            live: BTreeMap::new(),
            programs: HashMap::new(),
            exited: Vec::new(),
            to_rename: RoundRobin::default(),
            is_refreshed: false,
        }
    }

    /// Adds all processes that are selected now as targets, before the programs are attached.
    pub(super) fn insert_selected(&self, maps: &mut Maps) -> Result<BTreeSet<u32>> {
        let selected = &self.pids | &self.choice.present();
        for &pid in &selected {
            maps.targets.insert_new(pid, RawTarget::default()).context("cannot add a target")?;
        }
        Ok(selected)
    }

    /// Live targets, by process id.
    pub(super) const fn live(&self) -> &BTreeMap<u32, Process> {
        &self.live
    }

    /// Live and exited targets, each with whether it has exited.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Process, bool)> {
        let exited = self.exited.iter().map(|process| (process, true));
        exited.chain(self.live.values().map(|process| (process, false)))
    }

    /// A process that is or was a target, if it is still remembered.
    pub(super) fn get(&self, pid: u32) -> Option<&Process> {
        self.live.get(&pid).or_else(|| self.exited.iter().rfind(|process| process.pid == pid))
    }

    /// Processes given by their ids.
    pub(super) const fn pids(&self) -> &BTreeSet<u32> {
        &self.pids
    }

    /// Whether processes are selected by anything but their ids.
    pub(super) fn are_selected(&self) -> bool {
        !self.choice.is_none()
    }

    /// Whether all targets have exited and no others can appear.
    pub(super) fn is_over(&self) -> bool {
        self.live.is_empty() && !self.are_selected()
    }

    /// Whether a process is or was a target. If processes are selected only by their ids, all that the programs report
    /// are.
    pub(super) fn is_target(&self, maps: &Maps, pid: u32) -> bool {
        !self.are_selected()
            || self.live.contains_key(&pid)
            || maps
                .targets
                .get(&pid, 0)
                .map_or_else(|_gone| self.get(pid).is_some(), |target| target.is_candidate == 0)
    }

    /// Adds these processes as targets, with the children that they had before the programs could see forks. Returns
    /// those that are new.
    pub(super) fn adopt(
        &self,
        maps: &mut Maps,
        missing: &mut MissingSources,
        mut targets: BTreeSet<u32>,
    ) -> Result<BTreeSet<u32>> {
        if self.follow {
            loop {
                let children = process::descendants(&targets);
                if children.is_empty() {
                    break;
                }
                targets.extend(children);
            }
        }
        let excluded = self.choice.excluded(targets.difference(&self.pids).copied());
        targets.retain(|pid| !excluded.contains(pid));
        // observer may be a child of a target: of the process that started it.
        targets.remove(&std::process::id());
        let mut new = BTreeSet::new();
        for &pid in &targets {
            let is_known = maps.targets.get(&pid, 0).is_ok_and(|target| target.is_candidate == 0);
            if !is_known {
                if !maps.targets.set(pid, RawTarget::default())? {
                    missing.add("some processes", "there are more than --capacity allows");
                    continue;
                }
                new.insert(pid);
            }
            // The programs do not see the exit of a process that had exited before it became a target.
            if !process::is_there(pid) {
                let gone = RawTarget { exited: 1, ..RawTarget::default() };
                maps.targets.set(pid, gone)?;
            }
        }
        Ok(new)
    }

    /// Accepts or rejects the candidates that the programs have nominated. Returns the rejected ones.
    pub(super) fn select(&self, maps: &mut Maps, missing: &mut MissingSources) -> Result<BTreeSet<u32>> {
        if !self.are_selected() {
            return Ok(BTreeSet::new());
        }
        let candidates = entries(&maps.targets).into_iter().filter(|(_, raw)| raw.is_candidate != 0);
        let (gone, there): (Vec<_>, Vec<_>) = candidates.partition(|(_, raw)| raw.exited != 0);
        let (wanted, mut others) = self.choice.divide(there.into_iter().map(|(pid, _)| pid).collect());
        others.extend(gone.into_iter().map(|(pid, _)| pid));
        self.adopt(maps, missing, wanted)?;
        reject(maps, &others);
        Ok(others)
    }

    /// Removes targets that were added as children, or that run another program now, and that are excluded. Returns
    /// them.
    pub(super) fn exclude(&mut self, maps: &mut Maps) -> BTreeSet<u32> {
        if self.choice.exclude.is_none() {
            return BTreeSet::new();
        }
        let observed = entries(&maps.targets).into_iter().filter(|(_, raw)| raw.is_candidate == 0);
        let observed: HashMap<u32, u32> = observed.map(|(pid, raw)| (pid, raw.execs)).collect();
        let changed = observed.iter().filter(|&(pid, execs)| self.evaluated_execs.get(pid) != Some(execs));
        let excluded =
            self.choice.excluded(changed.map(|(&pid, _)| pid).filter(|pid| !self.pids.contains(pid)));
        self.evaluated_execs = observed;
        self.release(maps, &excluded);
        excluded
    }

    /// Changes the selection. Targets that are still selected keep their metrics. Returns the new targets and the
    /// removed ones.
    pub(super) fn choose(
        &mut self,
        maps: &mut Maps,
        missing: &mut MissingSources,
        choice: Choice,
    ) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
        let may_release = !choice.include.cover(&self.choice.include);
        self.choice = choice;
        self.evaluated_execs.clear();
        // Processes that were rejected before may be selected now.
        for (pid, _) in entries(&maps.rejected) {
            let _gone = maps.rejected.remove(&pid);
        }
        let wanted: BTreeSet<u32> = &self.pids | &self.choice.present();
        let new = self.adopt(maps, missing, wanted.clone())?;
        let mut released = if may_release { self.live_except(wanted) } else { BTreeSet::new() };
        self.release(maps, &released);
        released.extend(self.exclude(maps));
        Ok((new, released))
    }

    /// Live targets that are neither in `wanted` nor, if children are followed, descendants of these.
    fn live_except(&self, mut wanted: BTreeSet<u32>) -> BTreeSet<u32> {
        if self.follow {
            let of_wanted = |(pid, started): &(u32, u64)| {
                wanted.contains(pid) && process::start_ticks(*pid) == Some(*started)
            };
            let orphans = self.ancestors.iter().filter(|(_, ancestors)| ancestors.iter().any(of_wanted));
            let orphans: BTreeSet<u32> = orphans.map(|(pid, _)| *pid).collect();
            wanted.extend(process::descendants(&wanted));
            wanted.extend(orphans);
        }
        self.live.keys().filter(|pid| !wanted.contains(pid)).copied().collect()
    }

    /// Removes processes that continue to run, as if they had never been targets.
    fn release(&mut self, maps: &mut Maps, pids: &BTreeSet<u32>) {
        for pid in pids {
            self.live.remove(pid);
            self.ancestors.remove(pid);
            self.programs.remove(pid);
        }
        reject(maps, pids);
    }

    /// Updates the targets from what the programs have seen.
    pub(super) fn refresh(&mut self, maps: &mut Maps) -> Changes {
        // Many selected processes exit soon. New ones are attached to only at their second refresh.
        let waits = self.is_refreshed && self.are_selected();
        self.is_refreshed = true;
        let mut changes = Changes::default();
        for (pid, raw) in entries(&maps.targets) {
            if raw.is_candidate != 0 {
                continue;
            }
            if raw.exited != 0 {
                self.remember_exit(pid, &mut changes);
                // The entry may be gone already, if the process had exited before it became a target.
                let _gone = maps.targets.remove(pid);
                if self.are_selected() && process::is_there(pid) {
                    // The id was reused, and the new process is observed under it: it becomes a candidate.
                    let next = RawTarget { is_candidate: 1, ..RawTarget::default() };
                    let _has_room = maps.targets.insert_new(pid, next);
                }
                continue;
            }
            let has_execed = self.note_program(pid, raw.execs, &mut changes);
            let is_new = !self.live.contains_key(&pid);
            if is_new {
                self.live.insert(pid, Process::of(pid));
                self.remember_ancestors(pid);
                changes.has_changed = true;
            } else if has_execed
                && let Some(process) = self.live.get_mut(&pid)
                && process::is_there(pid)
            {
                process.refresh();
                changes.execed.push(pid);
            }
            if !is_new || !waits {
                changes.live.push((pid, raw.execs));
            }
        }
        let surplus = self.exited.len().saturating_sub(EXITED_LIMIT);
        self.exited.drain(..surplus);
        changes
    }

    /// Records the program of a target. Returns whether it has changed.
    fn note_program(&mut self, pid: u32, execs: u32, changes: &mut Changes) -> bool {
        let last = self.programs.get(&pid).copied();
        let has_execed = last.is_some_and(|last| last.execs != execs);
        if last.is_none() || has_execed {
            let started = process::start_ticks(pid);
            // Forked by another target, with the id of a target that has exited since the last refresh. The entry is
            // that of the new process, and does not report the exit.
            if last.is_some_and(|last| started.is_some() && started != last.started) {
                self.remember_exit(pid, changes);
            }
            let started = started.or(last.and_then(|last| last.started));
            self.programs.insert(pid, Program { started, execs });
        }
        has_execed
    }

    fn remember_exit(&mut self, pid: u32, changes: &mut Changes) {
        let process = self.live.remove(&pid).unwrap_or_else(|| Process::of(pid));
        self.ancestors.remove(&pid);
        self.exited.push(process);
        self.programs.remove(&pid);
        changes.exited.push(pid);
        changes.has_changed = true;
    }

    /// Records the ancestors of a process. Some may have exited by the time that the selection changes.
    fn remember_ancestors(&mut self, pid: u32) {
        if self.follow && self.choice.may_change {
            let mut ancestors = process::ancestors(pid);
            // With the ancestors that those had while more of them were running.
            let known = ancestors.iter().filter_map(|(pid, _)| self.ancestors.get(pid)).flatten();
            let known: Vec<_> = known.copied().collect();
            ancestors.extend(known);
            self.ancestors.insert(pid, ancestors);
        }
    }

    /// Reads some of the names again: a process may have been renamed, or moved to another cgroup.
    pub(super) fn rename_some(&mut self) {
        for pid in self.to_rename.next(&self.live) {
            if let Some(process) = self.live.get_mut(&pid)
                && process::is_there(pid)
            {
                process.refresh();
            }
        }
    }

    /// Reads all names again.
    pub(super) fn rename_all(&mut self) {
        for _ in 0..self.live.len().div_ceil(BATCH) {
            self.rename_some();
        }
    }
}

/// Has the programs ignore these processes until they run another program.
fn reject(maps: &mut Maps, pids: &BTreeSet<u32>) {
    for pid in pids {
        let _most_recent = maps.rejected.insert(pid, 0, 0);
        // The id of an exited process may be reused.
        if !process::is_there(*pid) {
            let _not_there = maps.rejected.remove(pid);
        }
        let _gone = maps.targets.remove(*pid);
    }
}
