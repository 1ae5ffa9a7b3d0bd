//! A server with a custom library for deferred tasks, in the style of C: `context_snapshot` enqueues a task,
//! `context_restore` runs it. It logs which request each task came from. Prints its port.
//!
//! `deferred_library LOG`: the log file, with a line of JSON for each task. It has one thread, which waits with
//! `epoll_wait`. `GET /job/ID` enqueues three tasks, the last of which enqueues another one; they run when there is
//! nothing else to do. While it enqueues a task, it publishes a trace context as specified in OTEP 4947. The id of the
//! trace is the number of the job, and the id of the span is the depth of the task; the context of the last task is not
//! valid.

use std::{
    arch::{asm, global_asm},
    collections::{HashMap, VecDeque},
    env,
    ffi::c_void,
    fs::File,
    hint::black_box,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, RawFd},
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    time::{ClockId, clock_gettime},
};

/// A deferred task.
struct Task {
    request: String,
    depth: u32,
    enqueued: i64,
}

/// Number of tasks. Both functions have their own counter, because the linker would merge identical functions.
static ENQUEUED: AtomicU64 = AtomicU64::new(0);
static STARTED: AtomicU64 = AtomicU64::new(0);

/// Enqueues a task. The address is its key.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn context_snapshot(task: *mut c_void) -> *mut c_void {
    ENQUEUED.fetch_add(1, Ordering::Relaxed);
    black_box(task)
}

/// Runs a task.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn context_restore(task: *mut c_void) -> *mut c_void {
    STARTED.fetch_add(1, Ordering::Relaxed);
    black_box(task)
}

/// Record that a thread publishes.
#[repr(C)]
struct Record {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    valid: u8,
    reserved: u8,
    attributes: u16,
}

// Each thread's pointer to its record. `build.rs` makes the linker export it.
global_asm!(
    ".pushsection .tbss.otel_thread_ctx_v1,\"awT\",@nobits",
    ".balign 8",
    ".globl otel_thread_ctx_v1",
    ".type otel_thread_ctx_v1, @object",
    ".size otel_thread_ctx_v1, 8",
    "otel_thread_ctx_v1: .zero 8",
    ".popsection",
);

/// Makes the current thread publish a record, or none if it is null. The record must outlive its publication.
fn publish(record: *const Record) {
    // SAFETY: the variable belongs to this thread; nothing else writes it, and only observers read it.
    unsafe {
        asm!("mov fs:[otel_thread_ctx_v1@TPOFF], {}", in(reg) record, options(nostack));
    }
}

struct Server {
    log: File,
    queue: VecDeque<Box<Task>>,
}

impl Server {
    fn enqueue(&mut self, request: &str, depth: u32) {
        let mut task = Box::new(Task { request: request.to_owned(), depth, enqueued: now() });
        let job = request
            .split('?')
            .next()
            .unwrap_or_default()
            .parse::<u64>()
            .map_or([0; 16], |job| u128::from(job).to_be_bytes());
        let record = Record {
            trace_id: job,
            span_id: u64::from(depth).to_be_bytes(),
            valid: u8::from(depth < 3),
            reserved: 0,
            attributes: 0,
        };
        publish(&raw const record);
        context_snapshot((&raw mut *task).cast());
        publish(ptr::null());
        self.queue.push_back(task);
    }

    fn run(&mut self, task: &mut Task) -> io::Result<()> {
        context_restore((&raw mut *task).cast());
        let Task { request, depth, enqueued } = task;
        let start = now();
        writeln!(
            self.log,
            r#"{{"request": "{request}", "depth": {depth}, "enqueued": {enqueued}, "start": {start}}}"#
        )?;
        if *depth == 2 {
            self.enqueue(request, 3);
        }
        Ok(())
    }

    /// Responds to a request; returns whether the client is still connected.
    fn serve(&mut self, client: &mut TcpStream) -> io::Result<bool> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut bytes = [0; 512];
            match client.read(&mut bytes)? {
                0 => return Ok(false),
                n => head.extend_from_slice(&bytes[..n]),
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let path = head.split(' ').nth(1).unwrap_or_default();
        if let Some(request) = path.strip_prefix("/job/") {
            self.enqueue(request, 1);
            self.enqueue(request, 1);
            self.enqueue(request, 2);
        }
        client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        Ok(true)
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn watch(epoll: &Epoll, fd: RawFd, what: impl std::os::fd::AsFd) -> io::Result<()> {
    let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::try_from(fd).unwrap());
    Ok(epoll.add(what, event)?)
}

fn main() -> io::Result<()> {
    let log = env::args().nth(1).expect("usage: deferred_library LOG");
    let mut server =
        Server { log: File::options().create(true).append(true).open(log)?, queue: VecDeque::new() };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?.port());
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    watch(&epoll, listener.as_raw_fd(), &listener)?;
    let mut clients = HashMap::new();
    loop {
        let timeout = if server.queue.is_empty() { EpollTimeout::NONE } else { EpollTimeout::ZERO };
        let mut events = [EpollEvent::empty(); 64];
        let ready = epoll.wait(&mut events, timeout)?;
        for event in &events[..ready] {
            let fd = RawFd::try_from(event.data()).unwrap();
            if fd == listener.as_raw_fd() {
                let (client, _) = listener.accept()?;
                watch(&epoll, client.as_raw_fd(), &client)?;
                clients.insert(client.as_raw_fd(), client);
            } else if !server.serve(clients.get_mut(&fd).expect("a client"))? {
                clients.remove(&fd);
            }
        }
        // A few at a time, interleaved with requests.
        for _ in 0..4 {
            let Some(mut task) = server.queue.pop_front() else { break };
            server.run(&mut task)?;
        }
    }
}
