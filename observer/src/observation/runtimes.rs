//! Attaches to the runtimes of targets: to their garbage collectors and to the hooks of deferred tasks.

use std::collections::BTreeSet;

use aya::Ebpf;

use super::{
    attach_limiter::AttachLimiter,
    deferred::TaskTracker,
    missing::MissingSources,
    parameters::Parameters,
    targets::{EXITED_LIMIT, Targets},
};
use crate::{probes::gc::Collectors, process::runtime::Runtimes as Recognizer, profiles, read::maps::Maps};

/// The attachments to the runtimes of targets.
pub(super) struct Runtimes {
    recognizer: Recognizer,
    limiter: AttachLimiter,
    pub(super) collectors: Collectors,
    pub(super) tasks: TaskTracker,
}

impl Runtimes {
    pub(super) fn of(parameters: &Parameters) -> Self {
        let is_limited = parameters.is_limited;
        Self {
            recognizer: Recognizer::of_profiles(parameters.profiles.clone())
                .asked_for(|profile| profiles::is_asked_for(profile, is_limited)),
            limiter: AttachLimiter::at(parameters.attach_per_second),
            collectors: Collectors::at_most(parameters.capacity.collectors()),
            tasks: TaskTracker::new(is_limited, parameters.capacity),
        }
    }

    /// Attaches to the runtimes of live targets, each given with its number of execs.
    pub(super) fn refresh(
        &mut self,
        ebpf: &mut Ebpf,
        maps: &mut Maps,
        missing: &mut MissingSources,
        targets: &Targets,
        live: &[(u32, u32)],
    ) {
        let live = if targets.are_selected() {
            self.limiter.admit(live.to_vec(), targets.pids())
        } else {
            live.to_vec()
        };
        for (pid, execs) in live {
            missing.extend(self.tasks.refresh(&mut self.recognizer, ebpf, maps, pid, execs));
            missing.extend(self.collectors.refresh(&mut self.recognizer, ebpf, maps, pid, execs));
            self.note_unmatched(maps, missing, targets, pid);
        }
        self.tasks.adopt_connections(maps);
    }

    /// Processes whose runtimes wait to be attached to.
    pub(super) fn waiting(&self) -> u64 {
        self.limiter.waiting()
    }

    /// Keeps the final metrics of a target that has exited.
    pub(super) fn exited(
        &mut self,
        maps: &mut Maps,
        missing: &mut MissingSources,
        targets: &Targets,
        pid: u32,
    ) {
        self.note_unmatched(maps, missing, targets, pid);
        self.collectors.exited(maps, pid, EXITED_LIMIT);
        self.tasks.exited(maps, pid, EXITED_LIMIT);
    }

    /// Stops watching processes that continue to run.
    pub(super) fn release(&mut self, maps: &mut Maps, pids: &BTreeSet<u32>) {
        for &pid in pids {
            self.collectors.release(maps, pid);
            self.tasks.release(maps, pid);
        }
    }

    /// Reports hooks that do not match what the profile says.
    fn note_unmatched(&self, maps: &Maps, missing: &mut MissingSources, targets: &Targets, pid: u32) {
        let Some(process) = targets.get(pid) else { return };
        for hook in self.tasks.unmatched_hooks(maps, pid) {
            let source = format!("deferred tasks of {}, by {}", process.comm, hook.verb);
            missing.add(source, format!("{} fired {} times without a match", hook.place, hook.hits));
        }
    }

    /// Reports profiles that were asked for and matched no process.
    pub(super) fn note_unmet(&self, missing: &mut MissingSources) {
        for (profile, reason) in self.recognizer.unmet() {
            missing.add(format!("deferred tasks by the profile {profile}"), reason);
        }
    }
}
