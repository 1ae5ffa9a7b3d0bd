//! Where in a function a probe may stand, read from its instructions: a cheap one near its beginning, all those that
//! return, or the function that it only jumps to.

use std::collections::BTreeSet;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use super::elf::Elf;

/// Most instructions of a function that are looked at.
const MOST: usize = 4096;

/// How far from the beginning of a function a probe for it may stand, in instructions.
const BEGINNING: usize = 8;

/// Registers that arguments are passed in, and the one with the answer.
const PASSED: [Register; 7] =
    [Register::RDI, Register::RSI, Register::RDX, Register::RCX, Register::R8, Register::R9, Register::RAX];

/// The place for a probe at the beginning of a function: the first instruction that the kernel need not step over (it
/// knows what a `push` or `nop` does), if no argument is overwritten before it; else the first one behind the mark for
/// indirect jumps.
pub(crate) fn entry(elf: &Elf, function: u64) -> Option<u64> {
    let mut info = InstructionInfoFactory::new();
    let mut first = None;
    for instruction in decoder(elf, function)?.into_iter().take(BEGINNING) {
        if instruction.code() == Code::Endbr64 {
            continue;
        }
        // The kernel puts no probe on an instruction with such a prefix.
        let is_refused = instruction.has_lock_prefix() || instruction.segment_prefix() != Register::None;
        if !is_refused {
            first = first.or(Some(instruction.ip()));
        }
        let is_push = instruction.mnemonic() == Mnemonic::Push && instruction.op0_kind() == OpKind::Register;
        if is_push || instruction.mnemonic() == Mnemonic::Nop {
            return Some(instruction.ip());
        }
        let overwrites = info.info(&instruction).used_registers().iter().any(|used| {
            let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            writes && PASSED.contains(&used.register().full_register())
        });
        if instruction.flow_control() != FlowControl::Next || overwrites {
            break;
        }
    }
    first
}

/// All instructions that return from a function, also those of functions that it ends by jumping to. An error says why
/// they are not known.
pub(crate) fn returns(elf: &Elf, function: u64) -> Result<Vec<u64>, String> {
    let mut returns = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut to_do = vec![function];
    while let Some(start) = to_do.pop() {
        let decoder = decoder(elf, start).ok_or("its code is not in its file")?;
        for instruction in decoder {
            if instruction.is_invalid() || seen.len() >= MOST {
                return Err("its code is not understood".into());
            }
            if !seen.insert(instruction.ip()) {
                break;
            }
            match instruction.flow_control() {
                FlowControl::Return => {
                    returns.insert(instruction.ip());
                    break;
                }
                FlowControl::UnconditionalBranch => {
                    to_do.push(instruction.near_branch_target());
                    break;
                }
                FlowControl::ConditionalBranch => to_do.push(instruction.near_branch_target()),
                FlowControl::IndirectBranch => return Err("it jumps to places that are computed".into()),
                FlowControl::Exception => break,
                _ => {}
            }
        }
    }
    if returns.is_empty() { Err("it never returns".into()) } else { Ok(returns.into_iter().collect()) }
}

/// The function that one only jumps to, having arranged its arguments.
pub(crate) fn jump_target(elf: &Elf, function: u64) -> Option<u64> {
    for instruction in decoder(elf, function)?.into_iter().take(BEGINNING) {
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::UnconditionalBranch => return Some(instruction.near_branch_target()),
            _ => return None,
        }
    }
    None
}

/// The instructions from an address on.
fn decoder(elf: &Elf, address: u64) -> Option<impl IntoIterator<Item = Instruction>> {
    let code = elf.code_from(address)?;
    // Far more than any function that is looked at.
    let code = &code[..code.len().min(1 << 20)];
    Some(Decoder::with_ip(64, code, address, DecoderOptions::NONE))
}
