//! Does the same as `causes_server.py`, with the same paths and responses, as a native program on epoll; has no `gc`.

use std::{
    env,
    fs::{self, File},
    hint::black_box,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::FileExt as _,
    },
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    time::{ClockId, clock_gettime},
};

const SIZE: u64 = 16 << 20;
const CHUNK: usize = 64 << 10;

/// A query for the address of `test.invalid`.
const QUESTION: &[u8] = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x04test\x07invalid\0\0\x01\0\x01";

/// Resources that the causes use.
struct Resources {
    locked: PathBuf,
    lock: Arc<Mutex<()>>,
    resolver: UdpSocket,
    large: File,
}

impl Resources {
    fn new() -> io::Result<Self> {
        let path = |name| env::temp_dir().join(name);
        File::create(path("locked"))?;
        let mut large = File::create_new(path("large"))?;
        let mut content = vec![0; usize::try_from(SIZE).expect("fits into memory")];
        fastrand::fill(&mut content);
        large.write_all(&content)?;
        large.sync_all()?;
        Ok(Self {
            locked: path("locked"),
            lock: Arc::default(),
            resolver: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?,
            large: File::open(path("large"))?,
        })
    }

    /// Makes another thread take what a cause will wait for; returns once it has.
    fn prepare(&self, cause: &str, hold: Duration) {
        let (held, is_held) = mpsc::channel();
        match cause {
            "flock" => {
                let path = self.locked.clone();
                thread::spawn(move || {
                    let file = File::open(path).expect("it was created");
                    file.lock().expect("the lock is free");
                    held.send(()).expect("the receiver is waiting");
                    thread::sleep(hold);
                });
            }
            "futex" => {
                let lock = self.lock.clone();
                thread::spawn(move || {
                    let _guard = lock.lock().expect("no thread panics");
                    held.send(()).expect("the receiver is waiting");
                    thread::sleep(hold);
                });
            }
            _ => return,
        }
        is_held.recv().expect("the thread reports that it holds the lock");
    }
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every kernel has it").into()
}

/// Time that the main thread was in the run queue.
fn delay() -> io::Result<Duration> {
    let schedstat = fs::read_to_string("/proc/self/schedstat")?;
    let delay = schedstat.split(' ').nth(1).and_then(|ns| ns.parse().ok());
    Ok(Duration::from_nanos(delay.ok_or_else(|| io::Error::other("no delay in schedstat"))?))
}

// Each of these functions does something after its block. Otherwise the compiler would turn the call into a jump, and
// the function would have no stack frame.

#[inline(never)]
fn cause_spin(duration: Duration) {
    let end = thread_time() + duration;
    let mut sum = 0_u64;
    while thread_time() < end {
        sum = (0..10_000).fold(sum, |sum, number| black_box(sum + number));
    }
    black_box(sum);
}

#[inline(never)]
fn cause_hog(duration: Duration) {
    cause_spin(duration);
    black_box(duration);
}

#[inline(never)]
fn cause_sleep(duration: Duration) {
    thread::sleep(duration);
    black_box(duration);
}

#[inline(never)]
fn cause_flock(resources: &Resources) -> io::Result<()> {
    let file = File::open(&resources.locked)?;
    file.lock()?;
    file.unlock()
}

#[inline(never)]
fn cause_futex(resources: &Resources) {
    drop(black_box(resources.lock.lock().expect("no thread panics")));
}

#[inline(never)]
fn cause_file(resources: &Resources, duration: Duration) -> io::Result<()> {
    let end = Instant::now() + duration;
    let mut chunk = vec![0; CHUNK];
    while Instant::now() < end {
        posix_fadvise(&resources.large, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        for start in (0..SIZE).step_by(CHUNK) {
            resources.large.read_exact_at(&mut chunk, start)?;
        }
    }
    black_box(chunk);
    Ok(())
}

/// Like the C library's resolver, but without a retry.
#[inline(never)]
fn cause_dns(resources: &Resources, duration: Duration) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(resources.resolver.local_addr()?)?;
    socket.send(QUESTION)?;
    let timeout = PollTimeout::try_from(duration).expect("a few milliseconds");
    let answered = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)?;
    assert_eq!(answered, 0, "the resolver answers");
    Ok(())
}

/// Time that the block took, was on a CPU and was in the run queue.
#[inline(never)]
fn block(resources: &Resources, cause: &str, duration: Duration) -> io::Result<[Duration; 3]> {
    resources.prepare(cause, duration);
    let (wall, cpu, before) = (Instant::now(), thread_time(), delay()?);
    match cause {
        "spin" => cause_spin(duration),
        "hog" => cause_hog(duration),
        "sleep" => cause_sleep(duration),
        "flock" => cause_flock(resources)?,
        "futex" => cause_futex(resources),
        "file" => cause_file(resources, duration)?,
        "dns" => cause_dns(resources, duration)?,
        _ => {}
    }
    Ok([wall.elapsed(), thread_time() - cpu, delay()? - before])
}

#[inline(never)]
fn serve(resources: &Resources, client: TcpStream) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if client.read_line(&mut request)? == 0 {
            return Ok(());
        }
    }
    let mut words = request.split(['/', ' ']).skip(2);
    let (cause, milliseconds) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let duration = Duration::from_millis(milliseconds.parse().map_err(io::Error::other)?);
    let [wall, cpu, delay] = block(resources, cause, duration)?.map(|time| time.as_secs_f64());
    let body = format!("{{\"wall\": {wall}, \"cpu\": {cpu}, \"delay\": {delay}}}");
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}", body.len());
    client.get_mut().write_all(format!("{head}\r\n\r\n{body}").as_bytes())
}

fn main() -> io::Result<()> {
    let resources = Resources::new()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let event = EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd().cast_unsigned().into());
    epoll.add(&listener, event)?;
    println!("{}", listener.local_addr()?.port());
    loop {
        epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE)?;
        serve(&resources, listener.accept()?.0)?;
    }
}
