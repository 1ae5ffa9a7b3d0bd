//! Minimum requirement for every kernel: all programs load and attach. The rest of the kernel contract, an exact count
//! or time for each probe, are the tests that declare `contract`.

use std::process::Command;

use procfs::sys::kernel::Version;

use crate::support::{
    interactive::Interactive,
    kernel::programs_of,
    observer::{BINARY, Observer},
};

/// A target for all probes: it listens on TCP and on a unix socket, has an event loop, collects garbage, and defers
/// tasks.
const SERVER: &str = "
import asyncio, tempfile
async def serve(reader, writer): writer.close()
async def main():
    with tempfile.TemporaryDirectory() as folder:
        await asyncio.start_unix_server(serve, folder + '/socket')
        server = await asyncio.start_server(serve, '127.0.0.1', 0)
        print(flush=True)
        await server.serve_forever()
asyncio.run(main())
";

/// Names of all programs, as `observer probes` lists them.
fn programs() -> Vec<String> {
    let output = Command::new(BINARY).arg("probes").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let hooks = text.lines().filter_map(|line| line.trim().strip_prefix("hook "));
    hooks.map(|hook| hook.split_whitespace().next().unwrap().to_owned()).collect()
}

/// Tracepoints that the oldest supported kernel does not have.
const MISSING_IN_5_10: [&str; 2] = ["syscalls/sys_enter_epoll_pwait2", "syscalls/sys_exit_epoll_pwait2"];

#[real_test(contract)]
fn every_program_loads_and_attaches() {
    let mut server = Interactive::python(SERVER);
    server.next_line();
    let pid = server.pid().to_string();
    let all = ["--reactor-calls", "epoll,io_uring,poll,select", "--profile", "asyncio,CPython"];
    let observer = Observer::start(&[&["--no-listen", "--pid", &pid], &all[..]].concat());
    let held = programs_of(&observer);
    let report = observer.finish();
    let unseen: Vec<_> = report.0["self"]["missing"].as_array().unwrap().iter().collect();
    let is_old = Version::current().unwrap() < Version::new(5, 11, 0);
    assert!(is_old || unseen.is_empty(), "{unseen:?}");
    assert!(unseen.iter().all(|it| MISSING_IN_5_10.iter().any(|&newer| it["source"] == newer)), "{unseen:?}");
    let mut missing = programs();
    assert!(missing.len() > 20, "these are not all programs: {missing:?}");
    missing.retain(|program| !held.contains(program) && (unseen.is_empty() || program != "pwait2_enter"));
    assert!(missing.is_empty(), "not in the kernel: {missing:?}; there are {held:?}");
}
