//! *reactor*: what a thread that waits for events does between two waits, how long, and whether it had a CPU; and how
//! late its waits return.

mod slice;
mod wait;
mod calls;
mod scheduler;
mod registers;
