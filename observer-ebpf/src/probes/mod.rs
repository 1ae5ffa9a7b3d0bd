//! One file a probe: its maps and its programs, under the name it has on the user side too.

mod accept;
mod connect;
mod deferred;
mod gc;
mod listener;
mod origin;
mod process;
pub(crate) mod reactor;
mod ring;
