//! The programs that run in the kernel. Each probe has a file in `probes/`, which holds entry points only; what they know is in
//! `state/`, and nothing but `kernel/` knows where the kernel keeps its fields. A module uses only those declared before it.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

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

// Some helpers are open only to programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
