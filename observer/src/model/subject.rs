//! The subjects of series, such as a listener or an event loop, and the labels of series. A subject refers to its part of a
//! snapshot; its labels and its identity are read from there.

use std::borrow::Cow;

use super::{
    deferred::{Deferred, HookCounters},
    snapshot::{Listener, Missing, Reactor, Snapshot, Target, Workers},
    workload::Workload,
};

/// Name and value of a label.
pub(crate) type Label<'s> = (&'static str, Cow<'s, str>);

/// The labels of a series.
#[derive(Clone, Debug)]
pub(crate) struct Labels<'s> {
    pub(crate) subject: Subject<'s>,
    /// Labels that distinguish the series of one metric and subject.
    pub(crate) own: Vec<Label<'s>>,
}

impl<'s> Labels<'s> {
    /// All of them, those of the subject first.
    pub(crate) fn all(self) -> impl Iterator<Item = Label<'s>> {
        self.subject.labels().into_iter().chain(self.own)
    }
}

/// What a series is about. The number of subjects with series of their own is limited for each kind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Subject<'s> {
    Listener(&'s Target, &'s Listener),
    /// An event loop.
    Reactor(&'s Target, &'s Reactor),
    /// A group of workers, with their parent, or one of them if the parent is not observed.
    Workers(&'s Target, &'s Workers),
    /// A kind of deferred tasks.
    Task(&'s Target, &'s Deferred),
    /// A hook in a runtime.
    Hook(&'s Target, &'s HookCounters),
    /// A process.
    Target(&'s Target),
    /// A process with the program that it runs and the place where it runs.
    Program(&'s Target),
    /// A source of metrics that is unavailable.
    Source(&'s Missing),
    /// observer itself.
    Own,
    /// All subjects of a kind that exceed the limit.
    Other(SubjectKind),
}

/// Kind of a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SubjectKind {
    Listener,
    Reactor,
    Workers,
    Task,
    Hook,
    Target,
    Program,
    Source,
    Own,
}

/// What stays the same during the lifetime of a subject. Names may change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Identity {
    Listener(u32, String),
    Reactor(u32, String),
    Workers(u32, String),
    Task(u32, String),
    Hook(u32, String, &'static str, String),
    Target(u32),
    Program(u32),
    Source(String, String),
}

/// The value of all labels of aggregated subjects.
pub(crate) const OTHER: &str = "other";

impl SubjectKind {
    /// Names of the labels of such a subject.
    pub(crate) const fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Listener => &["pid", "comm", "container", "pod", "listener"],
            Self::Reactor => &["pid", "comm", "container", "pod", "loop", "reactor"],
            Self::Workers => &["pid", "comm", "container", "pod", "exe"],
            Self::Task => &["pid", "comm", "container", "pod", "task"],
            Self::Hook => &["pid", "comm", "container", "pod", "profile", "verb", "place"],
            Self::Target => &["pid", "comm", "container", "pod"],
            Self::Program => {
                &["pid", "comm", "container", "pod", "exe", "namespace", "container_name", "pod_uid", "unit"]
            }
            Self::Source => &["source", "reason"],
            Self::Own => &[],
        }
    }
}

impl<'s> Subject<'s> {
    pub(crate) fn kind(self) -> SubjectKind {
        match self {
            Self::Listener(..) => SubjectKind::Listener,
            Self::Reactor(..) => SubjectKind::Reactor,
            Self::Workers(..) => SubjectKind::Workers,
            Self::Task(..) => SubjectKind::Task,
            Self::Hook(..) => SubjectKind::Hook,
            Self::Target(_) => SubjectKind::Target,
            Self::Program(_) => SubjectKind::Program,
            Self::Source(_) => SubjectKind::Source,
            Self::Own => SubjectKind::Own,
            Self::Other(kind) => kind,
        }
    }

    /// The process that it belongs to.
    pub(crate) fn target(self) -> Option<&'s Target> {
        match self {
            Self::Listener(target, _)
            | Self::Reactor(target, _)
            | Self::Workers(target, _)
            | Self::Task(target, _)
            | Self::Hook(target, _)
            | Self::Target(target)
            | Self::Program(target) => Some(target),
            Self::Source(_) | Self::Own | Self::Other(_) => None,
        }
    }

    /// `None` for observer itself, which is not limited, and for aggregated subjects.
    pub(crate) fn identity(self) -> Option<Identity> {
        match self {
            Self::Listener(target, listener) => Some(Identity::Listener(target.pid, listener.name())),
            Self::Reactor(target, reactor) => Some(Identity::Reactor(target.pid, reactor.id.clone())),
            Self::Workers(_, workers) => Some(Identity::Workers(workers.parent, workers.exe.clone())),
            Self::Task(target, deferred) => Some(Identity::Task(target.pid, deferred.task.clone())),
            Self::Hook(target, hook) => {
                Some(Identity::Hook(target.pid, hook.profile.clone(), hook.verb, hook.place.clone()))
            }
            Self::Target(target) => Some(Identity::Target(target.pid)),
            Self::Program(target) => Some(Identity::Program(target.pid)),
            Self::Source(missing) => Some(Identity::Source(missing.source.clone(), missing.reason.clone())),
            Self::Own | Self::Other(_) => None,
        }
    }

    /// Its labels, in the order of [`SubjectKind::labels`].
    pub(crate) fn labels(self) -> Vec<Label<'s>> {
        let mut labels = self.target().map_or_else(Vec::new, target_labels);
        match self {
            Self::Listener(_, listener) => labels.push(("listener", listener.name().into())),
            Self::Reactor(_, reactor) => labels
                .extend([("loop", reactor.id.as_str().into()), ("reactor", reactor.name.as_str().into())]),
            Self::Workers(_, workers) => labels.push(("exe", workers.exe.as_str().into())),
            Self::Task(_, deferred) => labels.push(("task", deferred.task.as_str().into())),
            Self::Hook(_, hook) => labels.extend([
                ("profile", hook.profile.as_str().into()),
                ("verb", hook.verb.into()),
                ("place", hook.place.as_str().into()),
            ]),
            Self::Program(target) => labels.extend(program_labels(target)),
            Self::Source(missing) => labels.extend([
                ("source", missing.source.as_str().into()),
                ("reason", missing.reason.as_str().into()),
            ]),
            Self::Target(_) | Self::Own => {}
            Self::Other(kind) => labels.extend(kind.labels().iter().map(|name| (*name, OTHER.into()))),
        }
        labels
    }
}

fn target_labels(target: &Target) -> Vec<Label<'_>> {
    let Workload { container, kubernetes, .. } = &target.workload;
    let pod = kubernetes.as_ref().and_then(|pod| pod.name.as_deref());
    vec![
        ("pid", target.pid.to_string().into()),
        ("comm", target.comm.as_str().into()),
        ("container", container.as_deref().unwrap_or_default().into()),
        ("pod", pod.unwrap_or_default().into()),
    ]
}

fn program_labels(target: &Target) -> [Label<'_>; 5] {
    let Workload { kubernetes, unit, .. } = &target.workload;
    let pod = kubernetes.as_ref();
    let namespace = pod.and_then(|pod| pod.namespace.as_deref());
    let container = pod.and_then(|pod| pod.container.as_deref());
    [
        ("exe", target.exe.as_str().into()),
        ("namespace", namespace.unwrap_or_default().into()),
        ("container_name", container.unwrap_or_default().into()),
        ("pod_uid", pod.map_or("", |pod| pod.uid.as_str()).into()),
        ("unit", unit.as_deref().unwrap_or_default().into()),
    ]
}

/// All subjects of a snapshot that count towards the limit of their kind. Subjects without a series are left out.
pub(crate) fn subjects(snapshot: &Snapshot) -> impl Iterator<Item = Subject<'_>> {
    let listeners = live_listeners(snapshot).map(|(target, listener)| Subject::Listener(target, listener));
    let reactors = live_reactors(snapshot).map(|(target, reactor)| Subject::Reactor(target, reactor));
    let sources = snapshot.own.missing.iter().map(Subject::Source);
    let workers = live_workers(snapshot).map(|(target, workers)| Subject::Workers(target, workers));
    listeners.chain(reactors).chain(workers).chain(live(snapshot).flat_map(subjects_of_target)).chain(sources)
}

fn subjects_of_target(target: &Target) -> impl Iterator<Item = Subject<'_>> {
    let is_runtime = target.gc.is_some() || !target.hooks.is_empty();
    let runtime = is_runtime.then_some(Subject::Target(target));
    let tasks = target.deferred.iter().map(move |deferred| Subject::Task(target, deferred));
    let hooks = target.hooks.iter().map(move |hook| Subject::Hook(target, hook));
    [Subject::Program(target)].into_iter().chain(runtime).chain(tasks).chain(hooks)
}

/// Targets with series: those that have not exited.
pub(super) fn live(snapshot: &Snapshot) -> impl Iterator<Item = &Target> {
    snapshot.targets.iter().filter(|target| !target.exited)
}

pub(super) fn live_reactors(snapshot: &Snapshot) -> impl Iterator<Item = (&Target, &Reactor)> {
    live(snapshot)
        .flat_map(|target| target.loops().filter(|reactor| !reactor.exited).map(move |r| (target, r)))
}

/// Groups with at least one running worker.
pub(super) fn live_workers(snapshot: &Snapshot) -> impl Iterator<Item = (&Target, &Workers)> {
    snapshot.workers.iter().filter_map(|workers| {
        let parent = live(snapshot).find(|target| target.pid == workers.parent);
        let worker = || live(snapshot).find(|target| workers.has(target));
        Some((parent.or_else(worker)?, workers))
    })
}

pub(super) fn live_listeners(snapshot: &Snapshot) -> impl Iterator<Item = (&Target, &Listener)> {
    live(snapshot).flat_map(|target| {
        target.listeners.iter().filter(|listener| !listener.closed).map(move |l| (target, l))
    })
}
