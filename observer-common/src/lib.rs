//! Definitions shared by the eBPF programs and user space: the layout of every map key and value, the bucket bounds of
//! histograms, and the offsets injected before loading. A module uses only modules declared before it.
#![no_std]

mod shared;
pub mod block;
pub mod loss;
pub mod layout;
pub mod histogram;
pub mod id_filter;
pub mod process;
pub mod ring;
pub mod accept;
pub mod gc;
pub mod listener;
pub mod origin;
pub mod deferred;
pub mod waiter;
pub mod reactor;
