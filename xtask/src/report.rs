//! Times the stages of `xtask test` and closes with a table: what was checked where, what took how long,
//! and which tests could not run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

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

impl Report {
    /// Does a stage's work, and says what went wrong if something did.
    pub(crate) fn stage<T>(&mut self, name: &str, work: impl FnOnce(&mut Tally) -> Result<T>) -> Option<T> {
        eprintln!("== {name}");
        let start = Instant::now();
        let mut tally = Tally::default();
        let result = work(&mut tally);
        if let Err(error) = &result {
            eprintln!("error: {error:#}");
            // So that the sum never looks as if all were well.
            tally.failed = tally.failed.max(1);
        }
        let failed = result.is_err();
        self.stages.push(Stage { name: name.to_owned(), took: start.elapsed(), failed, tally });
        result.ok()
    }

    /// Prints the table, the skipped tests and the sum.
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
        println!("{sum}");
        if self.stages.iter().any(|stage| stage.failed) || sum.passed == 0 {
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }
}
