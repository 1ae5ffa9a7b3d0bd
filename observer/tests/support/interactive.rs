//! A program that a test controls line by line: it prints a line when it is ready, reads a request and prints a
//! response. For inline Python scripts as well as for larger programs.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use super::Process;

/// The program, and the pipes to and from it.
pub(crate) struct Interactive {
    pub(crate) process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Interactive {
    /// Starts a command.
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { process: Process(child), input, output: BufReader::new(output) }
    }

    /// Starts an inline Python script.
    pub(crate) fn python(script: &str) -> Self {
        Self::start(Command::new("/usr/bin/python3").args(["-c", script]))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for the next line of output.
    #[track_caller]
    pub(crate) fn next_line(&mut self) -> String {
        let mut line = String::new();
        let length = self.output.read_line(&mut line).unwrap();
        assert!(length > 0, "the program has closed its output");
        line.trim_end().into()
    }

    /// Sends a line and returns the next line of output.
    #[track_caller]
    pub(crate) fn request(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.next_line()
    }
}
