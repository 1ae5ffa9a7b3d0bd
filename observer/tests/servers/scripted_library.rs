//! A program with a custom library for deferred tasks, which is controlled by commands.
//!
//! Commands on standard input, each answered by `ok`: `submit N` enqueues N tasks; `execute N` runs the N oldest ones,
//! `drop N` discards them; `unmatched N` runs N tasks that were never enqueued.

use std::{hint::black_box, io::stdin, ops::Range};

/// Each function does something else, because the linker would merge identical functions.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_submit(task: u64) -> u64 {
    black_box(task) + 1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_execute(task: u64) -> u64 {
    black_box(task) + 2
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn task_free(task: u64) -> u64 {
    black_box(task) + 3
}

/// The keys of the next `count` tasks.
fn take(next: &mut u64, count: u64) -> Range<u64> {
    *next += count;
    *next - count..*next
}

fn main() {
    let (mut submitted, mut done, mut unmatched) = (1, 1, 1 << 32);
    println!("ready");
    for line in stdin().lines().map_while(Result::ok) {
        let (command, count) = line.split_once(' ').expect("a command and a number");
        let count = count.parse().expect("a number");
        match command {
            "submit" => take(&mut submitted, count).for_each(|task| _ = black_box(task_submit(task))),
            "execute" => take(&mut done, count).for_each(|task| {
                black_box(task_execute(task));
                black_box(task_free(task));
            }),
            "drop" => take(&mut done, count).for_each(|task| _ = black_box(task_free(task))),
            "unmatched" => take(&mut unmatched, count).for_each(|task| _ = black_box(task_execute(task))),
            other => panic!("no such command: {other}"),
        }
        println!("ok");
    }
}
