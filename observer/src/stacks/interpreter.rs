//! Which interpreter a process runs, told by what its files export rather than by their names, and its frames.

use std::{fs, io};

use anyhow::{Result, anyhow, bail};
use procfs::process::MemoryMap;

use super::{
    elf::Elf,
    mappings::Mappings,
    memory::Live,
    naming::Naming,
    python::{self, Python},
    ruby::{self, Ruby},
};
use crate::model::frame::Frame;

/// An interpreter in a process. It belongs to the program the process ran when it was found: after an exec it fails,
/// and has to be looked for again.
pub(crate) struct Interpreter {
    /// What it is, with its version where that is known: `CPython 3.11.2`.
    pub(crate) name: String,
    pid: u32,
    memory: Live,
    /// Who reads its frames, or why nobody can.
    reader: Result<Reader, String>,
}

enum Reader {
    Python(Python),
    Ruby(Ruby),
}

impl Interpreter {
    /// Finds out what a process runs; `None` if that is native code alone.
    pub(crate) fn of(pid: u32) -> io::Result<Option<Self>> {
        let (mappings, memory) = (Mappings::of(pid)?, Live::of(pid)?);
        for map in mappings.modules() {
            // A file that cannot be read as ELF is no interpreter.
            let Some(elf) = mappings.open(map).ok().and_then(|file| Elf::open(&file).ok()) else { continue };
            if let Some((name, reader)) = recognise(&elf, map, &memory) {
                let reader = reader.map_err(|why| format!("{why:#}"));
                return Ok(Some(Self { name, pid, memory, reader }));
            }
        }
        Ok(None)
    }

    /// Whether frames can be read. An error says why not.
    pub(crate) fn readable(&self) -> Result<(), String> {
        self.reader.as_ref().map(drop).map_err(Clone::clone)
    }

    /// Frames of a thread, innermost first. An error says why there are none.
    pub(crate) fn frames(&self, tid: u32) -> Result<Vec<Frame>> {
        let reader =
            self.reader.as_ref().map_err(|why| anyhow!("frames of {} cannot be read: {why}", self.name))?;
        let inside = tid_inside(self.pid, tid)?;
        let frames = match reader {
            Reader::Python(python) => python.frames(&self.memory, inside),
            Reader::Ruby(ruby) => ruby.frames(&self.memory, inside, tid == self.pid),
        };
        frames.map_err(|error| error.context(format!("frames of {} cannot be read", self.name)))
    }
}

impl Interpreter {
    /// What people call something of the interpreter's. An error says why nobody knows.
    pub(crate) fn name(&self, naming: Naming, value: u64) -> Result<String> {
        let reader = self.reader.as_ref().map_err(|why| anyhow!("{why}"))?;
        match (reader, naming) {
            (Reader::Python(python), Naming::PythonCode) => python.code_name(&self.memory, value),
            (Reader::Python(python), Naming::PythonType) => python.type_name(&self.memory, value),
            (Reader::Ruby(ruby), Naming::RubyClass) => ruby.class_name(&self.memory, value),
            (Reader::Ruby(ruby), Naming::RubyBlock) => ruby.block_name(&self.memory, value),
            _ => bail!("{} has no such thing", self.name),
        }
    }
}

/// What an interpreter is called, and who reads its frames; `None` for any other file.
fn recognise(elf: &Elf, map: &MemoryMap, memory: &Live) -> Option<(String, Result<Reader>)> {
    let [python, python_version, ruby, v8] =
        elf.symbols(["_PyRuntime", "Py_Version", "ruby_version", "_ZN2v82V810GetVersionEv"]);
    let bias = elf.bias(map)?;
    let inside = |address: u64| address.wrapping_add(bias);
    if let Some(runtime) = python {
        // Older ones do not tell their version.
        let Some(version) = python_version else {
            return Some(("CPython".into(), Err(anyhow!("it is older than 3.11"))));
        };
        return Some(match python::version(memory, inside(version)) {
            Ok((number, version)) => {
                let reader = Python::new(memory, inside(runtime), number).map(Reader::Python);
                (format!("CPython {version}"), reader)
            }
            Err(error) => ("CPython".into(), Err(error)),
        });
    }
    if let Some(version) = ruby {
        return Some(match ruby::version(memory, inside(version)) {
            Ok(version) => (format!("Ruby {version}"), Ruby::new(elf, bias, &version).map(Reader::Ruby)),
            Err(error) => ("Ruby".into(), Err(error)),
        });
    }
    let why =
        "V8 moves its data; started with --perf-basic-prof it names its functions among the native frames";
    v8.map(|_| ("V8".into(), Err(anyhow!(why))))
}

/// What a thread's own process calls it: in a container it has another id.
fn tid_inside(pid: u32, tid: u32) -> Result<u32> {
    innermost_id(&fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?, tid)
}

/// The last of a thread's ids that its `status` tells, which is `tid` if it tells none.
pub(crate) fn innermost_id(status: &str, tid: u32) -> Result<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(ids.and_then(|ids| ids.split_whitespace().last()).map_or(Ok(tid), str::parse)?)
}

#[cfg(test)]
mod tests {
    use std::{
        path::{Path, PathBuf},
        process::Command,
        time::Instant,
    };

    use super::*;
    use crate::stacks::testing::{Program, find, sleeps, source, threads, wait_for};

    /// Three functions deep: asleep, or busy, in the main thread, another one or a forked process.
    const PYTHON: &str = "import os, sys, threading, time
def inner():
    if sys.argv[1] == 'sleep':
        time.sleep(600)
    while True:
        helper()
def helper():
    return sum(range(5))
class Übung:
    def middle(self):
        (lambda:
            inner())()
def outer():
    Übung().middle()
if sys.argv[2] == 'thread':
    threading.Thread(target=outer).start()
elif sys.argv[2] == 'fork' and os.fork():
    os.wait()
else:
    outer()
";

    const RUBY: &str = "def inner
  sleep(600) if ARGV[0] == 'sleep'
  loop do
    helper
  end
end
def helper
  [1, 2, 3].sum
end
class Other
  def middle
    [1].each do
      inner
    end
  end
end
def outer
  Other.new.middle
end
case ARGV[1]
when 'thread' then Thread.new { outer }.join
when 'fork' then (fork { outer }; Process.wait)
else outer
end
";

    /// Tells the addresses of a class with a variable before its name is asked for, of one of Ruby's own, of one without
    /// a name and of a block.
    const NAMES_OF_RUBY: &str = "require 'objspace'
module Outer
  class Übung
    BLOCK = proc do
    end
    @variable = 1
  end
end
found = [Outer::Übung, String, Class.new, Outer::Übung::BLOCK].map do |object|
  ObjectSpace.dump(object)[/\"address\":\"0x(\\h+)/, 1]
end
File.write(ARGV[0], found.join(\"\\n\"))
sleep
";

    /// The process, and the thread in it, that do the work.
    fn worker(program: &Program, place: &str) -> (u32, u32) {
        let pid = program.pid();
        match place {
            // Some interpreters have threads of their own.
            "thread" => wait_for("a thread", || {
                let interpreter = Interpreter::of(pid).ok()??;
                let mut others = threads(pid).into_iter().filter(|&tid| tid != pid);
                Some((pid, others.find(|&tid| interpreter.frames(tid).is_ok())?))
            }),
            "fork" => wait_for("a child", || {
                let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
                let child = children.split_whitespace().next()?.parse().ok()?;
                // What starts an interpreter may have children too.
                Interpreter::of(child).ok()??;
                Some((child, child))
            }),
            _ => (pid, pid),
        }
    }

    /// Checks all that a script does: `asleep` is its stack, and `busy` its stack from the loop on.
    fn check(start: impl Fn(&str, &str) -> Program, script: &Path, asleep: &[&str], busy: &[&str]) {
        for place in ["main", "thread", "fork"] {
            let program = start("sleep", place);
            let (pid, tid) = worker(&program, place);
            let told = |frame: &Frame| format!("{}:{}", frame.function, frame.line.unwrap_or(0));
            let frames = wait_for("the sleep", || {
                sleeps(pid, tid)?;
                let frames = Interpreter::of(pid).ok()??.frames(tid).ok()?;
                frames.first().is_some_and(|first| told(first) == asleep[0]).then_some(frames)
            });
            let stack: Vec<_> = frames.iter().map(told).take(asleep.len()).collect();
            assert_eq!(stack, asleep, "{place}");
            assert!(frames.iter().all(|frame| frame.line != Some(0)));
            assert_eq!(frames[asleep.len() - 1].file.as_deref(), script.to_str());
            kill_forked(pid, &program);
        }
        for place in ["main", "thread"] {
            let program = start("spin", place);
            let (pid, tid) = worker(&program, place);
            let interpreter = wait_for("the loop", || {
                let interpreter = Interpreter::of(pid).ok()??;
                let frames = interpreter.frames(tid).ok()?;
                frames.iter().any(|frame| frame.function == busy[0]).then_some(interpreter)
            });
            let (mut told, begun) = (0, Instant::now());
            for _ in 0..200 {
                let Ok(frames) = interpreter.frames(tid) else { continue };
                told += 1;
                let names: Vec<_> = frames.iter().map(|frame| frame.function.as_str()).collect();
                // The innermost may be missing from a thread that runs, but never one in between.
                let at =
                    names.iter().position(|name| busy.contains(name)).unwrap_or_else(|| panic!("{names:?}"));
                let from = busy.iter().position(|name| *name == names[at]).unwrap();
                assert!(names[at..].starts_with(&busy[from..]), "{place}: {names:?}");
            }
            eprintln!(
                "{}: {told} of 200 stacks of a busy thread, in {:?}",
                interpreter.name,
                begun.elapsed()
            );
            assert!(told > 150);
        }
    }

    /// A forked process would survive the one its test started.
    fn kill_forked(pid: u32, program: &Program) {
        if pid != program.pid() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
        }
    }

    /// Interpreters to try: the one on the PATH, Debian's, and those whose paths a variable lists.
    fn interpreters(test: &str, name: &str, more: &str) -> Vec<PathBuf> {
        let mut found: Vec<_> = find(test, name).into_iter().collect();
        let more = std::env::var_os(more).unwrap_or_default();
        let others = [Path::new("/usr/bin").join(name)].into_iter().chain(std::env::split_paths(&more));
        for path in others.filter(|path| path.is_file()) {
            if !found.contains(&path) {
                found.push(path);
            }
        }
        found
    }

    #[test]
    fn frames_of_python() {
        let folder = tempfile::tempdir().unwrap();
        let script = source(folder.path(), "chain.py", PYTHON);
        for python in interpreters("frames_of_python", "python3", "OBSERVER_TEST_PYTHONS") {
            check(
                |how, place| Program::start(Command::new(&python).arg(&script).args([how, place])),
                &script,
                &["inner:4", "Übung.middle.<locals>.<lambda>:12", "Übung.middle:11", "outer:14"],
                &["inner", "Übung.middle.<locals>.<lambda>", "Übung.middle", "outer"],
            );
        }
    }

    #[test]
    fn frames_of_ruby() {
        let folder = tempfile::tempdir().unwrap();
        let script = source(folder.path(), "chain.rb", RUBY);
        for ruby in interpreters("frames_of_ruby", "ruby", "OBSERVER_TEST_RUBIES") {
            check(
                |how, place| Program::start(Command::new(&ruby).arg(&script).args([how, place])),
                &script,
                &["sleep:0", "inner:2", "block in middle:13", "each:0", "middle:12", "outer:18"],
                &["inner", "block in middle", "each", "middle", "outer"],
            );
        }
    }

    #[test]
    fn names_of_ruby() {
        let folder = tempfile::tempdir().unwrap();
        let script = source(folder.path(), "names.rb", NAMES_OF_RUBY);
        for ruby in interpreters("names_of_ruby", "ruby", "OBSERVER_TEST_RUBIES") {
            let told = folder.path().join("told");
            let program = Program::start(Command::new(&ruby).args([&script, &told]));
            let text = wait_for("addresses", || {
                fs::read_to_string(&told).ok().filter(|text| text.lines().count() == 4)
            });
            let addresses: Vec<_> = text.lines().map(|line| u64::from_str_radix(line, 16).unwrap()).collect();
            let interpreter = Interpreter::of(program.pid()).unwrap().unwrap();
            let class = |index: usize| interpreter.name(Naming::RubyClass, addresses[index]);
            assert_eq!(class(0).unwrap(), "Outer::Übung");
            assert_eq!(class(1).unwrap(), "String");
            assert!(class(2).unwrap_err().to_string().contains("has no name"));
            assert!(class(3).is_err());
            // A `Proc`'s data: what it is called on, its variables, its code.
            let data = interpreter.memory.field(addresses[3], 32, "block").unwrap();
            let code = interpreter.memory.field(data, 16, "block").unwrap();
            let block = interpreter.name(Naming::RubyBlock, code).unwrap();
            assert_eq!(block, "block in <class:Übung> (names.rb:4)");
            assert!(interpreter.name(Naming::RubyBlock, addresses[0]).is_err());
        }
    }

    #[test]
    fn node_is_recognised_and_says_why_not() {
        let Some(node) = find("node_is_recognised", "node") else { return };
        let program = Program::start(Command::new(node).args(["-e", "setInterval(() => {}, 1000)"]));
        let interpreter = wait_for("node", || Interpreter::of(program.pid()).ok()?);
        assert_eq!(interpreter.name, "V8");
        let why = interpreter.frames(program.pid()).unwrap_err().to_string();
        assert!(why.contains("--perf-basic-prof"), "{why}");
    }

    #[test]
    fn native_programs_have_no_interpreter() {
        let program = Program::start(Command::new("sleep").arg("600"));
        wait_for("the sleep", || sleeps(program.pid(), program.pid()));
        assert!(Interpreter::of(program.pid()).unwrap().is_none());
    }
}
