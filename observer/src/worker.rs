//! Works on an observation on a thread of its own: reading foreign processes and attaching to them may take seconds, and
//! scrapes, signals and the live view must not wait for that.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    thread,
    time::Duration,
};

use anyhow::Result;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::{model::snapshot::Snapshot, observation::Observation};

/// An observation that is shared with the thread that works on it.
#[derive(Clone)]
pub(crate) struct Worker {
    observation: Arc<Mutex<Observation>>,
    /// A snapshot from before runtimes were attached to, while that goes on at the start. Later, scrapes wait for it: after
    /// an exec, only attaching ends the metrics of the previous runtime.
    before_attaching: Arc<Mutex<Option<Snapshot>>>,
}

/// What a job has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// Read the stacks of long slices.
    Watched,
    /// Updated everything.
    Refreshed,
}

impl Worker {
    pub(crate) fn of(observation: Observation) -> Self {
        Self { observation: Arc::new(Mutex::new(observation)), before_attaching: Arc::default() }
    }

    /// The observation; waits for a job to end.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Observation> {
        lock(&self.observation)
    }

    /// A snapshot as of the last refresh; waits for a job to end, except for the first.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        /// How often to try, if another job is at work.
        const PAUSE: Duration = Duration::from_millis(1);
        loop {
            match self.observation.try_lock() {
                Ok(observation) => return observation.snapshot(),
                Err(TryLockError::Poisoned(observation)) => return observation.into_inner().snapshot(),
                Err(TryLockError::WouldBlock) => {}
            }
            if let Some(snapshot) = &*lock(&self.before_attaching) {
                return Ok(snapshot.clone());
            }
            thread::sleep(PAUSE);
        }
    }

    /// Collects what the programs have emitted, and begins to read the stacks of long slices if there are any. Mostly
    /// there are none, and another thread would only cost time.
    pub(crate) fn watch(&self) -> Result<Job> {
        let mut observation = self.lock();
        observation.collect()?;
        if !observation.has_long_slices() {
            return Ok(Job::None);
        }
        drop(observation);
        let observation = Arc::clone(&self.observation);
        Ok(Job::Running(spawn_blocking(move || {
            lock(&observation).watch();
            Ok(Done::Watched)
        })))
    }

    /// Updates everything, and attaches to new runtimes, which takes seconds.
    pub(crate) fn refresh(&self) -> Job {
        let Self { observation, before_attaching } = self.clone();
        Job::Running(spawn_blocking(move || {
            let mut observation = lock(&observation);
            observation.refresh()?;
            if observation.is_attaching() {
                *lock(&before_attaching) = Some(observation.snapshot()?);
            }
            observation.attach_runtimes();
            *lock(&before_attaching) = None;
            Ok(Done::Refreshed)
        }))
    }
}

/// Work in progress. There is one job at a time.
pub(crate) enum Job {
    None,
    Running(JoinHandle<Result<Done>>),
}

impl Job {
    pub(crate) const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Waits for the end of the job, if there is one.
    pub(crate) async fn end(&mut self) -> Result<Option<Done>> {
        let Self::Running(job) = self else { return Ok(None) };
        let done = job.await;
        *self = Self::None;
        done?.map(Some)
    }
}

/// A poisoned lock is harmless here: no update that others depend on is left half done.
pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
