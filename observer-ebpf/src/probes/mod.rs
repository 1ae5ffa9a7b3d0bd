//! One file a probe: its programs, under the name it has on the user side too.

mod process;
mod listener;
mod accept;
mod ring;
mod connect;
mod gc;
mod reactor;
mod origin;
mod deferred;
