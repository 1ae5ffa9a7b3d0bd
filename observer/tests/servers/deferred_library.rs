//! A server with a library of its own for deferred work, in C's manner: `context_snapshot` keeps a task in a queue,
//! `context_restore` goes on with it. It writes down itself which request each task came from. Prints its port.
//!
//! `deferred_library TRUTH`: the file for that, a JSON line a task. One thread, which waits with `epoll_wait`. `GET /job/ID`
//! puts off three tasks, the last of which puts off another one; they run when nothing else is to do. Where it puts one off
//! it publishes a trace context, as OTEP 4947 has it, for a trace with the number of the job and a span with the task's
//! depth; that of the last task is not valid.

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

/// A piece of deferred work.
struct Task {
    request: String,
    depth: u32,
    enqueued: i64,
}

/// How many tasks there were: what tells the two functions apart, which would be one if they did the same.
static PUT_OFF: AtomicU64 = AtomicU64::new(0);
static GONE_ON: AtomicU64 = AtomicU64::new(0);

/// Keeps a task for later. What it is known by is its address.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn context_snapshot(task: *mut c_void) -> *mut c_void {
    PUT_OFF.fetch_add(1, Ordering::Relaxed);
    black_box(task)
}

/// Goes on with a task.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn context_restore(task: *mut c_void) -> *mut c_void {
    GONE_ON.fetch_add(1, Ordering::Relaxed);
    black_box(task)
}

/// The record that a thread publishes.
#[repr(C)]
struct Record {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    valid: u8,
    reserved: u8,
    attributes: u16,
}

// Each thread's pointer to its record, which `build.rs` has the linker export.
global_asm!(
    ".pushsection .tbss.otel_thread_ctx_v1,\"awT\",@nobits",
    ".balign 8",
    ".globl otel_thread_ctx_v1",
    ".type otel_thread_ctx_v1, @object",
    ".size otel_thread_ctx_v1, 8",
    "otel_thread_ctx_v1: .zero 8",
    ".popsection",
);

/// Has the current thread publish a record, or none. What it points to has to stay as long as it does.
fn publish(record: *const Record) {
    // SAFETY: a variable of this thread, that nobody else writes and only observers read.
    unsafe {
        asm!("mov fs:[otel_thread_ctx_v1@TPOFF], {}", in(reg) record, options(nostack));
    }
}

struct Server {
    truth: File,
    queue: VecDeque<Box<Task>>,
}

impl Server {
    fn put_off(&mut self, request: &str, depth: u32) {
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
            self.truth,
            r#"{{"request": "{request}", "depth": {depth}, "enqueued": {enqueued}, "start": {start}}}"#
        )?;
        if *depth == 2 {
            self.put_off(request, 3);
        }
        Ok(())
    }

    /// Answers what has come; whether the client is still there.
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
            self.put_off(request, 1);
            self.put_off(request, 1);
            self.put_off(request, 2);
        }
        client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        Ok(true)
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn watch(epoll: &Epoll, fd: RawFd, what: impl std::os::fd::AsFd) -> io::Result<()> {
    let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::try_from(fd).unwrap());
    Ok(epoll.add(what, event)?)
}

fn main() -> io::Result<()> {
    let truth = env::args().nth(1).expect("usage: deferred_library TRUTH");
    let mut server =
        Server { truth: File::options().create(true).append(true).open(truth)?, queue: VecDeque::new() };
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
        // A few at a time, between the others.
        for _ in 0..4 {
            let Some(mut task) = server.queue.pop_front() else { break };
            server.run(&mut task)?;
        }
    }
}
