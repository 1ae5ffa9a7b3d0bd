//! One file a probe: its maps and its programs, under the name it has on the user side too.

mod accept;
mod connect;
mod gc;
mod listener;
mod process;
mod reactor;
mod ring;
