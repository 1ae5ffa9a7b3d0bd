//! Which processes an observation is of: those that were asked for, and those that are selected as they come up.

use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use observer_common::process::Target as RawTarget;

use super::Observation;
use crate::{
    process::{self, choice::Choice},
    read::entries::entries,
};

impl Observation {
    /// Makes targets of these processes, and of the children that they had before the programs could follow them. Returns
    /// those that were none before.
    pub(super) fn adopt(&mut self, mut targets: BTreeSet<u32>) -> Result<BTreeSet<u32>> {
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
        // A child of whoever started it, who may well serve.
        targets.remove(&std::process::id());
        let mut new = BTreeSet::new();
        for &pid in &targets {
            let is_known = self.maps.targets.get(&pid, 0).is_ok_and(|target| target.is_candidate == 0);
            if !is_known {
                if !self.maps.targets.set(pid, RawTarget::default())? {
                    self.note_missing("some processes".into(), "there are too many".into());
                    continue;
                }
                new.insert(pid);
            }
            // A process that exited before the programs could see it would stay for ever.
            if !process::is_there(pid) {
                let gone = RawTarget { exited: 1, ..RawTarget::default() };
                self.maps.targets.set(pid, gone)?;
            }
        }
        Ok(new)
    }

    /// Whether a process is or was a target. All are that were not selected by more than their ids.
    pub(super) fn is_target(&self, pid: u32) -> bool {
        self.choice.is_none()
            || self.live.contains_key(&pid)
            || self
                .maps
                .targets
                .get(&pid, 0)
                .map_or_else(|_gone| self.process(pid).is_some(), |target| target.is_candidate == 0)
    }

    /// Decides on those that have come up for selection.
    pub(super) fn select(&mut self) -> Result<()> {
        if self.choice.is_none() {
            return Ok(());
        }
        let candidates = entries(&self.maps.targets).into_iter().filter(|(_, raw)| raw.is_candidate != 0);
        let (gone, there): (Vec<_>, Vec<_>) = candidates.partition(|(_, raw)| raw.exited != 0);
        let (wanted, mut others) = self.choice.divide(there.into_iter().map(|(pid, _)| pid).collect());
        others.extend(gone.into_iter().map(|(pid, _)| pid));
        self.adopt(wanted)?;
        self.turn_down(&others)
    }

    /// Lets go of those that are observed as somebody's children, or run another program now, and are to be left out.
    pub(super) fn leave_out(&mut self) -> Result<()> {
        if self.choice.exclude.is_none() {
            return Ok(());
        }
        let observed = entries(&self.maps.targets).into_iter().filter(|(_, raw)| raw.is_candidate == 0);
        let observed: HashMap<u32, u32> = observed.map(|(pid, raw)| (pid, raw.execs)).collect();
        let changed = observed.iter().filter(|&(pid, execs)| self.judged.get(pid) != Some(execs));
        let excluded =
            self.choice.excluded(changed.map(|(&pid, _)| pid).filter(|pid| !self.pids.contains(pid)));
        self.judged = observed;
        self.let_go_of(&excluded)
    }

    /// Remembers whom a process descends from, for when some of them are gone and others are chosen.
    pub(super) fn remember_ancestors(&mut self, pid: u32) {
        if self.follow && self.choice.may_change {
            let mut ancestors = process::ancestors(pid);
            // Of whoever is left of them, what was known before others were gone.
            let known = ancestors.iter().filter_map(|(pid, _)| self.ancestors.get(pid)).flatten();
            let known: Vec<_> = known.copied().collect();
            ancestors.extend(known);
            self.ancestors.insert(pid, ancestors);
        }
    }

    /// Chooses anew: those who stay lose nothing, others are found or let go.
    pub(crate) fn choose(&mut self, choice: Choice) -> Result<()> {
        let is_anybody_taken_away = !choice.include.cover(&self.choice.include);
        self.choice = choice;
        self.judged.clear();
        // Whom nobody wanted before may be wanted now.
        for (pid, _) in entries(&self.maps.strangers) {
            let _gone = self.maps.strangers.remove(&pid);
        }
        let wanted: BTreeSet<u32> = &self.pids | &self.choice.present();
        let new = self.adopt(wanted.clone())?;
        self.adopt_calls(new)?;
        if is_anybody_taken_away {
            self.let_go_of(&self.others_than(wanted))?;
        }
        self.leave_out()
    }

    /// Those that are observed and are none of these nor, where those are followed, descend from them.
    fn others_than(&self, mut wanted: BTreeSet<u32>) -> BTreeSet<u32> {
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

    /// Counts what became of a file that was read again.
    pub(crate) fn count_reload(&mut self, is_accepted: bool) {
        let count = if is_accepted { &mut self.service.accepted } else { &mut self.service.refused };
        *count += 1;
    }

    /// Observes processes no longer that go on, as if they never had been.
    fn let_go_of(&mut self, pids: &BTreeSet<u32>) -> Result<()> {
        for pid in pids {
            self.live.remove(pid);
            self.ancestors.remove(pid);
            self.programs.remove(pid);
            self.collectors.let_go(&mut self.maps, *pid);
            self.follower.let_go(&mut self.maps, *pid);
        }
        self.turn_down(pids)
    }

    /// Forgets all about candidates that are not wanted, or are gone already.
    fn turn_down(&mut self, pids: &BTreeSet<u32>) -> Result<()> {
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            let _most_recent = self.maps.strangers.insert(pid, 0, 0);
            // Those that are gone let their ids go to others.
            if !process::is_there(*pid) {
                let _no_stranger = self.maps.strangers.remove(pid);
            }
            let _gone = self.maps.targets.remove(*pid);
        }
        self.threads.retain(|_, thread| !pids.contains(&thread.pid));
        self.forget_listeners(pids)
    }
}
