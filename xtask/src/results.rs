//! Results of tests: parsed from the JUnit files that nextest writes, and merged over reruns.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{Report, TestCase, TestCaseStatus};

/// Test executable with the tests against real servers; all others contain unit tests.
const REAL: &str = "real";

/// Prefix of the line that a test prints if it cannot run here. nextest counts such a test as passed.
const SKIPPED: &str = "skipped: ";

/// Prefix of the line that a test prints if it starts again because other processes used the CPUs.
const DISTURBED: &str = "disturbed: ";

/// Maximum number of lines of a failure's output that are kept.
const MAX_LINES: usize = 12;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    Passed,
    /// Why it could not run.
    Skipped(String),
    /// Last output of the first run.
    Failed(String),
    /// Output of the first run, which failed. A rerun of the test passed.
    Flaky(String),
}

/// A test and its result.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Test {
    /// Binary id of nextest.
    pub(crate) binary: String,
    pub(crate) name: String,
    pub(crate) took: Duration,
    pub(crate) verdict: Verdict,
    /// What disturbed each round of the test that does not count.
    pub(crate) disturbances: Vec<String>,
}

impl Test {
    fn of(binary: &str, case: &TestCase) -> Self {
        let output = [&case.system_out, &case.system_err];
        let output: Vec<&str> = output.into_iter().flatten().map(|text| text.as_str()).collect();
        let verdict = match &case.status {
            TestCaseStatus::Success { .. } => {
                let reason = output.iter().flat_map(|text| text.lines()).find_map(skip_reason);
                reason.map_or(Verdict::Passed, |reason| Verdict::Skipped(reason.to_owned()))
            }
            TestCaseStatus::Skipped { .. } => Verdict::Skipped("ignored".to_owned()),
            TestCaseStatus::NonSuccess { message, .. } => {
                let message = message.as_ref().map_or("", |message| message.as_str());
                Verdict::Failed(failure_excerpt(message, &output.join("\n")))
            }
        };
        let took = case.time.unwrap_or_default();
        let disturbances = output.iter().flat_map(|text| text.lines());
        let disturbances = disturbances.filter_map(|line| line.strip_prefix(DISTURBED)).map(str::to_owned);
        Self {
            binary: binary.to_owned(),
            name: case.name.as_str().to_owned(),
            took,
            verdict,
            disturbances: disturbances.collect(),
        }
    }

    /// Whether the name of the test has this word in its brackets, as in `[alone contract] reactor::sleeps`.
    fn declares(&self, word: &str) -> bool {
        let words = self.name.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        words.is_some_and(|(words, _)| words.split(' ').any(|declared| declared == word))
    }

    /// How often the test may be rerun after a failure. Tests that do not depend on the machine are not rerun, and
    /// neither are tests of links: a wrong link is always a bug.
    fn reruns(&self) -> u32 {
        let is_real = self.binary.rsplit("::").next() == Some(REAL);
        if is_real && !self.declares("links") { 2 } else { 0 }
    }

    /// Filter expression of nextest for only this test.
    fn filter(&self) -> String {
        format!("(binary_id(={}) & test(={}))", self.binary, self.name)
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.binary, self.name)
    }
}

/// All tests of a run, each once.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Results(pub(crate) Vec<Test>);

impl Results {
    pub(crate) fn from_junit(xml: &str) -> Result<Self> {
        let report = Report::deserialize_from_str(xml).context("cannot parse nextest's JUnit file")?;
        let suites = report.test_suites.iter();
        let tests = suites.flat_map(|suite| suite.test_cases.iter().map(|case| (suite.name.as_str(), case)));
        Ok(Self(tests.map(|(suite, case)| Test::of(suite, case)).collect()))
    }

    /// Filter expression for the failed tests that are eligible for rerun number `time`; `None` if there are none.
    pub(crate) fn to_rerun(&self, time: u32, limit: u32) -> Option<String> {
        let failed = self.failed().filter(|test| test.reruns().min(limit) >= time);
        let filters: Vec<_> = failed.map(Test::filter).collect();
        (!filters.is_empty()).then(|| filters.join(" | "))
    }

    /// Marks failed tests that passed in the rerun as flaky.
    pub(crate) fn merge_rerun(&mut self, again: &Self) {
        for test in &mut self.0 {
            let is_same = |other: &&Test| (&other.binary, &other.name) == (&test.binary, &test.name);
            if let Verdict::Failed(first) = &test.verdict
                && again.0.iter().find(is_same).is_some_and(|other| other.verdict == Verdict::Passed)
            {
                test.verdict = Verdict::Flaky(first.clone());
            }
        }
    }

    pub(crate) fn failed(&self) -> impl Iterator<Item = &Test> {
        self.0.iter().filter(|test| matches!(test.verdict, Verdict::Failed(_)))
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for test in &self.0 {
            match test.verdict {
                Verdict::Passed => counts.passed += 1,
                Verdict::Skipped(_) => counts.skipped += 1,
                Verdict::Failed(_) => counts.failed += 1,
                Verdict::Flaky(_) => counts.flaky += 1,
            }
        }
        counts
    }
}

/// Number of tests by result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Failed at first and passed in a rerun.
    pub(crate) flaky: usize,
}

/// The reason in a line with which a test reports that it cannot run. A test harness may have started the line.
fn skip_reason(line: &str) -> Option<&str> {
    let line =
        line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")).map_or(line, |(_, rest)| rest);
    line.strip_prefix(SKIPPED)
}

/// The panic message and the lines after it, or the last lines if there was no panic.
fn failure_excerpt(message: &str, output: &str) -> String {
    let lines: Vec<&str> = output.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().position(|line| line.starts_with("thread '") && line.contains("panicked at"));
    let start = panic.unwrap_or_else(|| lines.len().saturating_sub(MAX_LINES));
    let is_over = |line: &&&str| line.starts_with("stack backtrace:") || line.starts_with("note: ");
    let kept = lines[start..].iter().take_while(|line| !is_over(line)).take(MAX_LINES);
    let text = kept.copied().collect::<Vec<_>>().join("\n");
    if text.is_empty() { message.to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::{Counts, Results, Verdict};

    const FIRST: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="5" failures="3" errors="0" time="1.0">
  <testsuite name="observer::real" tests="4" disabled="0" errors="0" failures="2">
    <testcase name="[alone] reactor::sleeps" classname="observer::real" time="2.5">
      <failure message="test failed" type="test failure">1</failure>
      <system-err>listening
thread 'main' (71) panicked at tests/reactor.rs:7:5:
3 are left
stack backtrace:
   0: core</system-err>
    </testcase>
    <testcase name="[contract links] deferred::links" classname="observer::real" time="1.0">
      <failure message="test timed out" type="test timeout"/>
    </testcase>
    <testcase name="live::screen" classname="observer::real" time="0.1">
      <system-err>disturbed: other processes used 40 % of the CPUs
skipped: there is no tmux here</system-err>
    </testcase>
    <testcase name="cli::usage" classname="observer::real" time="0.1"/>
  </testsuite>
  <testsuite name="observer" tests="1" disabled="0" errors="0" failures="1">
    <testcase name="model::lag::tests::exact" classname="observer" time="0.1">
      <failure message="test failed" type="test failure">1</failure>
    </testcase>
  </testsuite>
</testsuites>"#;

    const AGAIN: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="1" failures="0" errors="0" time="1.0">
  <testsuite name="observer::real" tests="1" disabled="0" errors="0" failures="0">
    <testcase name="[alone] reactor::sleeps" classname="observer::real" time="2.5"/>
  </testsuite>
</testsuites>"#;

    #[test]
    fn test_that_passes_on_rerun_is_flaky_and_keeps_its_first_failure() {
        let mut results = Results::from_junit(FIRST).unwrap();
        assert_eq!(results.counts(), Counts { passed: 1, failed: 3, skipped: 1, flaky: 0 });
        results.merge_rerun(&Results::from_junit(AGAIN).unwrap());
        assert_eq!(results.counts(), Counts { passed: 1, failed: 2, skipped: 1, flaky: 1 });
        let failure = "thread 'main' (71) panicked at tests/reactor.rs:7:5:\n3 are left";
        assert_eq!(results.0[0].verdict, Verdict::Flaky(failure.to_owned()));
        assert_eq!(results.0[1].verdict, Verdict::Failed("test timed out".to_owned()));
        assert_eq!(results.0[2].verdict, Verdict::Skipped("there is no tmux here".to_owned()));
        assert_eq!(results.0[2].disturbances, ["other processes used 40 % of the CPUs"]);
    }

    #[test]
    fn links_and_unit_tests_are_never_rerun() {
        let results = Results::from_junit(FIRST).unwrap();
        let expected = Some("(binary_id(=observer::real) & test(=[alone] reactor::sleeps))".to_owned());
        assert_eq!(results.to_rerun(1, 2), expected);
        assert_eq!(results.to_rerun(2, 2), expected);
        assert_eq!(results.to_rerun(2, 1), None);
        assert_eq!(results.to_rerun(3, 2), None);
    }
}
