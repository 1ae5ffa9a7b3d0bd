//! The programs that run in the kernel. This file only lists them: each probe has its maps and programs in
//! `probes/`, and nothing but `kernel/` knows where the kernel keeps its fields.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod block;
mod context;
mod emit;
mod kernel;
mod pool;
mod presence;
mod probes;
mod work;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// Some helpers are open only to programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
