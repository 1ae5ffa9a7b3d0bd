//! Runs and times the stages of `xtask test`, and prints the final report: the result and duration of each stage, the
//! slowest tests, and each test that was skipped, was flaky or failed.

use std::fmt::Write as _;
use std::num::NonZero;
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{iter, thread};

use anyhow::Result;

use crate::results::{Counts, Results, Test, Verdict};

/// A run with more flaky tests than this has failed.
const MAX_FLAKY: usize = 3;

/// How many of the slowest tests are listed.
const SLOWEST_LISTED: usize = 10;

/// Results of a stage besides success or failure.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) results: Results,
    /// Checks that could not be made, with the reason.
    pub(crate) skipped: Vec<String>,
    /// Versions other than the pinned ones. If there are any, a failed test of the stage does not fail the run.
    pub(crate) unpinned: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Report {
    stages: Vec<Stage>,
}

struct Stage {
    name: String,
    took: Duration,
    error: Option<String>,
    findings: Findings,
}

impl Stage {
    fn of<T>(name: &str, work: impl FnOnce(&mut Findings) -> Result<T>) -> (Self, Option<T>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let mut findings = Findings::default();
        let result = work(&mut findings);
        let (error, value) = match result {
            Ok(value) => (None, Some(value)),
            Err(error) => (Some(format!("{error:#}")), None),
        };
        if let Some(error) = &error {
            eprintln!("error: {name}: {error}");
        }
        (Self { name: name.to_owned(), took: start.elapsed(), error, findings }, value)
    }

    fn has_failed(&self) -> bool {
        self.error.is_some() || self.findings.results.failed().next().is_some()
    }

    /// Whether the stage fails the run.
    fn is_fatal(&self) -> bool {
        self.error.is_some() || (self.has_failed() && self.findings.unpinned.is_empty())
    }

    fn verdict(&self) -> &'static str {
        match (self.has_failed(), self.is_fatal()) {
            (false, _) => "ok",
            (true, true) => "FAILED",
            (true, false) => "failed, not pinned",
        }
    }
}

/// A stage that runs concurrently with others.
pub(crate) struct ConcurrentStage<'a> {
    name: String,
    act: Act<'a>,
}

type Act<'a> = Box<dyn FnOnce(&mut Findings) -> Result<()> + Send + 'a>;

impl<'a> ConcurrentStage<'a> {
    pub(crate) fn new(name: String, act: impl FnOnce(&mut Findings) -> Result<()> + Send + 'a) -> Self {
        Self { name, act: Box::new(act) }
    }
}

impl Report {
    /// Runs a stage, and prints its error if it fails.
    pub(crate) fn stage<T>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut Findings) -> Result<T>,
    ) -> Option<T> {
        let (stage, outcome) = Stage::of(name, work);
        self.stages.push(stage);
        outcome
    }

    /// Runs several stages concurrently, started in this order. One more runs than there are CPUs, because some of them
    /// mostly wait.
    pub(crate) fn run_concurrently<'a>(&mut self, stages: impl Iterator<Item = ConcurrentStage<'a>> + Send) {
        let stages = Mutex::new(stages);
        let next = || stages.lock().unwrap_or_else(PoisonError::into_inner).next();
        let workers = thread::available_parallelism().map_or(1, NonZero::get) + 1;
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

    /// Prints the report; the exit code says whether the run has passed.
    pub(crate) fn finish(self) -> ExitCode {
        let (text, has_passed) = self.render();
        println!("\n{text}");
        if has_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn tests(&self) -> impl Iterator<Item = (&str, &Test)> {
        self.stages
            .iter()
            .flat_map(|stage| stage.findings.results.0.iter().map(|test| (stage.name.as_str(), test)))
    }

    /// Renders the report. Returns it with whether the run has passed.
    fn render(&self) -> (String, bool) {
        let mut text = String::new();
        let mut sum = Counts::default();
        for stage in &self.stages {
            let mut counts = stage.findings.results.counts();
            counts.skipped += stage.findings.skipped.len();
            // A failed stage without tests counts as a failure, too.
            counts.failed += usize::from(stage.error.is_some());
            let shown = if counts == Counts::default() { String::new() } else { show(counts) };
            let seconds = stage.took.as_secs_f64();
            text += &format!("{:<22} {seconds:>7.1} s  {:<7} {shown}\n", stage.name, stage.verdict());
            sum = add(sum, counts, stage.is_fatal() || !stage.has_failed());
        }
        self.render_slowest(&mut text);
        self.render_notes(&mut text);
        self.render_failures(&mut text);
        let is_too_flaky = sum.flaky > MAX_FLAKY;
        if is_too_flaky {
            let _ = writeln!(text, "FAILED: {} tests are flaky, more than {MAX_FLAKY}", sum.flaky);
        }
        let failed = sum.failed + usize::from(is_too_flaky);
        if sum.flaky > 0 {
            let _ = writeln!(text, "{} of those that passed are flaky", sum.flaky);
        }
        let passed = sum.passed + sum.flaky;
        let _ = write!(text, "{passed} passed, {failed} failed, {} skipped", sum.skipped);
        let has_passed = failed == 0 && passed > 0 && !self.stages.iter().any(Stage::is_fatal);
        (text, has_passed)
    }

    fn render_slowest(&self, text: &mut String) {
        let mut slowest: Vec<_> = self.tests().collect();
        slowest.sort_by_key(|(_, test)| std::cmp::Reverse(test.took));
        if !slowest.is_empty() {
            text.push_str("\nslowest tests\n");
        }
        for (stage, test) in slowest.iter().take(SLOWEST_LISTED) {
            let _ = writeln!(text, "{:>7.1} s  {stage}: {test}", test.took.as_secs_f64());
        }
        text.push('\n');
    }

    /// What was skipped, is not pinned or was disturbed.
    fn render_notes(&self, text: &mut String) {
        for stage in &self.stages {
            for reason in &stage.findings.skipped {
                let _ = writeln!(text, "{}: skipped {reason}", stage.name);
            }
            for version in &stage.findings.unpinned {
                let _ = writeln!(text, "{}: not pinned: {version}", stage.name);
            }
        }
        for (stage, test) in self.tests() {
            for disturbance in &test.disturbances {
                let _ = writeln!(text, "{stage}: disturbed {test}: {disturbance}");
            }
        }
        for (stage, test) in self.tests() {
            if let Verdict::Skipped(reason) = &test.verdict {
                let _ = writeln!(text, "{stage}: skipped {test}: {reason}");
            }
        }
    }

    fn render_failures(&self, text: &mut String) {
        for (stage, test) in self.tests() {
            let (word, output) = match &test.verdict {
                Verdict::Flaky(output) => ("flaky", output),
                Verdict::Failed(output) => ("FAILED", output),
                Verdict::Passed | Verdict::Skipped(_) => continue,
            };
            let _ = writeln!(text, "{stage}: {word} {test}\n    {}", output.replace('\n', "\n    "));
        }
        for stage in &self.stages {
            if let Some(error) = &stage.error {
                let _ = writeln!(text, "{}: FAILED {error}", stage.name);
            }
        }
    }
}

fn show(counts: Counts) -> String {
    let flaky = if counts.flaky > 0 { format!(", {} flaky", counts.flaky) } else { String::new() };
    format!("{} passed, {} failed, {} skipped{flaky}", counts.passed, counts.failed, counts.skipped)
}

/// Adds counts; failures are added only if `with_failures`, that is, if they fail the run.
fn add(sum: Counts, counts: Counts, with_failures: bool) -> Counts {
    Counts {
        passed: sum.passed + counts.passed,
        failed: sum.failed + if with_failures { counts.failed } else { 0 },
        skipped: sum.skipped + counts.skipped,
        flaky: sum.flaky + counts.flaky,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use anyhow::bail;

    use super::{Findings, Report};
    use crate::results::{Results, Test, Verdict};

    fn results_of(verdicts: impl IntoIterator<Item = Verdict>) -> Results {
        let test = |(number, verdict)| Test {
            binary: "observer::real".to_owned(),
            name: format!("test_{number}"),
            took: Duration::from_secs(1),
            verdict,
            disturbances: Vec::new(),
        };
        Results(verdicts.into_iter().enumerate().map(test).collect())
    }

    fn rendered(verdicts: Vec<Verdict>, unpinned: &[&str]) -> (String, bool) {
        let mut report = Report::default();
        report.stage("tests", |findings: &mut Findings| {
            findings.results = results_of(verdicts);
            findings.unpinned = unpinned.iter().map(|&version| version.to_owned()).collect();
            Ok(())
        });
        report.render()
    }

    #[test]
    fn failure_fails_the_run_and_is_reported_with_its_output() {
        let (text, has_passed) = rendered(vec![Verdict::Passed, Verdict::Failed("3 are left".into())], &[]);
        assert!(!has_passed);
        assert!(text.contains("tests: FAILED observer::real test_1\n    3 are left\n"), "{text}");
        assert!(text.ends_with("\n1 passed, 1 failed, 0 skipped"), "{text}");
    }

    #[test]
    fn up_to_three_flaky_tests_pass_and_are_listed() {
        for (count, passes) in [(3, true), (4, false)] {
            let verdicts = vec![Verdict::Flaky("3 are left".into()); count];
            let (text, has_passed) = rendered(verdicts, &[]);
            assert_eq!(has_passed, passes, "{text}");
            assert!(text.contains("tests: flaky observer::real test_0\n    3 are left\n"), "{text}");
        }
    }

    #[test]
    fn run_with_only_skipped_tests_fails() {
        let (text, has_passed) = rendered(vec![Verdict::Skipped("no tmux".into())], &[]);
        assert!(!has_passed, "nothing ran: {text}");
        let (text, has_passed) = rendered(vec![Verdict::Skipped("no tmux".into()), Verdict::Passed], &[]);
        assert!(has_passed, "{text}");
        assert!(text.contains("tests: skipped observer::real test_0: no tmux\n"), "{text}");
        assert!(text.ends_with("\n1 passed, 0 failed, 1 skipped"), "{text}");
    }

    #[test]
    fn failure_on_unpinned_version_is_reported_but_not_fatal() {
        let (text, has_passed) =
            rendered(vec![Verdict::Passed, Verdict::Failed("3 are left".into())], &["6.99"]);
        assert!(has_passed, "{text}");
        assert!(text.contains("tests: not pinned: 6.99\n"), "{text}");
        assert!(text.contains("tests: FAILED observer::real test_1\n    3 are left\n"), "{text}");
    }

    #[test]
    fn stage_with_an_error_fails_the_run() {
        let mut report = Report::default();
        report.stage("tests", |findings| {
            findings.results = results_of([Verdict::Passed]);
            Ok(())
        });
        report.stage("lint", |findings| -> anyhow::Result<()> {
            // Errors are fatal even with an unpinned version.
            findings.unpinned.push("6.99".to_owned());
            bail!("clippy found something")
        });
        let (text, has_passed) = report.render();
        assert!(!has_passed, "{text}");
        assert!(text.contains("lint: FAILED clippy found something\n"), "{text}");
    }
}
