//! Times the stages of `xtask test` and closes with a table: what was checked where, what took how long,
//! and which tests could not run.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{iter, thread};

use anyhow::Result;

use crate::tally::Tally;

#[derive(Default)]
pub(crate) struct Report {
    stages: Vec<Stage>,
}

struct Stage {
    name: String,
    took: Duration,
    failed: bool,
    tally: Tally,
}

impl Stage {
    fn of<T>(name: &str, work: impl FnOnce(&mut Tally) -> Result<T>) -> (Self, Option<T>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let mut tally = Tally::default();
        let result = work(&mut tally);
        if let Err(error) = &result {
            eprintln!("error: {name}: {error:#}");
            // So that the sum never looks as if all were well.
            tally.failed = tally.failed.max(1);
        }
        let failed = result.is_err();
        (Self { name: name.to_owned(), took: start.elapsed(), failed, tally }, result.ok())
    }
}

/// What a stage of several at once does.
pub(crate) struct Work<'a> {
    name: String,
    act: Act<'a>,
}

type Act<'a> = Box<dyn FnOnce(&mut Tally) -> Result<()> + Send + 'a>;

impl<'a> Work<'a> {
    pub(crate) fn new(name: String, act: impl FnOnce(&mut Tally) -> Result<()> + Send + 'a) -> Self {
        Self { name, act: Box::new(act) }
    }
}

impl Report {
    /// Does a stage's work, and says what went wrong if something did.
    pub(crate) fn stage<T>(&mut self, name: &str, work: impl FnOnce(&mut Tally) -> Result<T>) -> Option<T> {
        let (stage, outcome) = Stage::of(name, work);
        self.stages.push(stage);
        outcome
    }

    /// Does what does not disturb each other, as much of it at a time as there are processors.
    pub(crate) fn at_once<'a>(&mut self, works: impl Iterator<Item = Work<'a>> + Send) {
        let works = Mutex::new(works);
        let next = || works.lock().unwrap_or_else(PoisonError::into_inner).next();
        let workers = thread::available_parallelism().map_or(1, NonZero::get);
        let done = thread::scope(|scope| {
            let worker = || {
                let stages = iter::from_fn(next).map(|work| Stage::of(&work.name, work.act).0);
                stages.collect::<Vec<_>>()
            };
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect::<Vec<_>>()
        });
        self.stages.extend(done);
    }

    /// Prints the table, tests that were skipped or failed, and the sum.
    pub(crate) fn finish(self) -> ExitCode {
        let mut sum = Tally::default();
        println!();
        for stage in &self.stages {
            let verdict = if stage.failed { "FAILED" } else { "ok" };
            let counts = if stage.tally.is_empty() { String::new() } else { stage.tally.to_string() };
            println!("{:<16} {:>7.1} s  {verdict:<6}  {counts}", stage.name, stage.took.as_secs_f64());
            sum += &stage.tally;
        }
        for stage in &self.stages {
            for skipped in &stage.tally.skipped {
                println!("{}: skipped {skipped}", stage.name);
            }
        }
        for stage in &self.stages {
            for failure in &stage.tally.failures {
                println!("{}: FAILED {failure}", stage.name);
            }
        }
        println!("{sum}");
        if self.stages.iter().any(|stage| stage.failed) || sum.passed == 0 {
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }
}
