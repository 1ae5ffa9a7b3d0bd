//! Decodes accessor functions: the chain of pointers that a function follows before it returns a number. Used where a
//! library exports the accessor and not the variable that it reads.

use crate::binary::memory::Memory;

/// Maximum number of instructions after the first.
const INSTRUCTIONS_MAX: usize = 8;

/// First instruction of x86-64 functions that are built for indirect branch tracking.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// A chain of pointers that leads to a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PointerChain {
    /// Address in the file where the chain starts.
    start: u64,
    /// Offsets, in bytes, that are added in turn: each but the last gives the address of the next pointer, the last the
    /// address of the number.
    offsets: Vec<u64>,
}

impl PointerChain {
    /// Decodes a function's code. `address` is its address in the file. `None` if it does anything but follow pointers.
    pub(crate) fn of(code: &[u8], address: u64) -> Option<Self> {
        let plain = code.strip_prefix(&ENDBR64).unwrap_or(code);
        let skipped = (code.len() - plain.len()) as u64;
        // mov or lea DISTANCE(%rip), %rax
        let (&[0x48, operation @ (0x8b | 0x8d), 0x05, a, b, c, d], mut rest) = plain.split_first_chunk()?
        else {
            return None;
        };
        let next = address.wrapping_add(skipped + 7);
        let start = next.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into());
        let mut offsets = if operation == 0x8b { vec![0] } else { vec![] };
        for _ in 0..INSTRUCTIONS_MAX {
            rest = match *rest {
                // ret
                [0xc3, ..] if !offsets.is_empty() => return Some(Self { start, offsets }),
                // mov (%rax), %rax
                [0x48, 0x8b, 0x00, ref rest @ ..] => {
                    offsets.push(0);
                    rest
                }
                // mov OFFSET(%rax), %rax
                [0x48, 0x8b, 0x40, offset @ ..0x80, ref rest @ ..] => {
                    offsets.push(offset.into());
                    rest
                }
                [0x48, 0x8b, 0x80, a, b, c, d @ ..0x80, ref rest @ ..] => {
                    offsets.push(u32::from_le_bytes([a, b, c, d]).into());
                    rest
                }
                _ => return None,
            };
        }
        None
    }

    /// Address of the number in a process; `None` while a pointer of the chain is null or cannot be read. `bias` is
    /// added to addresses in the file.
    pub(crate) fn follow(&self, memory: &impl Memory, bias: u64) -> Option<u64> {
        let (last, before) = self.offsets.split_last()?;
        let mut address = self.start.wrapping_add(bias);
        for offset in before {
            address = memory.word(address.checked_add(*offset)?).filter(|&pointer| pointer != 0)?;
        }
        address.checked_add(*last)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// `rb_gc_count` of Debian's Ruby 3.1.2, which reads through the global offset table.
    const THROUGH_GOT: &[u8] = &[
        0x48, 0x8b, 0x05, 0x81, 0xf7, 0x2d, 0x00, 0x48, 0x8b, 0x00, 0x48, 0x8b, 0x80, 0x50, 0x04, 0x00, 0x00,
        0x48, 0x8b, 0x80, 0xb8, 0x01, 0x00, 0x00, 0xc3, 0x0f,
    ];

    struct Words(HashMap<u64, u64>);

    impl Memory for Words {
        fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
            into.copy_from_slice(&self.0.get(&address)?.to_le_bytes());
            Some(())
        }
    }

    #[test]
    fn a_chain_of_pointers_is_decoded() {
        let chain = PointerChain::of(THROUGH_GOT, 0xcf500).unwrap();
        assert_eq!(chain, PointerChain { start: 0x3a_ec88, offsets: vec![0, 0, 0x450, 0x1b8] });
        let memory = Words([(0x13a_ec88, 0x100), (0x100, 0x2000), (0x2450, 0x3000)].into());
        assert_eq!(chain.follow(&memory, 0x100_0000), Some(0x31b8));
        let not_started = Words([(0x13a_ec88, 0x100), (0x100, 0)].into());
        assert_eq!(chain.follow(&not_started, 0x100_0000), None);
    }

    #[test]
    fn a_relative_address_saves_a_pointer() {
        let code = [&ENDBR64[..], &[0x48, 0x8d, 0x05, 0xf5, 0xff, 0xff, 0xff, 0x48, 0x8b, 0x40, 0x08, 0xc3]];
        assert_eq!(
            PointerChain::of(&code.concat(), 0x1000),
            Some(PointerChain { start: 0x1000, offsets: vec![8] })
        );
    }

    #[test]
    fn other_code_is_not_decoded() {
        for length in 0..25 {
            assert_eq!(PointerChain::of(&THROUGH_GOT[..length], 0), None, "cut at {length}");
        }
        let mut endless = THROUGH_GOT[..7].to_vec();
        endless.extend([0x48, 0x8b, 0x00].repeat(100));
        assert_eq!(PointerChain::of(&endless, 0), None);
        assert_eq!(PointerChain::of(&[0x55, 0x48, 0x89, 0xe5, 0xc3, 0, 0, 0], 0), None);
    }
}
