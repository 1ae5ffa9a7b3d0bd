//! The programs that run in the kernel. `probes/` has one file for each probe, with entry points only. Maps and the
//! code that accesses them are in `state/`, and only `kernel/` accesses fields of kernel structures; `emit.rs` writes
//! what user space reads, `trace_context.rs` reads what a process publishes, and `words.rs` copies values. A module uses
//! only modules declared before it.
//!
//! The verifier analyses a function named `global_…` once for each program, and any other once for each state in which
//! it is called.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod words;
mod kernel;
mod emit;
mod trace_context;
mod state;
mod probes;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// Some helpers are available only to programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
