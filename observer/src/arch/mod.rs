//! What depends on the architecture of the machine: registers, system calls, and reading machine code. A port starts
//! here; the eBPF programs read registers in `observer-ebpf/src/probes/reactor/registers.rs`.

pub(crate) mod registers;
pub(crate) mod syscalls;
pub(crate) mod instructions;
pub(crate) mod accessor;
pub(crate) mod tls;
