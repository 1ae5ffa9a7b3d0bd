//! What runs the tests in this folder: each declares at its head what it needs and how it may be run, so that a runner
//! can put together what goes together and a test that cannot run is reported as skipped, with its reason.
//!
//! Declarations that a runner must know are words in brackets before the test's name, as `[alone contract]`.
//! `.config/nextest.toml` and `cargo xtask test` select by them.

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::ExitCode,
};

use libtest_mimic::{Arguments, Completion, Trial};

use crate::support::is_emulated;

inventory::collect!(Test);

/// A test against real servers.
pub(crate) struct Test {
    module: &'static str,
    name: &'static str,
    run: fn(),
    alone: bool,
    quiet: bool,
    contract: bool,
    full: bool,
    userspace: bool,
    links: bool,
    place: Option<(Place, &'static str)>,
    programs: &'static [&'static str],
}

/// Where a test can run if it cannot run everywhere.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Host,
    Guest,
}

impl Test {
    pub(crate) const fn new(module: &'static str, name: &'static str, run: fn()) -> Self {
        Self {
            module,
            name,
            run,
            alone: false,
            quiet: false,
            contract: false,
            full: false,
            userspace: false,
            links: false,
            place: None,
            programs: &[],
        }
    }

    /// Measures time that other work on this machine would change, or looks at the whole machine: runs by itself.
    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Measures time that other work on this machine would change, and works little itself: runs beside others of its
    /// kind only.
    pub(crate) const fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Belongs to the kernel contract: one exact count or time of a probe, short enough for emulated kernels.
    pub(crate) const fn contract(mut self) -> Self {
        self.contract = true;
        self
    }

    /// Takes too long to be run each time: only when everything is.
    pub(crate) const fn full(mut self) -> Self {
        self.full = true;
        self
    }

    /// No kernel takes part in what it tests: one emulated kernel is enough.
    pub(crate) const fn userspace(mut self) -> Self {
        self.userspace = true;
        self
    }

    /// Asserts that no link is wrong, which is never tried a second time.
    pub(crate) const fn links(mut self) -> Self {
        self.links = true;
        self
    }

    /// Cannot run in a guest.
    pub(crate) const fn host_only(mut self, reason: &'static str) -> Self {
        self.place = Some((Place::Host, reason));
        self
    }

    /// Changes the whole machine, and so must have one of its own.
    pub(crate) const fn guest_only(mut self, reason: &'static str) -> Self {
        self.place = Some((Place::Guest, reason));
        self
    }

    /// Needs these programs on the PATH.
    pub(crate) const fn programs(mut self, programs: &'static [&'static str]) -> Self {
        self.programs = programs;
        self
    }

    /// What is missing here, if anything is.
    fn unmet(&self) -> Option<String> {
        let here = if is_emulated() { Place::Guest } else { Place::Host };
        if let Some((place, reason)) = self.place
            && place != here
        {
            return Some(reason.to_owned());
        }
        let missing = self.programs.iter().find(|program| !is_on_path(program))?;
        Some(format!("there is no {missing} here"))
    }

    fn kind(&self) -> String {
        let words = [
            (self.alone, "alone"),
            (self.quiet, "quiet"),
            (self.contract, "contract"),
            (self.full, "full"),
            (self.userspace, "userspace"),
            (self.links, "links"),
        ];
        let words: Vec<_> = words.into_iter().filter_map(|(is_so, word)| is_so.then_some(word)).collect();
        words.join(" ")
    }

    fn trial(&'static self) -> Trial {
        let module = self.module.split_once("::").map_or("", |(_, module)| module);
        Trial::ignorable_test(format!("{module}::{}", self.name), || {
            let skipped = match self.unmet() {
                Some(reason) => Skip(reason),
                None => match catch_unwind(AssertUnwindSafe(self.run)) {
                    Ok(()) => return Ok(Completion::Completed),
                    Err(payload) => *payload.downcast::<Skip>().unwrap_or_else(|panic| resume_unwind(panic)),
                },
            };
            // The runner reads it here: to it, a test that ends without a failure has passed.
            eprintln!("skipped: {}", skipped.0);
            Ok(Completion::ignored_with(skipped.0))
        })
        .with_kind(self.kind())
    }
}

/// What a test unwinds with that finds out, while it runs, that it cannot.
struct Skip(String);

/// Ends a test that cannot run here for a reason that only shows while it runs.
pub(crate) fn skip(reason: impl Into<String>) -> ! {
    resume_unwind(Box::new(Skip(reason.into())))
}

fn is_on_path(program: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(program).is_file())
}

/// Runs what the command line selects.
pub(crate) fn run() -> ExitCode {
    let mut tests: Vec<_> = inventory::iter::<Test>.into_iter().map(Test::trial).collect();
    tests.sort_by(|left, right| left.name().cmp(right.name()));
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}
