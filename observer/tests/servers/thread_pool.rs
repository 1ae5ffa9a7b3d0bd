//! Threads that share one epoll set, and work on jobs that they get through it. Keeps its own account of the time in which
//! none of them waited.
//!
//! The argument is the number of threads. Each line of input is `COUNT MILLISECONDS`: so many jobs at once, each of which
//! sleeps so long. When all are done and all threads wait again, it responds with the nanoseconds so far in which no thread
//! waited, and the number of such intervals of 50 ms or more.

use std::{
    collections::VecDeque,
    env,
    io::{self, BufRead as _},
    process,
    sync::{Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};

const LONG: Duration = Duration::from_millis(50);

struct Pool {
    set: Epoll,
    jobs: EventFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Duration>,
    /// Jobs that are not done yet.
    open: usize,
    /// Threads that wait, or are about to.
    inside: usize,
    /// Since when none does.
    left: Option<Instant>,
    unattended: Duration,
    long: u32,
}

impl Pool {
    fn work(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty()];
        loop {
            self.enter();
            self.set.wait(&mut events, EpollTimeout::NONE)?;
            self.leave();
            // Another thread may have been faster.
            if self.jobs.read().is_ok() {
                let job = self.state.lock().unwrap().queue.pop_front().unwrap();
                thread::sleep(job);
                self.state.lock().unwrap().open -= 1;
            }
        }
    }

    fn enter(&self) {
        let mut state = self.state.lock().unwrap();
        state.inside += 1;
        if let Some(left) = state.left.take() {
            let length = left.elapsed();
            state.unattended += length;
            state.long += u32::from(length >= LONG);
        }
        self.changed.notify_all();
    }

    fn leave(&self) {
        let mut state = self.state.lock().unwrap();
        state.inside -= 1;
        if state.inside == 0 {
            state.left = Some(Instant::now());
        }
    }

    fn run(&self, threads: usize, count: usize, length: Duration) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.queue.extend(std::iter::repeat_n(length, count));
        state.open += count;
        drop(state);
        self.jobs.write(count.try_into().unwrap())?;
        let state = self.state.lock().unwrap();
        let is_busy = |state: &mut State| state.open > 0 || state.inside < threads;
        let state = self.changed.wait_while(state, is_busy).unwrap();
        println!("{} {}", state.unattended.as_nanos(), state.long);
        Ok(())
    }
}

fn main() -> io::Result<()> {
    let threads: usize = env::args().nth(1).unwrap().parse().unwrap();
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let jobs = EventFd::from_flags(EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK)?;
    set.add(&jobs, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let pool = Pool { set, jobs, state: Mutex::default(), changed: Condvar::new() };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| pool.work().unwrap());
        }
        pool.run(threads, 0, Duration::ZERO)?;
        for line in io::stdin().lock().lines() {
            let line = line?;
            let (count, length) = line.split_once(' ').unwrap();
            pool.run(threads, count.parse().unwrap(), Duration::from_millis(length.parse().unwrap()))?;
        }
        process::exit(0)
    })
}
