//! Functions that a library does not export: they are found in separate debug files, also in the root of a process in
//! another mount namespace, and in each copy of a library that a process has loaded.

use std::{
    fs::{self, File},
    io::{BufReader, Write as _},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use tempfile::TempDir;

use crate::harness::skip;
use crate::support::{
    deferred::{DeferringServer, GROUND_TRUTH, assert_links_correct, compare, jobs_for, send_request},
    example, http,
    observer::Observer,
};

/// Number of tasks of each test.
const TASKS: usize = 3_000;

#[track_caller]
fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Moves the symbols of a file to another file, and adds a debug link to it.
fn strip(file: &Path, debug: &Path) {
    fs::create_dir_all(debug.parent().unwrap()).unwrap();
    let objcopy = |arguments: &[&str], files: &[&Path]| {
        run(Command::new("objcopy").args(arguments).args(files));
    };
    objcopy(&["--only-keep-debug"], &[file, debug]);
    objcopy(&["--strip-all"], &[file]);
    objcopy(&[&format!("--add-gnu-debuglink={}", debug.display())], &[file]);
}

/// A copy of the server in a new folder, stripped, with its symbols in the file `debug`.
fn stripped(debug: &str) -> (Arc<TempDir>, PathBuf) {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let server = folder.path().join("deferred_library");
    fs::copy(example("deferred_library"), &server).unwrap();
    let debug = folder.path().join(debug);
    strip(&server, &debug);
    (folder, debug)
}

fn start(folder: &Arc<TempDir>) -> DeferringServer {
    let mut command = Command::new(folder.path().join("deferred_library"));
    command.arg(folder.path().join(GROUND_TRUTH));
    DeferringServer::start_in(Arc::clone(folder), command)
}

/// Sends jobs of four tasks each, and compares all links.
#[track_caller]
fn assert_linked(how: &str, server: &DeferringServer) {
    let observer = server.observe_library();
    let per_job = 4;
    server.load(jobs_for(TASKS, per_job), per_job);
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_links_correct(how, &report, &[server.pid()], &comparison, records.len());
}

#[real_test(alone, userspace, links, programs(&["objcopy"]))]
fn debug_file_is_found_by_its_link_and_verified_by_its_checksum() {
    let (folder, debug) = stripped(".debug/deferred_library.debug");
    let server = start(&folder);
    assert_linked("a debug link", &server);

    File::options().append(true).open(debug).unwrap().write_all(b"more").unwrap();
    let report = server.observe_library().finish();
    let missing = report.0["self"]["missing"].to_string();
    let why = "deferred_library has no function context_snapshot, or is stripped";
    assert!(missing.contains(why), "{missing}");
    assert_eq!(report.target(server.pid())["hooks"].as_array().unwrap().len(), 0);
}

/// Another root in a mount namespace of its own, as in containers.
#[real_test(alone, userspace, links, programs(&["objcopy", "readelf"]))]
fn debug_files_are_found_in_the_root_of_the_process() {
    for by_build in [false, true] {
        let (folder, debug) = stripped("usr/lib/debug/deferred_library.debug");
        let server = folder.path().join("deferred_library");
        if by_build {
            let notes = run(Command::new("readelf").arg("-n").arg(&server));
            let notes = String::from_utf8(notes).unwrap();
            let id = notes.lines().find_map(|line| line.trim().strip_prefix("Build ID: "));
            let id = id.unwrap_or_else(|| skip("the linker adds no build id"));
            let place = debug.with_file_name(format!(".build-id/{}/{}.debug", &id[..2], &id[2..]));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::rename(&debug, place).unwrap();
        }
        fs::create_dir(folder.path().join("old")).unwrap();
        let mut command = Command::new("unshare");
        let script =
            "mount --bind \"$0\" \"$0\" && cd \"$0\" && pivot_root . old && exec /deferred_library \"$1\"";
        command.args(["--mount", "sh", "-c", script]).arg(folder.path()).arg(format!("/{GROUND_TRUTH}"));
        let server = DeferringServer::start_in(Arc::clone(&folder), command);
        let root = fs::read_link(format!("/proc/{}/exe", server.pid())).unwrap();
        assert_eq!(root, Path::new("/deferred_library"), "it has a root of its own");
        assert_linked(if by_build { "a build id in a root" } else { "a debug link in a root" }, &server);
    }
}

/// Neither function is exported. `noipa` keeps the compiler from specialising them for constant arguments.
const LIBRARY: &str = "
    static volatile unsigned long enqueued, started;
    __attribute__((noipa)) static void context_snapshot(unsigned long task) { enqueued += task; }
    __attribute__((noipa)) static void context_restore(unsigned long task) { started += task; }
    void submit(unsigned long task) { context_snapshot(task); }
    void execute(unsigned long task) { context_restore(task); }
";

/// Two libraries of the same name. One is linked at a fixed base, as if prelinked, and stripped. The other is loaded
/// twice, the second time while it is observed.
#[real_test(alone, userspace, links, programs(&["gcc", "objcopy"]))]
fn tasks_are_followed_through_every_copy_of_a_library() {
    let folder = tempfile::tempdir().unwrap();
    let code = folder.path().join("code.c");
    fs::write(&code, LIBRARY).unwrap();
    let library = |name: &str, how: &[&str]| {
        let path = folder.path().join(name).join("libcopied.so");
        fs::create_dir(path.parent().unwrap()).unwrap();
        run(Command::new("gcc")
            .args(["-O2", "-shared", "-fPIC", "-nostdlib", "-o"])
            .args([&path, &code])
            .args(how));
        path
    };
    let (one, other) = (library("one", &[]), library("other", &["-Wl,-Ttext-segment=0x10000000"]));
    strip(&other, &other.with_file_name("libcopied.debug"));

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/deferred_copies.py");
    let mut command = Command::new("/usr/bin/python3");
    command.arg(script).args([&one, &other]).arg(format!("again:{}", one.display()));
    let server = DeferringServer::start(command);
    let pid = server.pid().to_string();
    let arguments =
        ["--snapshot", "libcopied:context_snapshot:arg0", "--restore", "libcopied:context_restore:arg0"];
    let observer =
        Observer::start(&[&["--pid", &pid, "--no-listen", "--profile", "none"][..], &arguments].concat());
    send_request(&mut BufReader::new(http::connect(server.port)), "/load");
    // observer looks for new copies once a second.
    thread::sleep(Duration::from_millis(2_500));
    let per_job = 6;
    let jobs = jobs_for(TASKS, per_job);
    server.load(jobs, per_job);
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_links_correct("copies", &report, &[server.pid()], &comparison, records.len());
    let hooks = report.target(server.pid())["hooks"].as_array().unwrap();
    // Hooks of all copies are reported as one.
    assert_eq!(hooks.len(), 2, "{hooks:#?}");
    for hook in hooks {
        let each = serde_json::json!(records.len());
        assert_eq!((&hook["hits"], &hook["matches"]), (&each, &each), "{hook:#}");
    }
}
