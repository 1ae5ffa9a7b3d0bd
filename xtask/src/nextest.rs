//! cargo-nextest, which runs all tests: how it is found, what it is given, and how its results are read.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use duct::{Expression, cmd};

use crate::pins;
use crate::python::Packages;
use crate::results::Results;
use crate::shell::{find, show};
use crate::workspace::{FLAGS, cargo_in, flags, host, kept, root, without_own};

const WHEEL: Packages = Packages { folder: "nextest", modules: "", requirements: pins::NEXTEST };

/// Where `.config/nextest.toml` has the results of a run put, below the workspace.
const JUNIT: &str = "target/nextest/default/junit.xml";

/// The variable by which tests know that they are to take all their load and all their rounds.
const FULL: &str = "OBSERVER_TEST_FULL";

/// How often a test may run again at most.
const RERUNS: u32 = 2;

/// nextest ends with this when tests failed, and with any other status but 0 when it could not run them.
const TESTS_FAILED: i32 = 100;

/// Which tests: nextest's expressions. The words are those of `observer/tests/harness.rs`.
pub(crate) const BESIDE_OTHERS: &str = r"not test(/^\[[^\]]*\b(quiet|alone)\b/)";
pub(crate) const QUIET: &str = r"test(/^\[[^\]]*\bquiet\b/)";
pub(crate) const ALONE: &str = r"test(/^\[[^\]]*\balone\b/)";
pub(crate) const FULL_ONLY: &str = r"test(/^\[[^\]]*\bfull\b/)";
pub(crate) const CONTRACT: &str = r"test(/^\[[^\]]*\bcontract\b/)";
pub(crate) const USERSPACE: &str = r"test(/^\[[^\]]*\buserspace\b/)";
/// Packages whose tests depend on the kernel.
pub(crate) const OF_THE_KERNEL: &str = "(package(observer) | package(observer-common))";

/// How many tests run at a time.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    AsConfigured,
    One,
}

/// Which tests to run, and how.
pub(crate) struct Selection {
    /// What the JUnit file is called.
    pub(crate) label: String,
    /// nextest's expression.
    pub(crate) expression: String,
    /// Parts of names of tests; all if there are none.
    pub(crate) names: Vec<String>,
    pub(crate) threads: Threads,
    /// Whether they take all the load and all the rounds that they were made for.
    pub(crate) is_full: bool,
}

/// Test executables that are built, and the program that runs them.
pub(crate) struct Nextest {
    pub(crate) program: PathBuf,
    /// What cargo and nextest know of the build, so that neither has to look again.
    pub(crate) cargo_metadata: PathBuf,
    pub(crate) binaries_metadata: PathBuf,
    workspace: PathBuf,
}

/// Finds nextest, or installs it once; answers the program.
pub(crate) fn install() -> Result<PathBuf> {
    if let Some(found) = find("cargo-nextest") {
        return Ok(found);
    }
    let folder =
        WHEEL.install().context("nextest is missing\nby hand: cargo install --locked cargo-nextest")?;
    Ok(folder.join("bin/cargo-nextest"))
}

/// Whether nextest says that it ran all that it began with: of a run that was broken off its summary counts `3/10 tests run`.
fn is_whole(output: &str) -> bool {
    let summary = output.lines().find_map(|line| line.trim_start().strip_prefix("Summary ["));
    let count = summary.and_then(|summary| summary.split_once("] ")?.1.trim_start().split(' ').next());
    count.is_some_and(|count| count.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Nextest {
    /// Describes the tests of this repository, building what is not built.
    pub(crate) fn of_repository() -> Result<Self> {
        let build = ["--release", "--target", &host()?, "--workspace", "--exclude", "observer-ebpf"];
        Self::of(root(), kept("nextest"), &build, |command| Ok(command.env(FLAGS, flags()?)))
    }

    /// Describes the tests of a workspace, built with these arguments, in files in `folder`.
    fn of(
        workspace: &Path,
        folder: PathBuf,
        build: &[&str],
        with_flags: impl FnOnce(Expression) -> Result<Expression>,
    ) -> Result<Self> {
        let program = install()?;
        fs::create_dir_all(&folder)?;
        let binaries_metadata = folder.join("binaries-metadata.json");
        let args = ["nextest", "list", "--list-type", "binaries-only", "--message-format", "json"];
        let list = without_own(cmd(&program, args.iter().chain(build)).dir(workspace));
        with_flags(list)?
            .stdin_null()
            .stdout_path(&binaries_metadata)
            .run()
            .context("the tests do not build")?;
        let cargo_metadata = folder.join("cargo-metadata.json");
        let metadata = cargo_in(workspace, ["metadata", "--format-version", "1"]);
        metadata.stdout_path(&cargo_metadata).run().context("cargo metadata failed")?;
        Ok(Self { program, cargo_metadata, binaries_metadata, workspace: workspace.to_owned() })
    }

    /// The words that run the tests of this expression, and of these names if there are any.
    pub(crate) fn words(&self, profile: &str, expression: &str, names: &[String]) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![(&self.program).into(), "nextest".into(), "run".into()];
        words.extend(["--binaries-metadata".into(), (&self.binaries_metadata).into()]);
        words.extend(["--cargo-metadata".into(), (&self.cargo_metadata).into()]);
        // What another kernel or a filter leaves nothing of is no mistake here; a whole run without a test is.
        words.extend(["--no-tests", "pass", "--profile", profile, "-E", expression].map(Into::into));
        words.extend(["--color", "never", "--show-progress", "none"].map(Into::into));
        // Whatever the environment says.
        words.extend(["--no-fail-fast", "--retries", "0"].map(Into::into));
        if !names.is_empty() {
            // Whoever asks for certain tests wants to read the figures that they print.
            words.extend(["--success-output", "immediate"].map(Into::into));
            words.extend(names.iter().map(Into::into));
        }
        words
    }

    /// Runs tests here. A copy of nextest's JUnit file stays under the label.
    pub(crate) fn run(&self, tests: &Selection) -> Result<Results> {
        let junit = self.workspace.join(JUNIT);
        match fs::remove_file(&junit) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let mut words = self.words("default", &tests.expression, &tests.names).into_iter();
        let program = words.next().context("there is a program")?;
        let threads = match tests.threads {
            Threads::AsConfigured => vec![],
            Threads::One => vec!["--test-threads=1".into()],
        };
        let mut command = cmd(program, words.chain(threads)).dir(&self.workspace);
        if tests.is_full {
            command = command.env(FULL, "1");
        }
        let shown = show(&command, "")?;
        // It writes no file where it ran nothing.
        let junit = fs::read_to_string(junit).unwrap_or_default();
        self.read(&tests.label, shown.code, &shown.output, &junit)
    }

    /// Reads the results of a run from its exit status, what it printed, and its JUnit file, of which a copy stays under the
    /// label. A run that was broken off is an error: what it did not run is in no file.
    pub(crate) fn read(&self, label: &str, code: Option<i32>, output: &str, junit: &str) -> Result<Results> {
        let Some(0 | TESTS_FAILED) = code else { bail!("nextest could not run the tests, status {code:?}") };
        if !is_whole(output) {
            bail!("nextest was broken off before all tests had run");
        }
        let results = if junit.is_empty() { Results::default() } else { self.keep(junit, label)? };
        let has_failures = results.failed().next().is_some();
        if has_failures != (code == Some(TESTS_FAILED)) {
            bail!("nextest ended with status {code:?}, which its JUnit file does not explain");
        }
        Ok(results)
    }

    /// Runs tests here and those that failed again, each by itself, as often as they may.
    pub(crate) fn run_with_reruns(&self, tests: &Selection) -> Result<Results> {
        let mut results = self.run(tests)?;
        for time in 1..=RERUNS {
            let Some(expression) = results.to_rerun(time, RERUNS) else { break };
            eprintln!("what failed runs again by itself");
            let label = format!("{}, again {time}", tests.label);
            let again =
                Selection { label, expression, names: vec![], threads: Threads::One, is_full: tests.is_full };
            results.merge_rerun(&self.run(&again)?);
        }
        Ok(results)
    }

    /// Copies a JUnit file to `target/junit` and reads it.
    fn keep(&self, junit: &str, label: &str) -> Result<Results> {
        let folder = self.workspace.join("target/junit");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(label.replace(", ", "-").replace(' ', "-") + ".xml"), junit)?;
        Results::from_junit(junit)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{BESIDE_OTHERS, Nextest, Selection, Threads, is_whole};
    use crate::results::{Counts, Verdict};

    /// Tests of all kinds, in a package of its own.
    const TESTS: &str = r#"
        #[test] fn passes() {}
        #[test] fn broken() { panic!("broken on purpose") }
        #[test] fn cannot_run() { eprintln!("skipped: there is no such thing here") }
        #[test] fn fails_once() {
            assert!(std::fs::exists("marker").unwrap() || std::fs::write("marker", "").is_err(), "the first time");
        }
        #[test] fn hangs() { std::thread::sleep(std::time::Duration::from_secs(600)) }
    "#;

    const CONFIG: &str = "
[profile.default]
fail-fast = false
slow-timeout = { period = '1s', terminate-after = 1, grace-period = '1s' }
[profile.default.junit]
path = 'junit.xml'
store-success-output = true
";

    #[test]
    fn a_run_that_was_broken_off_is_no_result() {
        assert!(is_whole(
            "Starting\n     Summary [ 343.270s] 430 tests run: 430 passed (4 slow), 75 skipped\n"
        ));
        assert!(is_whole("     Summary [   0.002s] 0 tests run: 0 passed, 505 skipped\n"));
        assert!(!is_whole("     Summary [   3.270s] 12/430 tests run: 12 passed, 75 skipped\n"));
        assert!(!is_whole("Starting 430 tests\n"));
    }

    #[test]
    fn a_broken_test_fails_and_one_that_fails_once_is_flaky() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("Cargo.toml", "[package]\nname = 'sample'\nedition = '2024'\n[workspace]\n");
        write("src/lib.rs", "");
        write("tests/real.rs", TESTS);
        write(".config/nextest.toml", CONFIG);
        let nextest = Nextest::of(folder.path(), folder.path().join("about"), &[], Ok).unwrap();
        let threads = Threads::AsConfigured;
        let expression = BESIDE_OTHERS.to_owned();
        let all =
            Selection { label: "sample".to_owned(), expression, names: vec![], threads, is_full: false };
        let results = nextest.run_with_reruns(&all).unwrap();
        assert_eq!(results.counts(), Counts { passed: 1, failed: 2, skipped: 1, flaky: 1 }, "{results:#?}");
        let verdict = |name: &str| &results.0.iter().find(|test| test.name == name).unwrap().verdict;
        let is_said = |text: &str, said: &str| text.contains(said);
        assert!(matches!(verdict("broken"), Verdict::Failed(text) if is_said(text, "broken on purpose")));
        assert!(matches!(verdict("hangs"), Verdict::Failed(_)));
        assert!(matches!(verdict("fails_once"), Verdict::Flaky(text) if is_said(text, "the first time")));
        assert_eq!(*verdict("cannot_run"), Verdict::Skipped("there is no such thing here".to_owned()));
    }
}
