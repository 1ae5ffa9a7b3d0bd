//! Tests that drive the real binary against real servers; they need root. One file a probe, and one each for the
//! command line and for what comes out. They run one at a time, because they share the machine's scheduler.

mod accept;
mod calls;
mod cli;
mod container;
mod drops;
mod exports;
mod flood;
mod lag;
mod listener;
mod live;
mod process;
mod reactor;
mod ring;
mod servers;
mod stacks;
mod stalls;
mod support;
