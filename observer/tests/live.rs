//! The live view in a real terminal: its first screen, and how it restores the terminal.

use std::{
    io::BufReader,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::sys::signal::Signal;

use crate::support::{
    deferred::{DeferringServer, send_request},
    http,
    observer::BINARY,
    send,
    servers::Server,
    wait_for,
};

/// Number of requests whose tasks the view counts.
const JOBS: usize = 23;

/// A terminal that runs observer and prints the state of the terminal after that.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn start(test: &str, environment: &str, pid: u32) -> Self {
        let socket = format!("observer-test-{}-{test}", std::process::id());
        let inside = format!(
            "env {environment} {BINARY} --pid {pid} --no-listen; echo ended with $?; stty -a; exec sleep 300"
        );
        let started = Command::new("tmux")
            .args(["-L", &socket, "-f", "/dev/null"])
            .args(["new-session", "-d", "-x", "80", "-y", "24", &inside])
            .status();
        assert!(started.unwrap().success(), "tmux does not start");
        Self { socket }
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-L", &self.socket])
            .args(arguments)
            .output()
            .expect("tmux is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// Waits until the screen is as wanted, and returns it.
    fn wait(&self, what: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        wait_for(what, || Some(self.screen()).filter(|screen| is_wanted(screen)))
    }

    /// Asserts that observer has printed its report and restored the terminal.
    #[track_caller]
    fn assert_restored(&self) {
        self.wait("observer to end", |screen| screen.contains("icanon"));
        let state = self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]);
        assert_eq!(state, "0 1\n");
        let all = self.tmux(&["capture-pane", "-p", "-S", "-500"]);
        for part in ["observed for ", "LATE: ", "ended with 0", "icanon", "isig", " echo "] {
            assert!(all.contains(part), "{part} is missing: {all}");
        }
        assert!(!all.contains("-icanon") && !all.contains("-isig"), "{all}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.screen());
        }
        self.tmux(&["kill-server"]);
    }
}

/// Runs an action while the loop of a server keeps sleeping for 150 ms at a time, with a client waiting.
fn while_late(server: &Server, action: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                server.sleep_while_asked(150);
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn is_late(screen: &str) -> bool {
    screen.lines().nth(1).is_some_and(|line| line.starts_with("LATE python3"))
        && screen.lines().nth(2).is_some_and(|line| line.contains("asleep") && line.contains("block ("))
}

#[real_test(programs(&["tmux"]))]
fn first_screen_shows_the_late_loop_and_its_cause() {
    let server = Server::asyncio();
    let terminal = Terminal::start("the_first_screen", "LANG=C.UTF-8", server.pid());
    while_late(&server, || {
        let screen = terminal.wait("the first screen to show the late loop", is_late);
        assert!(screen.lines().next().unwrap().starts_with(" observer  python3"), "{screen}");
        assert!(screen.contains(&format!("127.0.0.1:{}", server.port)), "{screen}");
        assert!(screen.trim_end().lines().last().unwrap().starts_with("q quit"), "{screen}");
        terminal.tmux(&["resize-window", "-x", "120", "-y", "40"]);
        // The screen may be captured while it is being drawn.
        terminal.wait("the view to be resized", |screen| {
            screen.trim_end().lines().count() == 40 && is_late(screen) && screen.contains("of process")
        });
        terminal.press("Enter");
        terminal.wait("details", |screen| screen.contains("lag, since start") && screen.contains("STALLS"));
        terminal.tmux(&["resize-window", "-x", "40", "-y", "10"]);
        terminal.wait("a message", |screen| screen.contains("too small"));
        terminal.tmux(&["resize-window", "-x", "100", "-y", "30"]);
        terminal.press("Escape");
        terminal.wait("the overview", |screen| is_late(screen) && screen.contains("q quit"));
        terminal.press("q");
        terminal.assert_restored();
    });
}

/// The list and the details show the number of deferred tasks that the server enqueued.
#[real_test(programs(&["tmux"]))]
fn deferred_tasks_are_listed() {
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let terminal = Terminal::start("deferred_work", "LANG=C.UTF-8", server.pid());
    terminal.wait("the first screen", |screen| screen.contains("q quit") && !screen.contains("(attaching"));
    let mut connection = BufReader::new(http::connect(server.port));
    for job in 0..JOBS {
        send_request(&mut connection, &format!("/job/{job}"));
    }
    terminal.tmux(&["resize-window", "-x", "120", "-y", "60"]);
    terminal.wait("its kinds", |screen| screen.contains("DEFERRED TASKS"));
    // Focuses the accept queues, then deferred tasks, and opens one kind.
    for key in ["Tab", "Tab", "/", "thumbnail", "Enter"] {
        terminal.press(key);
    }
    terminal.wait("the filter", |screen| screen.contains("(Esc clears it)"));
    terminal.press("Enter");
    let ended = format!(" {JOBS} enqueued, {JOBS} started, {JOBS} finished, 0 dropped");
    let details = terminal.wait("the details of a kind", |screen| screen.contains(&ended));
    assert!(details.contains("Deferred tasks ") && details.contains("restore"), "{details}");
    terminal.press("Escape");
    terminal.press("q");
    terminal.wait("observer to end", |screen| screen.contains("ended with 0"));
}

#[real_test(programs(&["tmux"]))]
fn ctrl_c_restores_the_terminal_and_no_color_is_respected() {
    let server = Server::asyncio();
    let terminal = Terminal::start("ctrl_c", "NO_COLOR=1 LC_ALL=C", server.pid());
    while_late(&server, || {
        terminal.wait("the first screen to show the late loop", is_late);
        let styled = terminal.tmux(&["capture-pane", "-p", "-e"]);
        let codes = styled.split("\u{1b}[").skip(1).filter_map(|rest| Some(rest.split_once('m')?.0));
        let is_colour =
            |code: &str| code.parse::<u32>().is_ok_and(|n| matches!(n, 30..=38 | 40..=48 | 90..=107));
        assert!(!codes.flat_map(|code| code.split(';')).any(is_colour), "{styled:?}");
        assert!(terminal.screen().is_ascii(), "{}", terminal.screen());
        terminal.press("C-c");
        terminal.assert_restored();
    });
}

#[real_test(programs(&["tmux"]))]
fn sigterm_restores_the_terminal() {
    let server = Server::asyncio();
    let terminal = Terminal::start("a_signal", "LANG=C.UTF-8", server.pid());
    while_late(&server, || {
        terminal.wait("the first screen to show the late loop", is_late);
        let shell = terminal.tmux(&["display-message", "-p", "#{pane_pid}"]).trim().parse().unwrap();
        let observer = *crate::support::servers::children(shell).first().expect("observer is running");
        send(observer, Signal::SIGTERM);
        terminal.assert_restored();
    });
}

#[real_test(programs(&["tmux"]))]
fn dumb_terminal_gets_text() {
    let server = Server::asyncio();
    let terminal = Terminal::start("a_dumb_terminal", "TERM=dumb", server.pid());
    while_late(&server, || {
        terminal.wait("the announcement", |screen| screen.contains("report at Ctrl-C"));
        server.block("sleep", 150);
        terminal.press("C-c");
        terminal.wait("the report", |screen| screen.contains("ended with 0") || screen.contains("icanon"));
        let all = terminal.tmux(&["capture-pane", "-p", "-S", "-500"]);
        assert!(all.contains("observing python3") && all.contains("LATE: "), "{all}");
    });
}
