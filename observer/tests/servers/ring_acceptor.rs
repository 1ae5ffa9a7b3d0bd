//! Does the same as `acceptor.py`, but accepts with io_uring.
//!
//! Arguments: KIND (v4, unix), METHOD (single, multishot, direct, sqpoll, fixed), BACKLOG. Prints its port or path.
//! Each line of input is a command, answered by one line:
//!   connect N    connects N times to itself; prints how many
//!   arm          submits accepts for later connections: a multishot request, or one for each of 64 connections
//!   accept N     accepts N connections with the requests that are armed, or with new ones; prints how many
//!   reset        closes its own clients

use std::{
    env,
    io::{BufRead as _, stdin},
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use io_uring::{IoUring, cqueue, opcode, squeue::Entry, types};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

/// User data of all accept requests.
const ACCEPT: u64 = 7;
/// Number of requests that `arm` submits without multishot.
const ARMED: u32 = 64;
/// Size of the ring's table of files, for the listener or for accepted connections.
const SLOTS: usize = 128;

struct Acceptor {
    method: String,
    listener: Socket,
    address: SockAddr,
    ring: IoUring,
    is_armed: bool,
    /// Slot for the next connection that is accepted into the table.
    next_slot: u32,
    _directory: TempDir,
}

impl Acceptor {
    fn new(kind: &str, method: &str, backlog: i32) -> std::io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let (domain, address) = match kind {
            "unix" => (Domain::UNIX, SockAddr::unix(directory.path().join("socket"))?),
            _ => (Domain::IPV4, SockAddr::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))),
        };
        let listener = Socket::new(domain, Type::STREAM, None)?;
        listener.bind(&address)?;
        listener.listen(backlog)?;
        let mut builder = IoUring::builder();
        // Large enough for all results of a test: the kernel drops accepts whose result does not fit.
        builder.setup_cqsize(4096);
        if method == "sqpoll" {
            builder.setup_sqpoll(2000);
        }
        let ring = builder.build(256)?;
        if method == "fixed" {
            ring.submitter().register_files(&[listener.as_raw_fd()])?;
        }
        if method == "direct" {
            ring.submitter().register_files(&[-1; SLOTS])?;
        }
        let address = listener.local_addr()?;
        let method = method.into();
        Ok(Self { method, listener, address, ring, is_armed: false, next_slot: 0, _directory: directory })
    }

    fn request(&mut self) -> Entry {
        let fd: RawFd = self.listener.as_raw_fd();
        let none = std::ptr::null_mut();
        let request = match self.method.as_str() {
            "multishot" => opcode::AcceptMulti::new(types::Fd(fd)).build(),
            "fixed" => opcode::AcceptMulti::new(types::Fixed(0)).build(),
            "direct" => {
                let slot = types::DestinationSlot::try_from_slot_target(self.next_slot);
                self.next_slot += 1;
                let slot = slot.expect("a slot in the table");
                opcode::Accept::new(types::Fd(fd), none, none.cast()).file_index(Some(slot)).build()
            }
            _ => opcode::Accept::new(types::Fd(fd), none, none.cast()).build(),
        };
        request.user_data(ACCEPT)
    }

    fn is_multishot(&self) -> bool {
        matches!(self.method.as_str(), "multishot" | "fixed")
    }

    fn submit(&mut self) -> std::io::Result<()> {
        let request = self.request();
        // SAFETY: the request refers to a listener that lives as long as the ring, and to no memory.
        unsafe { self.ring.submission().push(&request).expect("room for a request") };
        self.ring.submit().map(drop)
    }

    fn arm(&mut self) -> std::io::Result<u32> {
        let requests = if self.is_multishot() { 1 } else { ARMED };
        for _ in 0..requests {
            self.submit()?;
        }
        self.is_armed = true;
        Ok(requests)
    }

    /// Accepted connections are closed at once, except for those in the ring's table.
    fn accept(&mut self, count: u32) -> std::io::Result<u32> {
        let was_armed = self.is_armed;
        if self.is_multishot() && !was_armed {
            self.arm()?;
        }
        for accepted in 0..count {
            if !self.is_armed {
                self.submit()?;
            }
            self.ring.submit_and_wait(1)?;
            let entry = self.ring.completion().next().expect("a completion was waited for");
            if entry.result() < 0 {
                eprintln!("accept: {}", std::io::Error::from_raw_os_error(-entry.result()));
                return Ok(accepted);
            }
            // The kernel ends a multishot request if its results do not fit.
            if self.is_multishot() && !cqueue::more(entry.flags()) {
                self.submit()?;
            }
            if self.method != "direct" {
                // SAFETY: the descriptor is new and has no other owner.
                drop(unsafe { OwnedFd::from_raw_fd(entry.result()) });
            }
        }
        if self.is_armed && !was_armed {
            self.disarm()?;
        }
        Ok(count)
    }

    /// Cancels a multishot request, so that later connections stay in the queue.
    fn disarm(&mut self) -> std::io::Result<()> {
        let cancel = opcode::AsyncCancel::new(ACCEPT).build();
        // SAFETY: the request refers to no memory.
        unsafe { self.ring.submission().push(&cancel).expect("room for a request") };
        // The results of the cancellation and of the cancelled request.
        self.ring.submit_and_wait(2)?;
        self.ring.completion().for_each(drop);
        self.is_armed = false;
        Ok(())
    }

    fn connect(&self, count: u32) -> std::io::Result<Vec<Socket>> {
        (0..count)
            .map(|_| {
                let client = Socket::new(self.address.domain(), Type::STREAM, None)?;
                client.connect(&self.address)?;
                Ok(client)
            })
            .collect()
    }
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let mut acceptor = Acceptor::new(&arguments[0], &arguments[1], arguments[2].parse().expect("a backlog"))?;
    match acceptor.address.as_socket() {
        Some(address) => println!("{}", address.port()),
        None => println!("{}", acceptor.address.as_pathname().expect("a path").display()),
    }
    let mut clients = Vec::new();
    for line in stdin().lock().lines() {
        let line = line?;
        let mut words = line.split(' ');
        let command = words.next();
        let count = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let answer = match command {
            Some("connect") => {
                let new = acceptor.connect(count)?;
                let connected = new.len();
                clients.extend(new);
                u32::try_from(connected).expect("at most `count`")
            }
            Some("arm") => acceptor.arm()?,
            Some("accept") => acceptor.accept(count)?,
            Some("reset") => {
                clients.clear();
                0
            }
            _ => panic!("no such command: {line}"),
        };
        println!("{answer}");
    }
    Ok(())
}
