//! The subjects of series, such as a listener or an event loop, and their labels. The number of subjects that are
//! reported individually is limited, and the limit applies to all families about a subject.

use super::{
    deferred::{Deferred, HookCounters},
    place::Place,
    snapshot::{Listener, Missing, Reactor, Snapshot, Target},
};

/// The subject of the series of a family. Only a limited number of each is reported individually.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// Listeners.
    Listener,
    /// Event loops.
    Reactor,
    /// Kinds of deferred tasks.
    Task,
    /// Hooks in runtimes.
    Hook,
    /// Processes.
    Target,
    /// Processes, with the program that they run.
    Program,
    /// Sources of metrics that are unavailable.
    Source,
    /// observer itself, which is a single subject.
    Own,
}

impl Subject {
    /// Subject of series with these label names.
    pub(crate) fn of(labels: &[&str]) -> Self {
        let subjects = [
            (LISTENER, Self::Listener),
            (REACTOR, Self::Reactor),
            (TASK, Self::Task),
            (HOOK, Self::Hook),
            (PROGRAM, Self::Program),
            (TARGET, Self::Target),
            (SOURCE, Self::Source),
        ];
        let found = subjects.into_iter().find(|(named, _)| labels.starts_with(named));
        found.map_or(Self::Own, |(_, subject)| subject)
    }

    /// Number of labels, at the beginning, that identify a subject.
    pub(crate) const fn labels(self) -> usize {
        match self {
            Self::Listener => LISTENER.len(),
            Self::Reactor => REACTOR.len(),
            Self::Task => TASK.len(),
            Self::Hook => HOOK.len(),
            Self::Target => TARGET.len(),
            Self::Program => PROGRAM.len(),
            Self::Source => SOURCE.len(),
            Self::Own => 0,
        }
    }

    /// Indexes of the labels that are constant during the lifetime of a subject. Names may change.
    pub(crate) const fn lasting_labels(self) -> &'static [usize] {
        match self {
            Self::Listener | Self::Reactor | Self::Task => &[0, 4],
            Self::Hook => &[0, 4, 5, 6],
            Self::Target | Self::Program => &[0],
            Self::Source => &[0, 1],
            Self::Own => &[],
        }
    }
}

pub(super) const TARGET: &[&str] = &["pid", "comm", "container", "pod"];
pub(super) const LISTENER: &[&str] = &["pid", "comm", "container", "pod", "listener"];
pub(super) const REACTOR: &[&str] = &["pid", "comm", "container", "pod", "tid", "reactor"];
pub(super) const TASK: &[&str] = &["pid", "comm", "container", "pod", "task"];
pub(super) const HOOK: &[&str] = &["pid", "comm", "container", "pod", "profile", "verb", "place"];
pub(super) const PROGRAM: &[&str] =
    &["pid", "comm", "container", "pod", "exe", "namespace", "container_name", "pod_uid", "unit"];
pub(super) const SOURCE: &[&str] = &["source", "reason"];

/// All subjects of a snapshot, with the labels that identify them. Subjects without a series are left out, because
/// they would count towards the limit. observer itself is not limited.
pub(crate) fn subjects<'s>(snapshot: &'s Snapshot) -> impl Iterator<Item = (Subject, Vec<String>)> + use<'s> {
    let of_target = |target: &'s Target| {
        let programs = [(Subject::Program, target_labels(target))];
        let is_runtime = target.gc.is_some() || !target.hooks.is_empty();
        let targets = is_runtime.then(|| (Subject::Target, target_labels(target)));
        let tasks = target.deferred.iter().map(|deferred| (Subject::Task, task_labels(target, deferred)));
        let hooks = target.hooks.iter().map(|hook| (Subject::Hook, hook_labels(target, hook)));
        programs.into_iter().chain(targets).chain(tasks).chain(hooks)
    };
    let listeners = live_listeners(snapshot).map(|(t, l)| (Subject::Listener, listener_labels(t, l)));
    let reactors = live_reactors(snapshot).map(|(t, r)| (Subject::Reactor, reactor_labels(t, r)));
    let sources = snapshot.own.missing.iter().map(|missing| (Subject::Source, source_labels(missing)));
    listeners.chain(reactors).chain(live(snapshot).flat_map(of_target)).chain(sources)
}

/// Targets with series: those that have not exited.
pub(super) fn live(snapshot: &Snapshot) -> impl Iterator<Item = &Target> {
    snapshot.targets.iter().filter(|target| !target.exited)
}

pub(super) fn live_reactors(snapshot: &Snapshot) -> impl Iterator<Item = (&Target, &Reactor)> {
    live(snapshot)
        .flat_map(|target| target.reactors.iter().filter(|reactor| !reactor.exited).map(move |r| (target, r)))
}

pub(super) fn target_labels(target: &Target) -> Vec<String> {
    let Place { container, kubernetes, .. } = &target.place;
    let pod = kubernetes.as_ref().and_then(|pod| pod.name.clone());
    let (container, pod) = (container.clone().unwrap_or_default(), pod.unwrap_or_default());
    vec![target.pid.to_string(), target.comm.clone(), container, pod]
}

pub(super) fn task_labels(target: &Target, deferred: &Deferred) -> Vec<String> {
    let mut labels = target_labels(target);
    labels.push(deferred.task.clone());
    labels
}

pub(super) fn hook_labels(target: &Target, hook: &HookCounters) -> Vec<String> {
    let mut labels = target_labels(target);
    labels.extend([hook.profile.clone(), hook.verb.into(), hook.place.clone()]);
    labels
}

pub(super) fn source_labels(missing: &Missing) -> Vec<String> {
    vec![missing.source.clone(), missing.reason.clone()]
}

pub(super) fn reactor_labels(target: &Target, reactor: &Reactor) -> Vec<String> {
    let mut labels = target_labels(target);
    labels.extend([reactor.tid.to_string(), reactor.name.clone()]);
    labels
}

pub(super) fn live_listeners(snapshot: &Snapshot) -> impl Iterator<Item = (&Target, &Listener)> {
    live(snapshot).flat_map(|target| {
        target.listeners.iter().filter(|listener| !listener.closed).map(move |l| (target, l))
    })
}

pub(super) fn listener_labels(target: &Target, listener: &Listener) -> Vec<String> {
    let mut labels = target_labels(target);
    labels.push(listener.name());
    labels
}
