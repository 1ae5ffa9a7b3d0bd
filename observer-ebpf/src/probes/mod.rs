//! One file for each probe: its programs, under the same name as in user space.

mod process;
mod listener;
mod accept;
mod ring;
mod connect;
mod gc;
mod reactor;
mod origin;
mod deferred;
