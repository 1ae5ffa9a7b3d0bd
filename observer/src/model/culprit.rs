//! Which function of a stack is to blame: the innermost one of the user's own code. Below it are the functions of libraries
//! and runtimes that it has called, above it those that run the event loop.

use super::frame::{Frame, StackSample};

/// Who wrote a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Author {
    /// The runtime, the standard library or the C library.
    Runtime,
    /// A library, or unknown.
    Library,
    /// The user.
    User,
}

/// Beginnings of the file names of libraries that are a runtime.
const RUNTIME_MODULES: &[&str] = &[
    "ld-linux",
    "ld-musl",
    "libc++",
    "libc-",
    "libc.",
    "libcrypto.",
    "libdl",
    "libev-",
    "libev.",
    "libevent",
    "libgcc_s",
    "libjvm",
    "libm.",
    "libm-",
    "libnode",
    "libpthread",
    "libpython",
    "librt.",
    "librt-",
    "libruby",
    "libssl.",
    "libstdc++",
    "liburing",
    "libuv.",
    "libv8",
    "vdso",
];

/// Names of runtimes' programs, which a version may follow: `python3.11`, but not `node_exporter`.
const RUNTIME_PROGRAMS: &[&str] = &["node", "nodejs", "php", "php-fpm", "python", "ruby"];

/// Parts of the paths of a runtime's source files.
const RUNTIME_FILES: &[&str] = &[
    "/.rustup/toolchains/",
    "/golang.org/toolchain@",
    "/lib/go-",
    "/lib/python3",
    "/lib/ruby/",
    "/local/go/src/",
    "/rustc/",
    "../sysdeps/",
];

/// Parts of the paths of other libraries' source files. They may be in a folder of the runtime.
const LIBRARY_FILES: &[&str] = &[
    "/.cargo/",
    "/dist-packages/",
    "/gems/",
    "/node_modules/",
    "/pkg/mod/",
    "/rubygems-integration/",
    "/site-packages/",
];

/// Beginnings of the names of functions of a runtime, where the file is unknown.
const RUNTIME_FUNCTIONS: &[&str] = &[
    "<alloc::",
    "<core::",
    "<std::",
    "__libc_",
    "__rust",
    "_start",
    "alloc::",
    "core::",
    "runtime.",
    "rust_begin",
    "std::",
    "syscall.",
    "tokio::",
];

/// Beginnings of the names that V8 and the JDK give to code that is no user's.
const JIT_RUNTIME: &[&str] = &["Builtin:", "BytecodeHandler:", "Handler:", "RegExp:", "Stub:", "WasmStub:"];

/// Beginnings of the names that V8 gives to functions in JavaScript.
const JAVASCRIPT: &[&str] = &["Eval:", "Function:", "JS:", "LazyCompile:", "Script:"];

/// Packages of the JDK.
const JDK: &[&str] = &["com.sun.", "java.", "javax.", "jdk.", "sun."];

/// Functions that call the callbacks of an event loop. A caller of these started the loop, and is not to blame.
const DISPATCHERS: &[&str] = &[
    "BaseEventLoop._run_once",
    "BaseEventLoop.run_forever",
    "Handle._run",
    "aeProcessEvents",
    "ev_run",
    "event_base_loop",
    "uv_run",
];

impl StackSample {
    /// The function to blame, as an index into the frames: the innermost one of the user's own code that the event loop
    /// has called; else the innermost one of a library; else the innermost one. `None` without frames.
    pub(crate) fn culprit(&self) -> Option<usize> {
        let is_dispatcher = |frame: &Frame| DISPATCHERS.contains(&frame.function.as_str());
        let end = self.frames.iter().position(is_dispatcher).unwrap_or(self.frames.len());
        let called = &self.frames[..end.max(1).min(self.frames.len())];
        let by = |author| called.iter().position(move |frame| author_of(frame) == author);
        by(Author::User).or_else(|| by(Author::Library)).or((!called.is_empty()).then_some(0))
    }

    /// Whether the function to blame is the user's own.
    pub(crate) fn own_culprit(&self) -> Option<&Frame> {
        let frame = &self.frames[self.culprit()?];
        (author_of(frame) == Author::User).then_some(frame)
    }

    /// Whether the thread slept in a function of its runtime that waits for a lock with a timeout: `Thread.sleep` of Java, or
    /// `sleep` of Ruby.
    pub(super) fn is_sleep_of_runtime(&self) -> bool {
        let is_of_ruby = |frame: &Frame| *frame == Frame::in_c("sleep");
        let is_of_java = |frame: &Frame| {
            let is_jvm = frame.module.as_ref().is_some_and(|module| module.starts_with("libjvm"));
            is_jvm && frame.function.starts_with("JVM_Sleep")
        };
        !self.is_on_cpu && (self.frames.first().is_some_and(is_of_ruby) || self.frames.iter().any(is_of_java))
    }

    /// Whether the same function of the user's own code is to blame for both, whatever it has called.
    pub(crate) fn has_same_culprit(&self, other: &Self) -> bool {
        let callers = |sample: &Self| sample.own_culprit().and(sample.culprit());
        match (callers(self), callers(other)) {
            (Some(one), Some(two)) => {
                self.lock_name() == other.lock_name() && are_alike(&self.frames[one..], &other.frames[two..])
            }
            _ => false,
        }
    }

    /// Whether another sample has the same functions, on any lines.
    pub(crate) fn has_same_functions(&self, other: &Self) -> bool {
        // With frames, the reason may have numbers that differ.
        let is_as_complete = self.missing.is_some() == other.missing.is_some()
            && (!self.frames.is_empty() || self.missing == other.missing);
        is_as_complete && self.lock_name() == other.lock_name() && are_alike(&self.frames, &other.frames)
    }
}

/// Whether two stacks have the same functions. Samples of a loop differ in their lines, and JIT-compiled code without a
/// name is at another address after each compilation.
fn are_alike(one: &[Frame], other: &[Frame]) -> bool {
    let is_same = |(a, b): (&Frame, &Frame)| {
        (a.is_unnamed_jit() && b.is_unnamed_jit())
            || (&a.function, &a.module, &a.file) == (&b.function, &b.module, &b.file)
    };
    one.len() == other.len() && one.iter().zip(other).all(is_same)
}

fn author_of(frame: &Frame) -> Author {
    let starts = |text: &str, beginnings: &[&str]| beginnings.iter().any(|start| text.starts_with(start));
    let has = |text: &str, parts: &[&str]| parts.iter().any(|part| text.contains(part));
    let Frame { function, module, file, .. } = frame;
    let of_file = |file: &str| {
        if has(file, LIBRARY_FILES) {
            Author::Library
        } else if has(file, RUNTIME_FILES) || starts(file, &["<frozen ", "<internal:", "node:", "library/"]) {
            Author::Runtime
        } else {
            Author::User
        }
    };
    if let Some(module) = module {
        let is_version = |rest: &str| rest.chars().all(|c| c.is_ascii_digit() || c == '.');
        let is_program = |name: &&str| module.strip_prefix(*name).is_some_and(is_version);
        if starts(module, RUNTIME_MODULES)
            || RUNTIME_PROGRAMS.iter().any(is_program)
            || starts(function, RUNTIME_FUNCTIONS)
        {
            return Author::Runtime;
        }
        let is_library = module.contains(".so");
        return match file {
            Some(file) => of_file(file),
            None if is_library => Author::Library,
            None => Author::User,
        };
    }
    if let Some(file) = file {
        return of_file(file);
    }
    if frame.is_unnamed_jit() {
        return Author::Library;
    }
    if starts(function, JIT_RUNTIME) {
        return Author::Runtime;
    }
    if starts(function, JAVASCRIPT) {
        // `JS:*handle /srv/app/server.js:12:3`; Node's own files are `node:net`.
        let file = function.split_once(' ').map_or("", |(_, file)| file);
        return if file.is_empty() { Author::Runtime } else { of_file(file) };
    }
    of_java(function)
}

/// Who wrote a method, by names such as `void app.Main.work(int)` and `Lapp/Main;::work`. Other code in a JVM, and methods
/// of Ruby that are written in C, have plain names.
fn of_java(function: &str) -> Author {
    let name = match function.split_once(";::") {
        Some((class, _)) => class.trim_start_matches('L').replace('/', "."),
        None => {
            let Some((before, _)) = function.split_once('(') else { return Author::Runtime };
            before.rsplit(' ').next().unwrap_or(before).replace("::", ".")
        }
    };
    let is_runtime = !name.contains('.') || JDK.iter().any(|package| name.starts_with(package));
    if is_runtime { Author::Runtime } else { Author::User }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str, module: Option<&str>, file: Option<&str>) -> Frame {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Frame { function: function.into(), module: owned(module), file: owned(file), line: file.map(|_| 7) }
    }

    fn sample(frames: Vec<Frame>) -> StackSample {
        StackSample { frames, ..StackSample::default() }
    }

    fn culprit(frames: Vec<Frame>) -> String {
        let sample = sample(frames);
        sample.frames[sample.culprit().unwrap()].function.clone()
    }

    #[test]
    fn the_innermost_function_of_the_user_is_to_blame() {
        let python = |function, file| frame(function, None, Some(file));
        let loops = || python("Handle._run", "/usr/lib/python3.11/asyncio/events.py");
        let main = || python("main", "/srv/app/server.py");
        let stack = vec![
            python("JSONDecoder.decode", "/usr/lib/python3.11/json/decoder.py"),
            python("Response.json", "/srv/venv/lib/python3.11/site-packages/requests/models.py"),
            python("handle", "/srv/app/views.py"),
            python("serve", "/srv/app/server.py"),
            loops(),
            main(),
        ];
        assert_eq!(culprit(stack), "handle");
        // What started the loop has not called the library.
        let library = python("Task.run", "/srv/venv/lib/python3.11/site-packages/jobs/task.py");
        assert_eq!(culprit(vec![library, loops(), main()]), "Task.run");
        let select = python("EpollSelector.select", "/usr/lib/python3.11/selectors.py");
        assert_eq!(culprit(vec![select, loops(), main()]), "EpollSelector.select");
        assert_eq!(culprit(vec![loops(), main()]), "Handle._run");
        assert_eq!(sample(Vec::new()).culprit(), None);
    }

    #[test]
    fn code_of_libraries_and_runtimes_is_recognised() {
        let user = frame("serve", Some("server"), Some("/srv/server.c"));
        for runtime in [
            frame("clock_nanosleep", Some("libc.so.6"), None),
            frame(
                "__GI___clock_nanosleep",
                Some("libc.so.6"),
                Some("../sysdeps/unix/sysv/linux/clock_nanosleep.c"),
            ),
            frame("std::thread::sleep", Some("server"), None),
            frame("std::thread::sleep", Some("server"), Some("/rustc/90b35a6/library/std/src/thread/mod.rs")),
            frame(
                "read_entropy",
                Some("server"),
                Some("/home/me/.cargo/registry/src/index/rand-0.8/src/lib.rs"),
            ),
            frame("time.Sleep", Some("server"), Some("/usr/local/go/src/runtime/time.go")),
            frame("node::fs::Read", Some("node"), None),
            frame("JS:*readSync node:fs:700:18", None, None),
            frame("JS:~parse /srv/node_modules/a/b.js:1:2", None, None),
            frame("Builtin:InterpreterEntryTrampoline", None, None),
            frame("sleep", None, None),
            frame("Integer#times", None, Some("<internal:numeric>")),
            frame("puts", None, Some("/var/lib/gems/3.1.0/gems/puma-6/lib/puma.rb")),
            frame("void java.lang.Thread.sleep(long)", None, None),
            frame("Ljava/lang/Thread;::sleep", None, None),
            frame("Interpreter", None, None),
            Frame::unknown(0x1f0, Some("libz.so.1".into())),
            Frame::unknown(0x7f00_1000, None),
        ] {
            assert_eq!(culprit(vec![runtime, user.clone()]), "serve");
        }
        for own in [
            frame("rd", Some("redis-server"), None),
            frame("main.collect", Some("node_exporter"), None),
            frame("JS:~handle /srv/app.js:3:1", None, None),
            frame("LazyCompile:*inner [eval]:1:16", None, None),
            frame("void app.Main.work(int)", None, None),
            frame("Lapp/Main;::work", None, None),
            frame("block in serve", None, Some("/srv/app.rb")),
            Frame::unknown(0x1f0, Some("redis-server".into())),
        ] {
            let name = own.function.clone();
            assert_eq!(culprit(vec![frame("sleep", None, None), own, user.clone()]), name);
        }
    }

    #[test]
    fn addresses_do_not_make_two_culprits_of_one() {
        let work = || frame("JS:*work /srv/app.js:3:1", None, None);
        let jit = |address| Frame::unknown(address, None);
        let (one, other) = (sample(vec![work(), jit(0x7f01)]), sample(vec![work(), jit(0x7f02)]));
        assert!(one.has_same_functions(&other) && one.has_same_culprit(&other));
        let in_libc = |address| Frame::unknown(address, Some("libc.so.6".into()));
        let (one, other) = (sample(vec![in_libc(1), work()]), sample(vec![in_libc(2), in_libc(3), work()]));
        assert!(one.has_same_culprit(&other) && !one.has_same_functions(&other));
        let another = sample(vec![in_libc(1), frame("JS:*play /srv/app.js:9:1", None, None)]);
        assert!(!one.has_same_culprit(&another));
        assert!(!sample(vec![in_libc(1)]).has_same_culprit(&sample(vec![in_libc(1)])));
    }
}
