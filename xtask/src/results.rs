//! What tests came to: read from the JUnit files that nextest writes, and put together over reruns.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{Report, TestCase, TestCaseStatus};

/// The test executable with the tests against real servers; the others hold unit tests.
const REAL: &str = "real";

/// What a test prints, at the beginning of a line, that cannot run here. To nextest it has passed.
const SKIPPED: &str = "skipped: ";

/// How much of a failure's output is kept.
const LINES: usize = 12;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    Passed,
    /// Why it could not run.
    Skipped(String),
    /// What its first run printed last.
    Failed(String),
    /// It failed, as this tells, and passed when it ran again by itself.
    Flaky(String),
}

/// A test and how it ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Test {
    /// The test executable, as nextest names it.
    pub(crate) binary: String,
    pub(crate) name: String,
    pub(crate) took: Duration,
    pub(crate) verdict: Verdict,
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
                Verdict::Failed(essence(message, &output.join("\n")))
            }
        };
        let took = case.time.unwrap_or_default();
        Self { binary: binary.to_owned(), name: case.name.as_str().to_owned(), took, verdict }
    }

    /// Whether the test declares this word, as in `[alone contract] reactor::sleeps`.
    fn declares(&self, word: &str) -> bool {
        let words = self.name.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        words.is_some_and(|(words, _)| words.split(' ').any(|declared| declared == word))
    }

    /// How often it may run again after a failure. What does not depend on the machine gets no second try, and neither
    /// does a wrong link.
    fn reruns(&self) -> u32 {
        let is_real = self.binary.rsplit("::").next() == Some(REAL);
        if is_real && !self.declares("links") { 2 } else { 0 }
    }

    /// nextest's expression for this test alone.
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
        let report = Report::deserialize_from_str(xml).context("nextest's JUnit file cannot be read")?;
        let suites = report.test_suites.iter();
        let tests = suites.flat_map(|suite| suite.test_cases.iter().map(|case| (suite.name.as_str(), case)));
        Ok(Self(tests.map(|(suite, case)| Test::of(suite, case)).collect()))
    }

    /// nextest's expression for the failed tests that may run for the `time`th time again; `None` if there are none.
    pub(crate) fn to_rerun(&self, time: u32, limit: u32) -> Option<String> {
        let failed = self.failed().filter(|test| test.reruns().min(limit) >= time);
        let filters: Vec<_> = failed.map(Test::filter).collect();
        (!filters.is_empty()).then(|| filters.join(" | "))
    }

    /// What passed when it ran again is flaky from now on.
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

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Failed at first, and passed by themselves.
    pub(crate) flaky: usize,
}

/// The reason in a line by which a test says that it cannot run. A harness may have begun the line.
fn skip_reason(line: &str) -> Option<&str> {
    let line =
        line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")).map_or(line, |(_, rest)| rest);
    line.strip_prefix(SKIPPED)
}

/// The panic and what follows it, or the end of what was printed.
fn essence(message: &str, output: &str) -> String {
    let lines: Vec<&str> = output.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().position(|line| line.starts_with("thread '") && line.contains("panicked at"));
    let start = panic.unwrap_or_else(|| lines.len().saturating_sub(LINES));
    let is_over = |line: &&&str| line.starts_with("stack backtrace:") || line.starts_with("note: ");
    let kept = lines[start..].iter().take_while(|line| !is_over(line)).take(LINES);
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
      <system-err>skipped: there is no tmux here</system-err>
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
    fn a_test_that_passes_again_is_flaky_and_keeps_its_first_failure() {
        let mut results = Results::from_junit(FIRST).unwrap();
        assert_eq!(results.counts(), Counts { passed: 1, failed: 3, skipped: 1, flaky: 0 });
        results.merge_rerun(&Results::from_junit(AGAIN).unwrap());
        assert_eq!(results.counts(), Counts { passed: 1, failed: 2, skipped: 1, flaky: 1 });
        let failure = "thread 'main' (71) panicked at tests/reactor.rs:7:5:\n3 are left";
        assert_eq!(results.0[0].verdict, Verdict::Flaky(failure.to_owned()));
        assert_eq!(results.0[1].verdict, Verdict::Failed("test timed out".to_owned()));
        assert_eq!(results.0[2].verdict, Verdict::Skipped("there is no tmux here".to_owned()));
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
