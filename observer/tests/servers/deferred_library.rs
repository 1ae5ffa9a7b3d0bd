//! A program with a library of its own for work to be done later, which does with it what it is told.
//!
//! Commands on standard input, each answered by `ok`: `submit N` puts off N tasks; `execute N` does the N oldest, `drop N`
//! forgets them undone; `strange N` does N tasks that nobody has put off.

use std::{
    io::stdin,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

static SUBMITTED: AtomicU64 = AtomicU64::new(0);
static EXECUTED: AtomicU64 = AtomicU64::new(0);
static FREED: AtomicU64 = AtomicU64::new(0);

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_submit(task: u64) {
    SUBMITTED.fetch_add(task, Ordering::Relaxed);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_execute(task: u64) {
    EXECUTED.fetch_add(task, Ordering::Relaxed);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_free(task: u64) {
    FREED.fetch_add(task, Ordering::Relaxed);
}

/// The next so many tasks.
fn take(next: &mut u64, count: u64) -> Range<u64> {
    *next += count;
    *next - count..*next
}

fn main() {
    let (mut submitted, mut done, mut strange) = (1, 1, 1 << 32);
    println!("ready");
    for line in stdin().lines().map_while(Result::ok) {
        let (command, count) = line.split_once(' ').expect("a command and a number");
        let count = count.parse().expect("a number");
        match command {
            "submit" => take(&mut submitted, count).for_each(|task| task_submit(task)),
            "execute" => take(&mut done, count).for_each(|task| {
                task_execute(task);
                task_free(task);
            }),
            "drop" => take(&mut done, count).for_each(|task| task_free(task)),
            "strange" => take(&mut strange, count).for_each(|task| task_execute(task)),
            other => panic!("no such command: {other}"),
        }
        println!("ok");
    }
}
