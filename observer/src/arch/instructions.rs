//! Chooses the instructions of a function on which uprobes are placed: near its beginning, near each return, or in the
//! function that it tail-calls. For most instructions the kernel single-steps the original, which takes two traps and 5
//! us or more. Instructions that it emulates take one trap of less than 1 us, so these are preferred.

use std::collections::BTreeSet;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use observer_common::deferred::register;

use crate::binary::elf::Elf;

/// Maximum number of instructions of a function that are decoded.
const INSTRUCTIONS_MAX: usize = 4096;

/// Maximum distance of a probe from the beginning or a return of its function, in instructions.
const DISTANCE_MAX: usize = 16;

/// Registers, indexed by their numbers in `observer_common::deferred`.
const REGISTERS: [Register; 16] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
    Register::RAX,
    Register::RBX,
    Register::RBP,
    Register::RSP,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// Callee-saved registers: a call preserves them.
const CALLEE_SAVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// An instruction for a probe near a return of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct End {
    /// Address of the instruction.
    pub(crate) address: u64,
    /// Number of the register that holds the function's result there.
    pub(crate) result: u64,
}

/// Address of the instruction for a probe at the beginning of a function: the first emulated instruction, if it is
/// executed exactly once per call and no register of `read` is overwritten before it; else the first instruction that
/// can be probed. `read` are the registers that the probe reads, by their numbers in `observer_common::deferred`.
pub(crate) fn entry(elf: &Elf, function: u64, read: &[u64]) -> Option<u64> {
    let (first, emulated) = scan_entry(decoder(elf, function)?, read);
    let is_executed_once = |found: &Instruction| {
        let mut is_in_loop = false;
        let walked = walk(elf, function, |instruction, _, _| {
            let target = instruction.near_branch_target();
            is_in_loop |= (function.saturating_add(1)..=found.ip()).contains(&target);
        });
        walked.is_ok() && !is_in_loop
    };
    // A push of a register is taken to belong to the prologue, which is not in a loop.
    let emulated = emulated.filter(|found| found.mnemonic() == Mnemonic::Push || is_executed_once(found));
    emulated.map(|found| found.ip()).or(first)
}

/// Address of the first instruction that can be probed, and the first emulated instruction before which no register of
/// `read` is overwritten.
fn scan_entry(
    code: impl IntoIterator<Item = Instruction>,
    read: &[u64],
) -> (Option<u64>, Option<Instruction>) {
    let mut info = InstructionInfoFactory::new();
    let (mut first, mut is_begun) = (None, false);
    let read = (0..).zip(REGISTERS).filter(|(number, _)| read.contains(number));
    let read: Vec<_> = read.map(|(_, register)| register).collect();
    for instruction in code.into_iter().take(DISTANCE_MAX) {
        if instruction.code() == Code::Endbr64 {
            continue;
        }
        if !is_refused(&instruction) && (!is_begun || !becomes_call(&instruction)) {
            first = first.or(Some(instruction.ip()));
        }
        is_begun = true;
        if is_emulated(&instruction) {
            return (first, Some(instruction));
        }
        if instruction.flow_control() != FlowControl::Next
            || read.iter().any(|&register| writes(&mut info, &instruction, register))
        {
            break;
        }
    }
    (first, None)
}

/// Instructions for probes at the returns of a function and of the functions that it tail-calls, so that exactly one of
/// them is executed each time the function returns. With `needs_result`, the function's result is in a register there.
/// Fails if the returns cannot be determined.
///
/// In a part of a function that the compiler has moved away because it is rarely executed (`.text.unlikely`), only the
/// return instructions themselves are used.
pub(crate) fn ends(elf: &Elf, function: u64, needs_result: bool) -> Result<Vec<End>, String> {
    let mut ends = BTreeSet::new();
    for (start, end) in returns(elf, function)? {
        let code: Vec<_> = decoder(elf, start)
            .ok_or("its code is not in the file")?
            .into_iter()
            .take_while(|instruction| instruction.ip() <= end)
            .collect();
        // Data between instructions may be decoded as an instruction that runs past the return.
        let is_in_step = code.last().is_some_and(|last| last.ip() == end);
        let emulated = if is_in_step { emulated_end(&code, needs_result) } else { None };
        ends.insert(emulated.unwrap_or(End { address: end, result: register::RESULT }));
    }
    Ok(ends.into_iter().collect())
}

/// Address that a function jumps to after it has only arranged arguments; `None` if it does anything else.
pub(crate) fn jump_target(elf: &Elf, function: u64) -> Option<u64> {
    for instruction in decoder(elf, function)?.into_iter().take(DISTANCE_MAX) {
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch => return Some(instruction.near_branch_target()),
            _ => return None,
        }
    }
    None
}

/// Addresses of all instructions that return from a function, as pairs (start, return): decoding from the start reaches
/// the return. The start is the beginning of the function. If the compiler has moved the part with the return in front of
/// the function, it is the beginning of the run of consecutive instructions that contains the return.
fn returns(elf: &Elf, function: u64) -> Result<BTreeSet<(u64, u64)>, String> {
    let mut returns = BTreeSet::new();
    walk(elf, function, |instruction, home, start| {
        if instruction.flow_control() == FlowControl::Return {
            let home = if home <= instruction.ip() { home } else { start };
            returns.insert((home, instruction.ip()));
        }
    })?;
    if returns.is_empty() { Err("it has no return instruction".into()) } else { Ok(returns) }
}

/// Visits all reachable instructions of a function and of those that it tail-calls. `visit` gets the instruction, the
/// beginning of its function, and the beginning of the run of consecutive instructions through which it was reached.
fn walk(elf: &Elf, function: u64, mut visit: impl FnMut(&Instruction, u64, u64)) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    let mut to_do = vec![(function, function)];
    while let Some((home, start)) = to_do.pop() {
        let decoder = decoder(elf, start).ok_or("its code is not in the file")?;
        for instruction in decoder {
            if instruction.is_invalid() || seen.len() >= INSTRUCTIONS_MAX {
                return Err("its code cannot be decoded or is too long".into());
            }
            if !seen.insert(instruction.ip()) {
                break;
            }
            visit(&instruction, home, start);
            let target = instruction.near_branch_target();
            // A target shortly behind the function's beginning is in the same function.
            let home_of = |target: u64| {
                let is_near = (home..home.saturating_add(INSTRUCTIONS_MAX as u64)).contains(&target);
                if is_near { home } else { target }
            };
            match instruction.flow_control() {
                FlowControl::UnconditionalBranch => {
                    to_do.push((home_of(target), target));
                    break;
                }
                FlowControl::ConditionalBranch => to_do.push((home_of(target), target)),
                FlowControl::IndirectBranch => return Err("it has an indirect jump".into()),
                FlowControl::Return | FlowControl::Exception => break,
                _ => {}
            }
        }
    }
    Ok(())
}

/// The last emulated instruction before a return, if every path to the return executes it. `code` is all code from the
/// beginning of the function to the return.
fn emulated_end(code: &[Instruction], needs_result: bool) -> Option<End> {
    let mut info = InstructionInfoFactory::new();
    let (last, before) = code.split_last()?;
    let mut result = Register::RAX;
    for (index, instruction) in before.iter().enumerate().rev().take(DISTANCE_MAX) {
        let is_call = instruction.flow_control() == FlowControl::Call;
        let skips = |jump: &Instruction| {
            let target = jump.near_branch_target();
            instruction.ip() < target && target <= last.ip()
        };
        let is_jump = |other: &Instruction| {
            matches!(other.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
        };
        let is_skipped = before[..index].iter().any(|other| is_jump(other) && skips(other));
        if is_emulated(instruction) && !is_call && !is_skipped {
            let number = REGISTERS.iter().position(|&register| register == result)?;
            return Some(End { address: instruction.ip(), result: u64::try_from(number).ok()? });
        }
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch => continue,
            FlowControl::Call if needs_result && CALLEE_SAVED.contains(&result) => continue,
            _ => return None,
        }
        let is_copy = instruction.code() == Code::Mov_r64_rm64
            && instruction.op0_register() == result
            && instruction.op1_kind() == OpKind::Register;
        let is_copy = is_copy
            || instruction.code() == Code::Mov_rm64_r64
                && instruction.op0_kind() == OpKind::Register
                && instruction.op0_register() == result;
        if is_copy {
            result = instruction.op1_register();
        } else if needs_result && writes(&mut info, instruction, result) {
            return None;
        }
    }
    None
}

/// Whether the kernel emulates an instruction instead of single-stepping it.
fn is_emulated(instruction: &Instruction) -> bool {
    let is_push = instruction.mnemonic() == Mnemonic::Push && instruction.op0_kind() == OpKind::Register;
    let is_jump = matches!(
        instruction.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
    );
    is_push || instruction.code() == Code::Nopd || is_jump && instruction.op0_kind() == OpKind::NearBranch64
}

/// Whether the kernel refuses a uprobe on an instruction because of its prefix.
fn is_refused(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.segment_prefix() != Register::None
}

/// Whether Linux 6.18 replaces the breakpoint on this instruction with a call. Until a later fix the call overwrites
/// the red zone, the 128 bytes below the stack pointer in which a leaf function may keep variables. At the beginning of
/// a function the red zone is unused.
fn becomes_call(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Nop && instruction.len() == 5
}

/// Whether a probe at an address in the middle of a function could overwrite its red zone; see [`becomes_call`].
pub(crate) fn is_unsafe_place(elf: &Elf, address: u64) -> bool {
    let instruction = decoder(elf, address).and_then(|code| code.into_iter().next());
    instruction.is_none_or(|instruction| becomes_call(&instruction))
}

fn writes(info: &mut InstructionInfoFactory, instruction: &Instruction, register: Register) -> bool {
    info.info(instruction).used_registers().iter().any(|used| {
        let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        writes && used.register().full_register() == register
    })
}

/// Decodes the instructions from an address on.
fn decoder(elf: &Elf, address: u64) -> Option<impl IntoIterator<Item = Instruction>> {
    let code = elf.code_from(address)?;
    // More than any function whose instructions are decoded.
    let code = &code[..code.len().min(1 << 20)];
    Some(Decoder::with_ip(64, code, address, DecoderOptions::NONE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(code: &[u8], address: u64) -> Vec<Instruction> {
        Decoder::with_ip(64, code, address, DecoderOptions::NONE).into_iter().collect()
    }

    /// The end of `context_new_from_vars` of CPython 3.11 as Debian builds it.
    const NEW_CONTEXT: &[u8] = &[
        0x55, // push %rbp
        0x48, 0x89, 0xfd, // mov %rdi,%rbp
        0x53, 0x51, // push %rbx; push %rcx
        0xe8, 0, 0, 0, 0, // call
        0x48, 0x89, 0xc3, // mov %rax,%rbx
        0x48, 0x85, 0xc0, // test %rax,%rax
        0x74, 0x11, // je 0x24
        0x48, 0x83, 0x45, 0x00, 0x01, // addq $1,0(%rbp)
        0x48, 0x89, 0xc7, // mov %rax,%rdi
        0x48, 0x89, 0x68, 0x18, // mov %rbp,0x18(%rax)
        0xe8, 0, 0, 0, 0, // call
        0x48, 0x89, 0xd8, // 0x24: mov %rbx,%rax
        0x5a, 0x5b, 0x5d, 0xc3, // pop, pop, pop, ret
    ];

    /// `iodine_defer_performe_once` and `iodine_register_background_task` as they are built for x86-64.
    const PERFORM: &[u8] = &[
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x48, 0x8b, 0x05, 0, 0, 0, 0, // mov 0(%rip),%rax
        0x48, 0x8b, 0x35, 0, 0, 0, 0,    // mov 0(%rip),%rsi
        0x53, // push %rbx
        0x48, 0x89, 0xfb, // mov %rdi,%rbx
    ];
    const REGISTER: &[u8] = &[
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x48, 0x83, 0xec, 0x08, // sub $8,%rsp
        0x31, 0xc0, // xor %eax,%eax
        0xe8, 0, 0, 0, 0, // call
    ];

    #[test]
    fn only_registers_that_are_read_must_be_intact_at_the_probe() {
        let emulated = |code: &[u8], read: &[u64]| {
            let (first, emulated) = scan_entry(decoded(code, 0x1000), read);
            assert_eq!(first, Some(0x1004));
            emulated.map(|found| found.ip())
        };
        assert_eq!(emulated(PERFORM, &[0]), Some(0x1012));
        assert_eq!(emulated(PERFORM, &[0, 1]), None);
        assert_eq!(emulated(REGISTER, &[]), Some(0x100a));
        let rsp = register::OTHERS + 2;
        assert_eq!(emulated(REGISTER, &[rsp]), None);
    }

    #[test]
    fn a_five_byte_nop_is_used_only_at_the_beginning_of_a_function() {
        const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
        let endbr64 = [0xf3, 0x0f, 0x1e, 0xfa];
        // mov %fs:0x28,%rax, which the kernel refuses to probe; mov %rdi,%rax
        let (refused, other) = ([0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0], [0x48, 0x89, 0xf8]);
        let first = |code: &[&[u8]]| scan_entry(decoded(&code.concat(), 0x1000), &[]);
        assert_eq!(first(&[&endbr64, &NOP, &other]), (Some(0x1004), None));
        assert_eq!(first(&[&refused, &NOP, &other]), (Some(0x100e), None));
        // Near the end of a function: mov, the NOP, ret.
        let code = decoded(&[&other[..], &NOP, &[0xc3]].concat(), 0x1000);
        assert_eq!(emulated_end(&code, false), None);
    }

    #[test]
    fn a_result_is_followed_back_to_an_emulated_instruction() {
        let code = decoded(NEW_CONTEXT, 0x1000);
        let rbx = register::OTHERS;
        assert_eq!(emulated_end(&code, true), Some(End { address: 0x1011, result: rbx }));
        // Without a result that is already computed, nothing shows that the work is done before the last call.
        assert_eq!(emulated_end(&code, false), None);
    }

    #[test]
    fn an_instruction_that_can_be_skipped_is_not_used() {
        // je over the nop; nop; ret.
        let code = decoded(&[0x74, 0x01, 0x90, 0xc3], 0x1000);
        assert_eq!(emulated_end(&code, false).map(|end| end.address), Some(0x1000));
        let straight = decoded(&[0x90, 0x58, 0xc3], 0x1000);
        assert_eq!(emulated_end(&straight, false).map(|end| end.address), Some(0x1000));
        // pop %rax overwrites the result.
        assert_eq!(emulated_end(&straight, true), None);
    }
}
