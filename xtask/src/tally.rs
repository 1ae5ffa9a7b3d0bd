//! Reads what test executables printed: how many tests passed and failed, why, and which could not run.
//! A test that cannot run says `skipped: <test>: <reason>` and returns, which libtest takes for a pass.

use std::collections::HashMap;
use std::fmt;
use std::ops::AddAssign;

/// Counts of tests.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Their names, where they are known, each with what it panicked with on lines of its own.
    pub(crate) failures: Vec<String>,
    /// `<test>: <reason>` of each.
    pub(crate) skipped: Vec<String>,
}

impl Tally {
    pub(crate) fn of(output: &str) -> Self {
        let mut tally = Self::default();
        let mut pretended = 0;
        let mut lists_failures = false;
        let panics = panics(output);
        for line in output.lines() {
            // libtest has begun the line with the test's name before the test writes its own.
            let begun = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
            // What libtest tells last of those that failed.
            if line.trim_end() == "failures:" {
                lists_failures = true;
            } else if let Some(name) = line.strip_prefix("    ").filter(|_| lists_failures) {
                let name = name.trim_end();
                let said = panics.get(name).into_iter().flatten();
                tally.failures.push(said.fold(name.to_owned(), |all, line| all + "\n    " + line));
            } else if !line.trim_end().is_empty() {
                lists_failures = false;
            }
            let (test, said) = begun.unwrap_or(("", line));
            if let Some(skip) = said.strip_prefix("skipped: ") {
                tally.skipped.push(skip.to_owned());
                pretended += 1;
            } else if begun.is_some() && said.starts_with("ignored") {
                tally.skipped.push(format!("{test}: {said}"));
            } else if let Some((_, counts)) = said.split_once("test result: ") {
                tally.passed += count(counts, "passed");
                tally.failed += count(counts, "failed");
            }
        }
        tally.passed = tally.passed.saturating_sub(pretended);
        tally
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl AddAssign<&Self> for Tally {
    fn add_assign(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend_from_slice(&other.failures);
        self.skipped.extend_from_slice(&other.skipped);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped.len())
    }
}

/// The first lines of what each thread that is named after a test panicked with.
fn panics(output: &str) -> HashMap<&str, Vec<&str>> {
    const LINES: usize = 8;
    let mut panics: HashMap<_, Vec<_>> = HashMap::new();
    let mut lines = output.lines().map(str::trim_end);
    while let Some(line) = lines.next() {
        let begun = line.split_once("thread '").and_then(|(_, rest)| rest.split_once("' "));
        if let Some((test, place)) = begun.filter(|(_, rest)| rest.contains("panicked at ")) {
            let is_over = |line: &&str| line.starts_with("stack backtrace:") || line.starts_with("note: ");
            let said = lines.by_ref().take_while(|line| !is_over(line)).take(LINES);
            panics.entry(test).or_default().extend([place].into_iter().chain(said));
        }
    }
    panics
}

/// The number before a word in `ok. 3 passed; 0 failed; …`.
fn count(counts: &str, of: &str) -> usize {
    let part = counts.split([';', '.']).find_map(|part| part.trim().strip_suffix(of));
    part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn skipped_tests_did_not_pass() {
        let tally = Tally::of(concat!(
            "running 4 tests\n",
            "test queue::fills ... ok\n",
            "test queue::drains ... skipped: queue::drains: nginx is missing\r\n",
            "ok\n",
            "test slow ... ignored, takes an hour\n",
            "test queue::spills ... \n",
            "thread 'queue::spills' (71) panicked at tests/queue.rs:7:5:\r\n",
            "3 are left\r\n",
            "stack backtrace:\n",
            "   0: core::panicking::panic_fmt\n",
            "FAILED\n",
            "\n",
            "failures:\n",
            "\n",
            "failures:\n",
            "    queue::spills\r\n",
            "\n",
            "test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s\n",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.0s\n",
        ));
        let skipped = ["queue::drains: nginx is missing", "slow: ignored, takes an hour"];
        let skipped = skipped.map(str::to_owned).to_vec();
        let failures =
            vec!["queue::spills\n    (71) panicked at tests/queue.rs:7:5:\n    3 are left".to_owned()];
        assert_eq!(tally, Tally { passed: 6, failed: 1, failures, skipped });
    }

    #[test]
    fn kernel_messages_may_precede_a_result() {
        let tally =
            Tally::of("[    2.1] a warning\r\n[    2.2] test result: ok. 1 passed; 0 failed; 0 ignored\r\n");
        assert_eq!(tally.passed, 1);
    }
}
