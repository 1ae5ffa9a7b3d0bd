//! Detects the interpreter that a process runs, by the symbols that its files export, and reads its frames.

use std::{fs, io};

use anyhow::{Result, anyhow, bail};
use nix::libc;
use procfs::process::MemoryMap;

use super::{
    naming::Naming,
    python::{self, Python},
    ruby::{self, Ruby},
};
use crate::{
    binary::{
        elf::Elf,
        mappings::{Mappings, module_name},
        memory::ProcessMemory,
    },
    model::frame::{Frame, RuntimeLock},
};

/// An interpreter in a process. It belongs to the program that the process ran when it was detected: after an `exec`
/// every read fails, and the interpreter has to be detected again.
pub(crate) struct Interpreter {
    /// Name, with the version where that is known: `CPython 3.11.2`.
    pub(crate) name: String,
    /// Base name of the file that it is in.
    module: String,
    pid: u32,
    memory: ProcessMemory,
    /// Reads its frames; else why they cannot be read.
    reader: Result<Reader, String>,
}

enum Reader {
    Python(Python),
    Ruby(Ruby),
    /// The functions are among the native frames, and the process's perf map names them.
    Native,
}

/// Begins the reason why only some functions of V8 have names: those that it interprets share their native code.
const INTERPRETED: &str = "functions that V8 interprets";

impl Interpreter {
    /// Detects the interpreter of a process; `None` if it runs native code only.
    pub(crate) fn of(pid: u32) -> io::Result<Option<Self>> {
        let (mappings, memory) = (Mappings::of(pid)?, ProcessMemory::of(pid)?);
        for map in mappings.modules() {
            let Some(elf) = mappings.open(map).ok().and_then(|file| Elf::open(&file).ok()) else { continue };
            if let Some((name, reader)) = detect(pid, &elf, map, &memory) {
                let reader = reader.map_err(|why| format!("{why:#}"));
                let module = module_name(map).unwrap_or_default();
                return Ok(Some(Self { name, module, pid, memory, reader }));
            }
        }
        Ok(None)
    }

    /// Whether frames can be read; the error says why not.
    pub(crate) fn readable(&self) -> Result<(), String> {
        self.reader.as_ref().map(drop).map_err(Clone::clone)
    }

    /// Reads the frames of a thread, innermost first.
    pub(crate) fn frames(&self, tid: u32) -> Result<Vec<Frame>> {
        let reader =
            self.reader.as_ref().map_err(|why| anyhow!("frames of {} cannot be read: {why}", self.name))?;
        let own_tid = namespaced_tid(self.pid, tid)?;
        let frames = match reader {
            Reader::Python(python) => {
                let frames = python.frames(&self.memory, own_tid);
                // Only the first thread of a process can have come from its parent.
                frames.or_else(|error| if tid == self.pid { self.forked_frames(python) } else { Err(error) })
            }
            Reader::Ruby(ruby) => ruby.frames(&self.memory, own_tid, tid == self.pid),
            Reader::Native => bail!("{} has native frames only", self.name),
        };
        frames.map_err(|error| error.context(format!("frames of {} cannot be read", self.name)))
    }

    /// Whether all its functions are among the native frames.
    pub(crate) const fn is_native(&self) -> bool {
        matches!(self.reader, Ok(Reader::Native))
    }

    fn forked_frames(&self, python: &Python) -> Result<Vec<Frame>> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid))?;
        let ids = threads.filter_map(|thread| thread.ok()?.file_name().to_str()?.parse().ok());
        let own: Vec<u32> = ids.filter_map(|tid| namespaced_tid(self.pid, tid).ok()).collect();
        python.forked_frames(&self.memory, |id| own.contains(&id))
    }

    /// The function in which threads wait for the interpreter's lock. Builds without symbols do not name it.
    pub(crate) fn lock_frame(&self) -> Frame {
        Frame { function: "take_gil".into(), module: Some(self.module.clone()), file: None, line: None }
    }

    /// The lock of the interpreter that a thread waits for, with the function of the thread that has it; `None` if it does
    /// not wait for one, or that is unknown.
    pub(crate) fn awaited_lock(&self, tid: u32) -> Option<RuntimeLock> {
        let Ok(Reader::Python(python)) = &self.reader else { return None };
        let futex =
            || awaited_futex(&fs::read_to_string(format!("/proc/{}/task/{tid}/syscall", self.pid)).ok()?);
        let before = futex()?;
        let lock = python.awaited_lock(&self.memory, namespaced_tid(self.pid, tid).ok()?, before).ok()??;
        (futex() == Some(before)).then_some(lock)
    }
}

/// The address of the futex that a thread waits for, from `/proc/PID/task/TID/syscall`.
fn awaited_futex(call: &str) -> Option<u64> {
    let mut words = call.split_whitespace();
    let is_futex = words.next()?.parse() == Ok(libc::SYS_futex);
    u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok().filter(|_| is_futex)
}

impl Interpreter {
    /// Resolves the name of an object of the interpreter, which `value` is the address of.
    pub(crate) fn name(&self, naming: Naming, value: u64) -> Result<String> {
        let reader = self.reader.as_ref().map_err(|why| anyhow!("{why}"))?;
        match (reader, naming) {
            (Reader::Python(python), Naming::PythonCode) => python.code_name(&self.memory, value),
            (Reader::Python(python), Naming::PythonType) => python.type_name(&self.memory, value),
            (Reader::Ruby(ruby), Naming::RubyClass) => ruby.class_name(&self.memory, value),
            (Reader::Ruby(ruby), Naming::RubyBlock) => ruby.block_name(&self.memory, value),
            _ => bail!("{} has no objects of this kind", self.name),
        }
    }
}

/// Name and reader of the interpreter that a file is; `None` for any other file.
fn detect(pid: u32, elf: &Elf, map: &MemoryMap, memory: &ProcessMemory) -> Option<(String, Result<Reader>)> {
    let [python, python_version, ruby, v8] =
        elf.symbols(["_PyRuntime", "Py_Version", "ruby_version", "_ZN2v82V810GetVersionEv"]);
    let bias = elf.bias(map)?;
    let in_process = |address: u64| address.wrapping_add(bias);
    if let Some(runtime) = python {
        // CPython exports `Py_Version` since 3.11.
        let Some(version) = python_version else {
            return Some(("CPython".into(), Err(anyhow!("it is older than 3.11"))));
        };
        return Some(match python::version(memory, in_process(version)) {
            Ok((number, version)) => {
                let reader = Python::new(memory, in_process(runtime), number).map(Reader::Python);
                (format!("CPython {version}"), reader)
            }
            Err(error) => ("CPython".into(), Err(error)),
        });
    }
    if let Some(version) = ruby {
        return Some(match ruby::version(memory, in_process(version)) {
            Ok(version) => (format!("Ruby {version}"), Ruby::new(elf, bias, &version).map(Reader::Ruby)),
            Err(error) => ("Ruby".into(), Err(error)),
        });
    }
    v8.map(|_| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        ("V8".into(), v8_reader(&v8_options(&read("cmdline"), &read("environ"))))
    })
}

/// The options with which V8 was started, from `cmdline` and `environ`; in the spelling with hyphens.
fn v8_options(arguments: &[u8], environment: &[u8]) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('_', "-");
    let variables = environment.split(|&byte| byte == 0);
    let from_variables = variables.filter_map(|variable| variable.strip_prefix(b"NODE_OPTIONS="));
    let from_variables = from_variables.flat_map(|options| options.split(u8::is_ascii_whitespace));
    let options = arguments.split(|&byte| byte == 0).chain(from_variables).map(text);
    options.filter(|option| option.starts_with("--")).collect()
}

/// How functions of V8 get names, else which option is missing for that.
fn v8_reader(options: &[String]) -> Result<Reader> {
    let has = |names: &[&str]| options.iter().any(|option| names.contains(&option.as_str()));
    if !has(&["--perf-basic-prof", "--perf-basic-prof-only-functions"]) {
        bail!(
            "V8 moves its objects in memory; start it with --perf-basic-prof to have its functions named among the \
             native frames"
        );
    }
    if !has(&["--interpreted-frames-native-stack"]) {
        bail!(
            "{INTERPRETED} have no native code of their own; --interpreted-frames-native-stack gives it to them"
        );
    }
    Ok(Reader::Native)
}

/// Whether a reason why frames of an interpreter are missing applies to these native frames.
pub(crate) fn is_incomplete(why: &str, frames: &[Frame]) -> bool {
    let is_interpreted = |frame: &Frame| frame.function.contains("InterpreterEntryTrampoline");
    !why.contains(INTERPRETED) || frames.is_empty() || frames.iter().any(is_interpreted)
}

/// Id of a thread in its own PID namespace, as the process itself knows it. In a container it differs from `tid`.
fn namespaced_tid(pid: u32, tid: u32) -> Result<u32> {
    innermost_id(&fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?, tid)
}

/// The id in the innermost PID namespace, from the `NSpid` line of a `status` file; `tid` without such a line.
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
    use crate::binary::testing::{Program, find, is_asleep, source, threads, wait_for};

    /// Nested functions that sleep or spin, in the main thread, another thread or a forked process.
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

    /// Writes the addresses of a class that got an instance variable before its name was first asked for, of a built-in
    /// class, of an anonymous class, and of a block.
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

    /// Process id and thread id of the thread that runs the functions.
    fn worker(program: &Program, location: &str) -> (u32, u32) {
        let pid = program.pid();
        match location {
            // An interpreter may have internal threads, of which no frames can be read.
            "thread" => wait_for("a thread", || {
                let interpreter = Interpreter::of(pid).ok()??;
                let mut others = threads(pid).into_iter().filter(|&tid| tid != pid);
                Some((pid, others.find(|&tid| interpreter.frames(tid).is_ok())?))
            }),
            "fork" => wait_for("a child", || {
                let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
                let child = children.split_whitespace().next()?.parse().ok()?;
                // A wrapper that starts the interpreter may have other children.
                Interpreter::of(child).ok()??;
                Some((child, child))
            }),
            _ => (pid, pid),
        }
    }

    /// Checks the frames of a script: `asleep` are the innermost with their lines while it sleeps, `busy` those from
    /// the loop on while it spins.
    fn check(start: impl Fn(&str, &str) -> Program, script: &Path, asleep: &[&str], busy: &[&str]) {
        for location in ["main", "thread", "fork"] {
            let program = start("sleep", location);
            let (pid, tid) = worker(&program, location);
            let shown = |frame: &Frame| format!("{}:{}", frame.function, frame.line.unwrap_or(0));
            let frames = wait_for("the sleep", || {
                is_asleep(pid, tid)?;
                let frames = Interpreter::of(pid).ok()??.frames(tid).ok()?;
                frames.first().is_some_and(|first| shown(first) == asleep[0]).then_some(frames)
            });
            let stack: Vec<_> = frames.iter().map(shown).take(asleep.len()).collect();
            assert_eq!(stack, asleep, "{location}");
            assert!(frames.iter().all(|frame| frame.line != Some(0)));
            assert_eq!(frames[asleep.len() - 1].file.as_deref(), script.to_str());
            kill_forked(pid, &program);
        }
        for location in ["main", "thread"] {
            let program = start("spin", location);
            let (pid, tid) = worker(&program, location);
            let interpreter = wait_for("the loop", || {
                let interpreter = Interpreter::of(pid).ok()??;
                let frames = interpreter.frames(tid).ok()?;
                frames.iter().any(|frame| frame.function == busy[0]).then_some(interpreter)
            });
            let (mut read, begun) = (0, Instant::now());
            for _ in 0..200 {
                let Ok(frames) = interpreter.frames(tid) else { continue };
                read += 1;
                let names: Vec<_> = frames.iter().map(|frame| frame.function.as_str()).collect();
                // The innermost frames of a running thread may be missing, but never one in between.
                let at =
                    names.iter().position(|name| busy.contains(name)).unwrap_or_else(|| panic!("{names:?}"));
                let from = busy.iter().position(|name| *name == names[at]).unwrap();
                assert!(names[at..].starts_with(&busy[from..]), "{location}: {names:?}");
            }
            eprintln!(
                "{}: {read} of 200 stacks of a busy thread, in {:?}",
                interpreter.name,
                begun.elapsed()
            );
            assert!(read > 150);
        }
    }

    /// Kills a forked process, which would outlive the program that forked it.
    fn kill_forked(pid: u32, program: &Program) {
        if pid != program.pid() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
        }
    }

    /// Interpreters to test: the one in `PATH`, Debian's, and those whose paths the variable `more` lists.
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
                |how, location| Program::start(Command::new(&python).arg(&script).args([how, location])),
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
                |how, location| Program::start(Command::new(&ruby).arg(&script).args([how, location])),
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
            let output = folder.path().join("addresses");
            let program = Program::start(Command::new(&ruby).args([&script, &output]));
            let text = wait_for("addresses", || {
                fs::read_to_string(&output).ok().filter(|text| text.lines().count() == 4)
            });
            let addresses: Vec<_> = text.lines().map(|line| u64::from_str_radix(line, 16).unwrap()).collect();
            let interpreter = Interpreter::of(program.pid()).unwrap().unwrap();
            let class = |index: usize| interpreter.name(Naming::RubyClass, addresses[index]);
            assert_eq!(class(0).unwrap(), "Outer::Übung");
            assert_eq!(class(1).unwrap(), "String");
            assert!(class(2).unwrap_err().to_string().contains("has no name"));
            assert!(class(3).is_err());
            // A `Proc`'s data: its `self`, its environment, its code.
            let data = interpreter.memory.field(addresses[3], 32, "block").unwrap();
            let code = interpreter.memory.field(data, 16, "block").unwrap();
            let block = interpreter.name(Naming::RubyBlock, code).unwrap();
            assert_eq!(block, "block in <class:Übung> (names.rb:4)");
            assert!(interpreter.name(Naming::RubyBlock, addresses[0]).is_err());
        }
    }

    #[test]
    fn node_is_detected_and_its_frames_cannot_be_read() {
        let Some(node) = find("node_is_detected", "node") else { return };
        let program = Program::start(Command::new(node).args(["-e", "setInterval(() => {}, 1000)"]));
        let interpreter = wait_for("node", || Interpreter::of(program.pid()).ok()?);
        assert_eq!(interpreter.name, "V8");
        let why = interpreter.frames(program.pid()).unwrap_err().to_string();
        assert!(why.contains("--perf-basic-prof"), "{why}");
    }

    #[test]
    fn only_the_missing_option_of_v8_is_suggested() {
        let missing = |arguments: &[u8], environment: &[u8]| {
            v8_reader(&v8_options(arguments, environment)).err().map(|why| why.to_string())
        };
        let has = |why: Option<String>, part: &str| why.is_some_and(|why| why.contains(part));
        assert!(has(missing(b"node\0app.js\0", b""), "--perf-basic-prof"));
        assert!(has(missing(b"node\0--interpreted-frames-native-stack\0app.js\0", b""), "--perf-basic-prof"));
        for environment in
            [&b"A=b\0NODE_OPTIONS=--no-warnings --perf-basic-prof\0"[..], b"NODE_OPTIONS=--perf_basic_prof"]
        {
            let why = missing(b"node\0app.js\0", environment).unwrap();
            assert!(
                why.contains("--interpreted-frames-native-stack") && !why.contains("--perf-basic-prof"),
                "{why}"
            );
            let frame = |function: &str| Frame { function: function.into(), ..Frame::unknown(0, None) };
            assert!(is_incomplete(
                &why,
                &[frame("Builtin:InterpreterEntryTrampoline"), frame("JS:*f /a.js:1:1")]
            ));
            assert!(!is_incomplete(&why, &[frame("JS:*f /a.js:1:1")]));
        }
        let both = b"node\0--perf-basic-prof-only-functions\0--interpreted_frames_native_stack\0app.js\0";
        assert_eq!(missing(both, b""), None);
        assert!(is_incomplete("it is older than 3.11", &[]));
    }

    /// A thread that keeps the GIL for as long as it computes, and the main thread, which has to wait for it after each
    /// sleep.
    const CONVOY: &str = "import sys, threading, time
def crunch():
    while True:
        sum(range(100))
def serve():
    while True:
        time.sleep(0.001)
sys.setswitchinterval(30)
threading.Thread(target=crunch, daemon=True).start()
serve()
";

    #[test]
    fn the_gil_and_its_holder_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let script = source(folder.path(), "convoy.py", CONVOY);
        for python in interpreters("the_gil_and_its_holder", "python3", "OBSERVER_TEST_PYTHONS") {
            let program = Program::start(Command::new(&python).arg(&script));
            let pid = program.pid();
            let lock = wait_for("a wait for the GIL", || {
                Interpreter::of(pid).ok()??.awaited_lock(pid).filter(|lock| lock.holder.is_some())
            });
            let holder = lock.holder.unwrap();
            assert_eq!((lock.name, holder.function.as_str()), ("GIL", "crunch"));
            let other = threads(pid).into_iter().find(|&tid| tid != pid).unwrap();
            assert_eq!(Interpreter::of(pid).unwrap().unwrap().awaited_lock(other), None);
        }
        // A thread that waits for another lock does not wait for the GIL.
        for python in interpreters("the_gil_and_its_holder", "python3", "OBSERVER_TEST_PYTHONS") {
            let other = "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()";
            let program = Program::start(Command::new(&python).args(["-c", other]));
            let pid = program.pid();
            let interpreter = wait_for("the lock", || {
                is_asleep(pid, pid)?;
                let interpreter = Interpreter::of(pid).ok()??;
                awaited_futex(&fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?)?;
                Some(interpreter)
            });
            assert_eq!(interpreter.awaited_lock(pid), None);
        }
    }

    /// A process that was forked without Python's knowledge, as uWSGI forks its workers.
    #[test]
    fn a_process_forked_by_native_code_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let fork = "import ctypes, os, time
def planted():
    time.sleep(600)
if ctypes.PyDLL(None).fork():
    os.wait()
else:
    planted()
";
        let script = source(folder.path(), "fork.py", fork);
        for python in interpreters("a_process_forked_by_native", "python3", "OBSERVER_TEST_PYTHONS") {
            let program = Program::start(Command::new(&python).arg(&script));
            let (child, _) = worker(&program, "fork");
            let frames = wait_for("the sleep", || {
                is_asleep(child, child)?;
                let frames = Interpreter::of(child).ok()??.frames(child).ok()?;
                frames.first().is_some_and(|first| first.function == "planted").then_some(frames)
            });
            assert_eq!((frames[0].function.as_str(), frames[0].line), ("planted", Some(3)));
            kill_forked(child, &program);
        }
    }

    #[test]
    fn native_programs_have_no_interpreter() {
        let program = Program::start(Command::new("sleep").arg("600"));
        wait_for("the sleep", || is_asleep(program.pid(), program.pid()));
        assert!(Interpreter::of(program.pid()).unwrap().is_none());
    }
}
