//! Where in a function a probe may stand, read from its instructions: near its beginning, near each of its ends, or in
//! the function that it only jumps to. The kernel steps over most instructions by two traps, which take 5 us and more;
//! those it need not step over, because it knows what they do, take one of less than 1 us. So such are looked for.

use std::collections::BTreeSet;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use observer_common::deferred::register;

use super::elf::Elf;

/// Most instructions of a function that are looked at.
const MOST: usize = 4096;

/// How far from the beginning or an end of a function a probe for it may stand, in instructions.
const NEAR: usize = 16;

/// Registers by their numbers in `observer_common::deferred`.
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

/// Registers that hold after a call what they held before.
const KEPT: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// A place for a probe near an end of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct End {
    /// Address of the instruction.
    pub(crate) address: u64,
    /// Number of the register that holds there what the function will return.
    pub(crate) result: u64,
}

/// The place for a probe at the beginning of a function: the first instruction that the kernel need not step over, if all
/// come past it once and no register that is read there is overwritten before it; else the first one that a probe can
/// stand at. Registers have their numbers in `observer_common::deferred`.
pub(crate) fn entry(elf: &Elf, function: u64, read: &[u64]) -> Option<u64> {
    let (first, cheap) = beginning(decoder(elf, function)?, read);
    let is_passed_once = |place: &Instruction| {
        let mut is_in_loop = false;
        let walked = walk(elf, function, |instruction, _, _| {
            let target = instruction.near_branch_target();
            is_in_loop |= (function.saturating_add(1)..=place.ip()).contains(&target);
        });
        walked.is_ok() && !is_in_loop
    };
    // In a loop nothing is pushed.
    let cheap = cheap.filter(|place| place.mnemonic() == Mnemonic::Push || is_passed_once(place));
    cheap.map(|place| place.ip()).or(first)
}

/// The first instruction that a probe can stand at, and the first cheap one where what is read is as it was.
fn beginning(
    code: impl IntoIterator<Item = Instruction>,
    read: &[u64],
) -> (Option<u64>, Option<Instruction>) {
    let mut info = InstructionInfoFactory::new();
    let (mut first, mut is_begun) = (None, false);
    let read = (0..).zip(REGISTERS).filter(|(number, _)| read.contains(number));
    let read: Vec<_> = read.map(|(_, register)| register).collect();
    for instruction in code.into_iter().take(NEAR) {
        if instruction.code() == Code::Endbr64 {
            continue;
        }
        if !is_refused(&instruction) && (!is_begun || !becomes_call(&instruction)) {
            first = first.or(Some(instruction.ip()));
        }
        is_begun = true;
        if is_cheap(&instruction) {
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

/// Places for probes where a function ends, also those of functions that it ends by jumping to, so that one is come to
/// each time it returns. `needs_result` tells whether its answer has to be in a register there. An error says why they
/// are not known.
///
/// Of the part of a function that its compiler has put elsewhere because it is hardly ever run, only the returns
/// themselves are taken.
pub(crate) fn ends(elf: &Elf, function: u64, needs_result: bool) -> Result<Vec<End>, String> {
    let mut ends = BTreeSet::new();
    for (start, end) in returns(elf, function)? {
        let code: Vec<_> = decoder(elf, start)
            .ok_or("its code is not in its file")?
            .into_iter()
            .take_while(|instruction| instruction.ip() <= end)
            .collect();
        // Where data stands between the instructions, they are not read in step.
        let is_in_step = code.last().is_some_and(|last| last.ip() == end);
        let cheap = if is_in_step { cheap_end(&code, needs_result) } else { None };
        ends.insert(cheap.unwrap_or(End { address: end, result: register::RESULT }));
    }
    Ok(ends.into_iter().collect())
}

/// The function that one only jumps to, having arranged its arguments.
pub(crate) fn jump_target(elf: &Elf, function: u64) -> Option<u64> {
    for instruction in decoder(elf, function)?.into_iter().take(NEAR) {
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch => return Some(instruction.near_branch_target()),
            _ => return None,
        }
    }
    None
}

/// All instructions that return from a function, each with where the straight code before it begins that was come to
/// from the function's beginning.
fn returns(elf: &Elf, function: u64) -> Result<BTreeSet<(u64, u64)>, String> {
    let mut returns = BTreeSet::new();
    walk(elf, function, |instruction, home, start| {
        if instruction.flow_control() == FlowControl::Return {
            let home = if home <= instruction.ip() { home } else { start };
            returns.insert((home, instruction.ip()));
        }
    })?;
    if returns.is_empty() { Err("it never returns".into()) } else { Ok(returns) }
}

/// Visits all instructions of a function and of those that it ends by jumping to, each with the beginning of its function
/// and of the straight code that it is in.
fn walk(elf: &Elf, function: u64, mut visit: impl FnMut(&Instruction, u64, u64)) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    let mut to_do = vec![(function, function)];
    while let Some((home, start)) = to_do.pop() {
        let decoder = decoder(elf, start).ok_or("its code is not in its file")?;
        for instruction in decoder {
            if instruction.is_invalid() || seen.len() >= MOST {
                return Err("its code is not understood".into());
            }
            if !seen.insert(instruction.ip()) {
                break;
            }
            visit(&instruction, home, start);
            let target = instruction.near_branch_target();
            // Behind it and not far away it is the same function.
            let home_of = |target: u64| {
                if (home..home.saturating_add(MOST as u64)).contains(&target) { home } else { target }
            };
            match instruction.flow_control() {
                FlowControl::UnconditionalBranch => {
                    to_do.push((home_of(target), target));
                    break;
                }
                FlowControl::ConditionalBranch => to_do.push((home_of(target), target)),
                FlowControl::IndirectBranch => return Err("it jumps to places that are computed".into()),
                FlowControl::Return | FlowControl::Exception => break,
                _ => {}
            }
        }
    }
    Ok(())
}

/// The last instruction before a return that the kernel need not step over, if all ways to that return lead over it.
/// `code` is all code from the beginning of the function to the return.
fn cheap_end(code: &[Instruction], needs_result: bool) -> Option<End> {
    let mut info = InstructionInfoFactory::new();
    let (last, before) = code.split_last()?;
    let mut result = Register::RAX;
    for (index, instruction) in before.iter().enumerate().rev().take(NEAR) {
        let is_call = instruction.flow_control() == FlowControl::Call;
        let into = |jump: &Instruction| {
            let target = jump.near_branch_target();
            instruction.ip() < target && target <= last.ip()
        };
        let is_jump = |other: &Instruction| {
            matches!(other.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
        };
        // Somebody who comes from before it comes past it.
        let is_passed = before[..index].iter().any(|other| is_jump(other) && into(other));
        if is_cheap(instruction) && !is_call && !is_passed {
            let number = REGISTERS.iter().position(|&register| register == result)?;
            return Some(End { address: instruction.ip(), result: u64::try_from(number).ok()? });
        }
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch => continue,
            // What it calls may do anything, but it leaves some registers as they were.
            FlowControl::Call if needs_result && KEPT.contains(&result) => continue,
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

/// Whether the kernel knows what an instruction does.
fn is_cheap(instruction: &Instruction) -> bool {
    let is_push = instruction.mnemonic() == Mnemonic::Push && instruction.op0_kind() == OpKind::Register;
    let is_jump = matches!(
        instruction.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
    );
    is_push || instruction.code() == Code::Nopd || is_jump && instruction.op0_kind() == OpKind::NearBranch64
}

/// Whether the kernel puts no probe on an instruction, because of a prefix.
fn is_refused(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.segment_prefix() != Register::None
}

/// Whether Linux 6.18 turns a breakpoint on this instruction into a call. Until a later fix, that overwrites the 128 bytes below
/// the stack pointer, where a function that calls no other may keep its variables; where it begins, it keeps none yet.
fn becomes_call(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Nop && instruction.len() == 5
}

/// Whether a probe at an address in the middle of a function would do harm, for that reason.
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

/// The instructions from an address on.
fn decoder(elf: &Elf, address: u64) -> Option<impl IntoIterator<Item = Instruction>> {
    let code = elf.code_from(address)?;
    // Far more than any function that is looked at.
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
    fn what_nobody_reads_may_be_overwritten_before_the_probe() {
        let place = |code: &[u8], read: &[u64]| {
            let (first, cheap) = beginning(decoded(code, 0x1000), read);
            assert_eq!(first, Some(0x1004));
            cheap.map(|place| place.ip())
        };
        assert_eq!(place(PERFORM, &[0]), Some(0x1012));
        assert_eq!(place(PERFORM, &[0, 1]), None);
        assert_eq!(place(REGISTER, &[]), Some(0x100a));
        let rsp = register::OTHERS + 2;
        assert_eq!(place(REGISTER, &[rsp]), None);
    }

    #[test]
    fn a_five_byte_nop_is_taken_only_where_a_function_begins() {
        const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
        let endbr64 = [0xf3, 0x0f, 0x1e, 0xfa];
        // mov %fs:0x28,%rax, on which the kernel puts no probe; mov %rdi,%rax
        let (refused, other) = ([0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0], [0x48, 0x89, 0xf8]);
        let first = |code: &[&[u8]]| beginning(decoded(&code.concat(), 0x1000), &[]);
        assert_eq!(first(&[&endbr64, &NOP, &other]), (Some(0x1004), None));
        assert_eq!(first(&[&refused, &NOP, &other]), (Some(0x100e), None));
        // Near the end of a function: mov, the NOP, ret.
        let code = decoded(&[&other[..], &NOP, &[0xc3]].concat(), 0x1000);
        assert_eq!(cheap_end(&code, false), None);
    }

    #[test]
    fn an_answer_is_followed_back_to_a_cheap_instruction() {
        let code = decoded(NEW_CONTEXT, 0x1000);
        let rbx = register::OTHERS;
        assert_eq!(cheap_end(&code, true), Some(End { address: 0x1011, result: rbx }));
        // Without need for the answer nothing tells what is done behind the last call.
        assert_eq!(cheap_end(&code, false), None);
    }

    #[test]
    fn what_can_be_passed_by_is_not_taken() {
        // je over the nop; nop; ret.
        let code = decoded(&[0x74, 0x01, 0x90, 0xc3], 0x1000);
        assert_eq!(cheap_end(&code, false).map(|end| end.address), Some(0x1000));
        let straight = decoded(&[0x90, 0x58, 0xc3], 0x1000);
        assert_eq!(cheap_end(&straight, false).map(|end| end.address), Some(0x1000));
        // pop %rax: the answer comes from elsewhere.
        assert_eq!(cheap_end(&straight, true), None);
    }
}
