//! A program with a library of its own for work to be done later, which does with it what it is told.
//!
//! Commands on standard input, each answered by `ok`: `submit N` puts off N tasks; `execute N` does the N oldest, `drop N`
//! forgets them undone; `strange N` does N tasks that nobody has put off.

use std::{hint::black_box, io::stdin, ops::Range};

/// Each of these does something else: of functions that are the same only one may be left.
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
            "submit" => take(&mut submitted, count).for_each(|task| _ = black_box(task_submit(task))),
            "execute" => take(&mut done, count).for_each(|task| {
                black_box(task_execute(task));
                black_box(task_free(task));
            }),
            "drop" => take(&mut done, count).for_each(|task| _ = black_box(task_free(task))),
            "strange" => take(&mut strange, count).for_each(|task| _ = black_box(task_execute(task))),
            other => panic!("no such command: {other}"),
        }
        println!("ok");
    }
}
