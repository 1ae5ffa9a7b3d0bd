//! A program that a test talks to, line by line: it says when it is ready, is told to go on, and says what came of that.
//! For programs that are a few lines of Python as well as for larger ones.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use super::Process;

/// The program, and the way to and from it.
pub(crate) struct Told {
    pub(crate) process: Process,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Told {
    /// Starts what this command is.
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { process: Process(child), to, from: BufReader::new(from) }
    }

    /// Starts a program in Python.
    pub(crate) fn python(script: &str) -> Self {
        Self::start(Command::new("/usr/bin/python3").args(["-c", script]))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The next line that it says.
    #[track_caller]
    pub(crate) fn said(&mut self) -> String {
        let mut line = String::new();
        let length = self.from.read_line(&mut line).unwrap();
        assert!(length > 0, "it has ended, or is about to");
        line.trim_end().into()
    }

    /// Tells it something; what it says to that.
    #[track_caller]
    pub(crate) fn tell(&mut self, what: &str) -> String {
        writeln!(self.to, "{what}").unwrap();
        self.said()
    }
}
