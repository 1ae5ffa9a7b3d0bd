//! *reactor*: what the thread of an event loop does between two waits, for how long, and whether it has a CPU; and how
//! late its waits return.

mod slice;
mod wait;
mod calls;
mod scheduler;
mod registers;
