//! Creates many objects of one kind, for `cargo xtask bench`: observer's overhead grows with them, and nothing else
//! does.
//!
//! Arguments, and what is printed when the objects exist:
//!   threads N            N threads that wait for events, each with its own epoll set; prints N
//!   listeners N          N listening sockets and one thread that waits for all of them; prints N
//!   processes N          N processes, each with a listening socket and a thread that waits for it; prints N
//!   acceptor             one listening socket whose connections are accepted and reset at once; prints its port
//! Each wait lasts a second at most, and the program exits when its standard input is closed. There is also:
//!   connect PORT RATE SECONDS    connects at most RATE times a second; prints the number of connections

use std::{
    env,
    io::{Read as _, Write as _, pipe, stdin},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
        eventfd::EventFd,
        prctl::set_pdeathsig,
        signal::Signal,
    },
    unistd::{ForkResult, fork},
};
use socket2::SockRef;

/// Timeout of a wait, in milliseconds.
const WAIT_MS: u16 = 1000;

/// Maximum number of concurrent connections.
const CLIENTS: u32 = 8;

/// Stack size of a thread that only waits, in bytes.
const STACK: usize = 64 << 10;

type Result<T> = std::io::Result<T>;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |n: usize| arguments.get(n).and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    match arguments.first().map(String::as_str) {
        Some("threads") => threads(number(1))?,
        Some("listeners") => listeners(number(1))?,
        Some("processes") => processes(number(1))?,
        Some("acceptor") => acceptor()?,
        Some("connect") => {
            let port = u16::try_from(number(1)).unwrap_or(0);
            println!("{}", connect(port, number(2).max(1), Duration::from_secs(number(3).into())));
            return Ok(());
        }
        _ => panic!("arguments: threads|listeners|processes N, acceptor, or connect PORT RATE SECONDS"),
    }
    stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn threads(count: u32) -> Result<()> {
    // One event for all threads, so that the limit on descriptors permits twice as many.
    let event = EventFd::new()?;
    for _ in 0..count {
        let epoll = waiting_for([&event])?;
        thread::Builder::new().stack_size(STACK).spawn(move || wait_for_ever(&epoll, || ()))?;
    }
    println!("{count}");
    // The first thread waits as well, and owns the event.
    thread::spawn(move || event);
    Ok(())
}

fn listeners(count: u32) -> Result<()> {
    let all = (0..count).map(|_| listener()).collect::<Result<Vec<_>>>()?;
    let epoll = waiting_for(&all)?;
    thread::spawn(move || {
        let _kept = all;
        wait_for_ever(&epoll, || ());
    });
    println!("{count}");
    Ok(())
}

fn processes(count: u32) -> Result<()> {
    let (mut receiver, mut sender) = pipe()?;
    for _ in 0..count {
        // SAFETY: there is no other thread.
        if let ForkResult::Child = unsafe { fork() }? {
            set_pdeathsig(Signal::SIGKILL)?;
            let listener = listener()?;
            let epoll = waiting_for([&listener])?;
            sender.write_all(b".")?;
            wait_for_ever(&epoll, || ());
        }
    }
    receiver.read_exact(&mut vec![0; count as usize])?;
    println!("{count}");
    Ok(())
}

fn acceptor() -> Result<()> {
    let listener = listener()?;
    let port = listener.local_addr()?.port();
    let epoll = waiting_for([&listener])?;
    thread::spawn(move || {
        wait_for_ever(&epoll, || {
            while let Ok((connection, _)) = listener.accept() {
                // A reset leaves no socket in TIME_WAIT.
                let _ignored = SockRef::from(&connection).set_linger(Some(Duration::ZERO));
            }
        });
    });
    println!("{port}");
    Ok(())
}

fn listener() -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn waiting_for<F: AsFd>(all: impl IntoIterator<Item = F>) -> Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for one in all {
        epoll.add(one.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    }
    Ok(epoll)
}

fn wait_for_ever(epoll: &Epoll, mut handle: impl FnMut()) -> ! {
    let mut events = [EpollEvent::empty(); 16];
    loop {
        if epoll.wait(&mut events, WAIT_MS).is_ok_and(|count| count > 0) {
            handle();
        }
    }
}

/// Connects repeatedly, each time until the other end closes.
fn connect(port: u16, rate: u32, time: Duration) -> u64 {
    let clients = CLIENTS.min(rate);
    let pause = Duration::from_secs(1) * clients / rate;
    let begin = Instant::now();
    let all: Vec<_> = (0..clients)
        .map(|n| {
            thread::spawn(move || {
                let mut due = begin + pause * n / clients;
                let mut count = 0;
                while due < begin + time && begin.elapsed() < time {
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    due += pause;
                    if let Ok(mut stream) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                    {
                        count += 1;
                        // The other end resets the connection.
                        let _reset = stream.read(&mut [0]);
                    }
                }
                count
            })
        })
        .collect();
    all.into_iter().map(|client| client.join().unwrap_or(0)).sum()
}
