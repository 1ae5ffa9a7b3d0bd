//! Workers: processes of one program that serve one connection at a time each, such as the backends of PostgreSQL. They
//! are no event loops: while one is busy, it keeps nobody waiting but its own client, and connections that none has
//! accepted wait in the accept queue.

use std::collections::BTreeMap;

use super::{
    busy::Split,
    histogram::Histogram,
    snapshot::{Duty, Reactor, Target, Workers},
    stall::Stalls,
};

impl Workers {
    fn of(parent: u32, comm: &str, exe: &str) -> Self {
        Self {
            parent,
            comm: comm.into(),
            exe: exe.into(),
            running: 0,
            busy: 0,
            exited: 0,
            busy_seconds: 0.0,
            wait_seconds: 0.0,
            utilization: None,
            slice: Histogram::default(),
            split_seconds: Split::default(),
            stalls: Stalls::default(),
        }
    }

    /// Whether a process is one of them, or another child of their parent that runs the same program.
    pub(crate) fn has(&self, target: &Target) -> bool {
        target.parent == self.parent && target.exe == self.exe
    }

    fn add(&mut self, worker: &Reactor) {
        self.running += usize::from(!worker.exited);
        self.busy += usize::from(!worker.exited && worker.current_slice_seconds.is_some());
        self.exited += usize::from(worker.exited);
        self.busy_seconds += worker.busy_seconds;
        self.wait_seconds += worker.wait_seconds;
        let observed = self.busy_seconds + self.wait_seconds;
        self.utilization = (observed > 0.0).then(|| self.busy_seconds / observed);
        self.slice.merge(&worker.slice);
        self.split_seconds.add(&worker.split_seconds);
        self.stalls.merge(&worker.stalls);
    }
}

/// Marks the loops of these processes that are workers, and returns their groups. A process without siblings of its kind
/// is none: it may serve further clients later.
pub(crate) fn group(targets: &mut [Target]) -> Vec<Workers> {
    let mut members = BTreeMap::<_, Vec<usize>>::new();
    for (index, target) in targets.iter().enumerate() {
        for duty in [Duty::OneConnection, Duty::OneAtATime] {
            if target.parent != 0 && target.reactors.iter().any(|reactor| reactor.duty == duty) {
                members.entry((target.parent, target.exe.clone(), duty)).or_default().push(index);
            }
        }
    }
    let mut groups = BTreeMap::<_, Workers>::new();
    for ((parent, exe, duty), members) in members.into_iter().filter(|(_, members)| members.len() > 1) {
        let comm =
            targets.iter().find(|target| target.pid == parent).unwrap_or(&targets[members[0]]).comm.clone();
        let group =
            groups.entry((parent, exe)).or_insert_with_key(|(_, exe)| Workers::of(parent, &comm, exe));
        for index in members {
            for worker in targets[index].reactors.iter_mut().filter(|reactor| reactor.duty == duty) {
                worker.is_worker = true;
                group.add(worker);
            }
        }
    }
    let mut groups: Vec<Workers> = groups.into_values().collect();
    for group in &mut groups {
        group.stalls.rank_by_time();
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{export::live, model::late::Lateness};

    /// A process with this id, parent and duty, whose loop was busy for half of 2 s.
    fn process(pid: u32, parent: u32, duty: Duty) -> Target {
        let mut target =
            live::testing::snapshot(2.0, |reactor| live::testing::slept(reactor, 3)).targets.remove(0);
        (target.pid, target.parent) = (pid, parent);
        let reactor = &mut target.reactors[0];
        (reactor.duty, reactor.busy_seconds, reactor.wait_seconds) = (duty, 1.0, 1.0);
        target
    }

    #[test]
    fn processes_of_one_parent_and_duty_are_a_group() {
        let mut targets = vec![
            process(1, 0, Duty::OneAtATime),
            process(2, 1, Duty::OneAtATime),
            process(3, 1, Duty::OneAtATime),
            process(4, 1, Duty::Several),
            process(5, 1, Duty::OneConnection),
            process(6, 9, Duty::OneAtATime),
        ];
        targets[2].reactors[0].exited = true;
        let groups = group(&mut targets);
        assert_eq!(groups.len(), 1);
        let workers = &groups[0];
        assert_eq!((workers.parent, workers.running, workers.exited), (1, 1, 1));
        assert_eq!((workers.utilization, workers.busy_seconds), (Some(0.5), 2.0));
        let one = &targets[0].reactors[0];
        assert_eq!(workers.stalls.count, 2 * one.stalls.count);
        assert_eq!(workers.slice.count(), 2 * one.slice.count());
        assert_eq!(workers.stalls.sites.len(), 1);
        assert_eq!(workers.stalls.sites[0].count, 2 * one.stalls.sites[0].count);
        assert!((workers.stalls.sites[0].lag_share - 1.0).abs() < 1e-9);
        let marked: Vec<_> = targets.iter().map(|target| target.reactors[0].is_worker).collect();
        assert_eq!(marked, [false, true, true, false, false, false]);
        assert_eq!(targets[3].reactors[0].lateness(), Lateness::Late);
        assert_eq!(targets[1].reactors[0].lateness(), Lateness::InTime);
    }
}
